from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from launch import planning, preflight
from launch.config import Config, validate
from launch.hardware import DetectedGpu
from launch.preflight import check_fits, check_models

SMALL: dict[str, Any] = {"from_scratch": "t5", "d_model": 16, "layers": 1, "heads": 2, "vocabulary": 300}
LARGE: dict[str, Any] = {"from_scratch": "llama", "d_model": 8192, "layers": 80, "heads": 64, "vocabulary": 32000}
CONFIG: dict[str, Any] = {
    "name": "mine",
    "task": {"train": "a.jsonl", "test": "b.jsonl", "metric": "text"},
    "teacher": {"source": "deepspeed", "model": SMALL, "tune": {}},
    "student": {"model": SMALL},
}
ALL = ("tune", "teach", "train")


def config(teacher: dict[str, Any] | None = None, student: Any = SMALL, **launch: Any) -> Config:
    values = copy.deepcopy(CONFIG)
    values["teacher"] = teacher or values["teacher"]
    return validate({**values, "student": {"model": student}, "launch": launch}, "file")


def here(monkeypatch: pytest.MonkeyPatch, gpus: int, host_bytes: int = 10**9) -> None:
    for module in (planning, preflight):
        monkeypatch.setattr(module, "detect", lambda: [DetectedGpu("NVIDIA L4", 24 * 10**9)] * gpus)
        monkeypatch.setattr(module, "memory_bytes", lambda: host_bytes)


# ----- what fits -----


def test_a_student_that_no_layout_fits_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, 1)
    expected = (
        r"\Astudent.model does not fit: to train [\d,]+ parameters takes [\d,.]+ GB on one GPU \(NVIDIA L4\) of 21.9 GB usable, "
        r"and no other layout, batch or offloading makes it fit: use a smaller model, or more or "
        r"larger GPUs \(`stepdown plan` says how many\)\Z"
    )
    with pytest.raises(ValueError, match=expected):
        check_fits(config(student=LARGE), ALL)
    check_fits(config(student=LARGE), ("tune", "teach"))
    check_fits(config(), ALL)


def test_a_teacher_that_cannot_be_tuned_here_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, 2)
    with pytest.raises(ValueError, match=r"\Ateacher.model does not fit: to tune [\d,]+ parameters takes [\d,.]+ GB on each of 2 GPUs"):
        check_fits(config({"source": "deepspeed", "model": LARGE, "tune": {}}), ALL)


def test_a_teacher_that_cannot_write_here_is_told_unless_the_hosts_memory_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = '"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8'
    (tmp_path / "config.json").write_text(f'{{"model_type": "llama", {sizes}, "vocab_size": 32000}}')
    teacher = {"source": "deepspeed", "model": str(tmp_path)}
    here(monkeypatch, 2)
    expected = (
        r"\Ateacher.model does not fit: [\d,]+ parameters in bf16 take [\d,.]+ GB on each of 2 GPUs, which have [\d.]+ GB usable: use at "
        r"least 8 such GPUs, larger ones, or a smaller teacher \(`stepdown plan` says more\)\Z"
    )
    with pytest.raises(ValueError, match=expected):
        check_fits(config(teacher), ALL)
    check_fits(config(teacher), ("train",))
    here(monkeypatch, 2, host_bytes=500 * 10**9)
    check_fits(config(teacher), ALL)
    with pytest.raises(ValueError, match=r"teacher\.model does not fit"):
        check_fits(config({**teacher, "sharding": "tensor"}), ALL)


def test_without_gpus_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, 0)
    check_fits(config(student=LARGE), ALL)
    here(monkeypatch, 1)
    check_fits(config(student=LARGE, device="cpu"), ALL)


# ----- where models are -----


@pytest.mark.parametrize(
    ("teacher", "student", "kinds", "key"),
    [
        ("/no/teacher", SMALL, ("teach",), "teacher.model"),
        ("org/name", "/no/student", ("teach", "train"), "student.model"),
        ("/no/teacher", SMALL, ("train",), None),
        ("org/name", "/no/student", ("teach",), None),
        ("org/name", SMALL, ALL, None),
    ],
)
def test_a_path_that_leads_nowhere_is_told_before_anything_runs(
    teacher: str, student: Any, kinds: tuple[str, ...], key: str | None
) -> None:
    made = config({"source": "deepspeed", "model": teacher}, student)
    if key is None:
        check_models(made, kinds)
        return
    path = f"/no/{key.partition('.')[0]}"
    expected = f"{key} is {path!r}, but {path} does not exist: check the path (a relative one starts at {Path.cwd()})"
    with pytest.raises(ValueError, match=rf"\A{re.escape(expected)}\Z"):
        check_models(made, kinds)
