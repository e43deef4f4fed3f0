from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from data.examples import TaskExample, write_examples
from launch import planning, preflight
from launch.config import Config, validate
from launch.hardware import DetectedGpu
from launch.local import check_targets
from launch.pipeline import Stage
from launch.preflight import check_fits, check_models, check_recorded
from train.places import Place

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
        ("/no/teacher", {"cut_from": "teacher", "layers": 1}, ("train",), "teacher.model"),
        ("org/name", "/no/student", ("teach",), None),
        ("org/name", SMALL, ALL, None),
    ],
)
def test_a_path_that_leads_nowhere_is_told_before_anything_runs(
    teacher: str, student: Any, kinds: tuple[str, ...], key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "check_hub", lambda *_, **__: None)
    made = config({"source": "deepspeed", "model": teacher}, student)
    if key is None:
        check_models(made, kinds)
        return
    path = f"/no/{key.partition('.')[0]}"
    expected = f"{key} is {path!r}, but {path} does not exist: check the path (a relative one starts at {Path.cwd()})"
    with pytest.raises(ValueError, match=rf"\A{re.escape(expected)}\Z"):
        check_models(made, kinds)


def test_the_hub_is_asked_for_what_the_stages_that_run_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, bool]] = []

    def check_hub(place: Place, key: str, *, is_tokenizer: bool = False) -> None:
        asked.append((place.name, key, is_tokenizer))

    monkeypatch.setattr(preflight, "check_hub", check_hub)
    live = {"source": "deepspeed", "model": "org/teacher"}
    scratch = {"from_scratch": "llama", "tokenizer": "org/words"}
    cases: list[tuple[dict[str, Any], Any, tuple[str, ...], list[tuple[str, str, bool]]]] = [
        (live, "org/student", ALL, [("org/teacher", "teacher.model", False), ("org/student", "student.model", False)]),
        (live, "org/student", ("train",), [("org/student", "student.model", False)]),
        (live, "org/student", ("deploy", "evaluate"), []),
        (live, scratch, ("train",), [("org/words", "student.model.tokenizer", True)]),
        (live, {"cut_from": "teacher", "layers": 1}, ("train",), [("org/teacher", "teacher.model", False)]),
        ({**live, "tune": {}}, {"cut_from": "teacher", "layers": 1}, ("train",), []),
        ({"source": "recorded", "label": "{a}", "rationale": "{b}"}, SMALL, ALL, []),
    ]
    for teacher, student, kinds, expected in cases:
        asked.clear()
        check_models(config(teacher, student), kinds)
        assert asked == expected


def test_an_engine_that_is_not_installed_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "check_hub", lambda *_, **__: None)
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    made = config({"source": "vllm", "model": "org/teacher"})
    check_models(made, ("train",))
    told = (
        "teacher.source is vllm, but the package vllm is not installed: pip install vllm, in an environment of its own if it asks for "
        "another torch; or serve the model with `vllm serve` and set source to endpoint"
    )
    with pytest.raises(RuntimeError, match=rf"\A{re.escape(told)}\Z"):
        check_models(made, ALL)


# ----- what a recorded teacher said -----


@pytest.mark.parametrize(
    ("label", "rationale", "told"),
    [
        ("{anser}", "{why}", "teacher.label is '{anser}': no field 'anser' (has: question, answer, why) in the row of example t0; name a"),
        ("{answer}", "{wy}", "teacher.rationale is '{wy}': no field 'wy' (has: question, answer, why) in the row of example t0; name a"),
        ("{answer}", "{why}", "teacher.rationale is '{why}': no field 'why' (has: question, answer) in the row of example e1; name a"),
        ("{answer}", "{question}", None),
    ],
)
def test_a_field_that_rows_lack_is_told_before_anything_runs(label: str, rationale: str, told: str | None, tmp_path: Path) -> None:
    def example(name: str, **fields: str | None) -> TaskExample:
        return TaskExample(name, "how many?", "2", fields={"question": "how many?", "answer": "2", **fields})

    write_examples(tmp_path / "train.jsonl", [example("t0", why="so"), example("t1", why=None)])
    write_examples(tmp_path / "validation.jsonl", [example("v0")])
    write_examples(tmp_path / "test.jsonl", [example("e0", why=""), example("e1")])
    made = config({"source": "recorded", "label": label, "rationale": rationale})
    check_recorded(made, ("train",), tmp_path)
    if told is None:
        check_recorded(made, ALL, tmp_path)
        return
    with pytest.raises(ValueError, match=rf"\A{re.escape(told)} field that every row has\Z"):
        check_recorded(made, ALL, tmp_path)
    check_recorded(config(), ALL, tmp_path / "nowhere")


# ----- what a student can become -----


def test_a_target_that_a_student_is_too_narrow_for_is_told_before_anything_runs(tmp_path: Path) -> None:
    def wanted(student: Any, **changes: Any) -> tuple[Config, list[Stage]]:
        values = {**copy.deepcopy(CONFIG), "student": {"model": student, **changes}, "deploy": {"targets": ["onnx-int8"]}}
        return validate(values, "file"), [Stage("deploy.onnx-int8", "", tmp_path / "deploy", "process")]

    narrow = {"from_scratch": "llama", "d_model": 32, "heads": 4}
    told = (
        r"\Adeploy.targets holds onnx-int8, but a head of student.model has 8 numbers, and ONNX Runtime's attention takes multiples of 16:"
    )
    with pytest.raises(ValueError, match=told):
        check_targets(*wanted(narrow))
    with pytest.raises(ValueError, match=told):
        check_targets(*wanted(narrow, prune={"method": "magnitude", "fraction": 0.5}))
    check_targets(*wanted({**narrow, "heads": 2}))
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "artifact.json").write_text("{}")
    check_targets(*wanted(narrow))
