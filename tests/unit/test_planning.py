from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch import planning
from launch.config import Config, validate
from launch.hardware import DetectedGpu
from launch.parameters import parameters_of
from launch.planning import RunPlan, plan_run, render, render_estimates, rule_of, size_of
from train.config import ScratchModel

SMALL: dict[str, Any] = {"from_scratch": "t5", "d_model": 16, "layers": 1, "heads": 2, "vocabulary": 300}
LIVE: dict[str, Any] = {
    "name": "mine",
    "task": {"train": "a.jsonl", "test": "b.jsonl", "metric": "text"},
    "teacher": {"source": "deepspeed", "model": SMALL, "tune": {}},
    "student": {"model": SMALL},
}
SIZE = parameters_of(ScratchModel.model_validate(SMALL), vocabulary=300)


def config(teacher: dict[str, Any] | None = None, student: Any = None, **launch: Any) -> Config:
    values = copy.deepcopy(LIVE)
    values["launch"] = launch
    values["teacher"] = teacher or values["teacher"]
    values["student"] = student or values["student"]
    return validate(values, "file")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "detect", list)
    monkeypatch.setattr(planning, "memory_bytes", lambda: 16 * 10**9)


def shown(plan: RunPlan, width: int = 80) -> list[str]:
    console = Console(width=width, quiet=False, force_terminal=False)
    with console.capture() as capture:
        render(plan, console, as_json=False)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_small_run_on_a_cpu_by_hand() -> None:
    plan = plan_run(config(cpu_processes=2))
    assert SIZE is not None
    assert (plan.device, plan.processes, plan.device_memory_bytes) == ("CPU", 2, 16 * 10**9)
    assert (plan.teacher_parameters, plan.student_parameters) == (SIZE, SIZE)
    assert plan.teacher is not None
    assert plan.student is not None
    assert plan.teacher.weight_bytes_per_gpu == 4 * SIZE
    # fp32 under ZeRO-1 on two processes: 4 + 4 bytes a parameter, and half of Adam's 8.
    assert plan.student.total_bytes == (4 + 4 + 4) * SIZE
    assert plan.sentence.startswith("The teacher fits this machine: 2 copies with working memory: ")


def test_a_70b_teacher_on_eight_gpus_by_hand() -> None:
    plan = plan_run(config(), gpu="A100-80", gpus=8, params="70B")
    assert plan.teacher is not None
    assert (plan.device, plan.processes, plan.teacher_parameters) == ("A100-80GB", 8, 70 * 10**9)
    assert (plan.teacher.sharding, plan.teacher.tensor_degree, plan.teacher.weight_bytes_per_gpu) == ("tensor", 4, 35 * 10**9)
    assert plan.sentence.startswith("The teacher fits 8 x A100-80GB, split over 4: one copy over 4 GPUs of a node takes 42.0 GB of 72.0 GB")
    lines = shown(plan)
    assert lines[0] == "8 x A100-80GB, 80.0 GB each; bytes a process, without activations"
    assert [line.split() for line in lines[1:3]] == [
        ["Params", "Weights", "Gradients", "Optimizer", "Total", "Sharding"],
        ["teacher", "70.0B", "35.0", "GB", "-", "-", "35.0", "GB", "tensor"],
    ]
    assert lines[3].split()[:2] == ["student", "14.3k"]
    assert lines[3].endswith("ZeRO-1")
    assert lines[4:] == [plan.sentence]


def test_no_number_is_cut_on_a_narrow_line() -> None:
    assert "…" not in "".join(shown(plan_run(config(), gpu="H200", gpus=8, params="405B"), 80))


def test_a_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    render(plan_run(config(), gpu="L4", params="3B"), Console(), as_json=True)
    plan = json.loads(capsys.readouterr().out)
    assert (plan["device"], plan["processes"], plan["teacher"]["sharding"], plan["zero_stage"]) == ("L4", 1, "replica", 0)


@pytest.mark.parametrize(
    ("name", "device"),
    [("a100-40", "A100-40GB"), ("A100", "A100-80GB"), ("H100", "H100-80GB"), ("h200-141gb", "H200-141GB"), ("rtx 4090", "RTX 4090")],
)
def test_gpus_by_their_name(name: str, device: str) -> None:
    assert plan_run(config(), gpu=name).device == device


def test_the_number_of_gpus_is_the_options_else_the_configurations() -> None:
    assert plan_run(config(gpus_per_node=4), gpu="L4").processes == 4
    assert plan_run(config(gpus_per_node=4), gpu="L4", gpus=2).processes == 2
    assert plan_run(config(), gpu="L4").processes == 1


def test_the_gpus_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "detect", lambda: [DetectedGpu("NVIDIA A", 24 * 10**9), DetectedGpu("NVIDIA A", 20 * 10**9)])
    plan = plan_run(config())
    assert (plan.device, plan.processes, plan.device_memory_bytes) == ("NVIDIA A", 2, 20 * 10**9)
    assert plan.sentence.startswith("The teacher fits 2 x NVIDIA A, a copy on each: ")
    assert plan_run(config(gpus_per_node=1)).processes == 1
    assert plan_run(config(), gpus=1).processes == 1
    assert plan_run(config(device="cpu")).device == "CPU"


def test_a_teacher_that_does_not_fit_is_told() -> None:
    sentence = plan_run(config(), gpu="L4", gpus=2, params="70B").sentence
    assert sentence.startswith("The teacher does not fit: 70,000,000,000 parameters in bf16 take 168.0 GB")
    assert "sharded by ZeRO-3 over all" in plan_run(config(), gpu="A100-80", gpus=3, params="80B").sentence


def test_sizes_that_only_the_files_would_tell(tmp_path: Path) -> None:
    hub = {"source": "deepspeed", "model": "OWNER/large"}
    plan = plan_run(config(hub, {"model": {**{k: v for k, v in SMALL.items() if k != "vocabulary"}, "tokenizer": "OWNER/large"}}))
    assert (plan.teacher, plan.student) == (None, None)
    assert plan.sentence == (
        "The size of teacher.model is not known before its files are read: give it with --params, such as --params 70B. "
        "The size of student.model is not known before its files are read."
    )
    assert shown(plan) == ["CPU, 16.0 GB, processes: 1; bytes a process, without activations", plan.sentence]
    recorded = plan_run(config({"source": "recorded", "label": "{a}", "rationale": "{b}"}))
    assert recorded.sentence == "The teacher is recorded: it needs no device."


def test_a_student_cut_from_a_teacher_from_scratch_has_its_vocabulary() -> None:
    plan = plan_run(config(student={"model": {"cut_from": "teacher", "layers": 1}}))
    assert plan.student_parameters == plan.teacher_parameters == SIZE


def test_what_the_table_does_not_show_is_said() -> None:
    knobs = {"model": SMALL, "zero_stage": 2, "offload_optimizer": True, "lora": {}, "loss": {"soft": 0.5, "teacher": "live"}}
    plan = plan_run(config(student=knobs), gpu="L4", gpus=2)
    assert plan.student is not None
    assert (plan.student.optimizer_bytes, plan.student.host_bytes) == (0, SIZE // 2 * 12)
    assert plan.sentence.endswith(
        f" The student's optimizer takes {SIZE * 6 / 1e6:.2f} MB of the host's memory a process."
        " The student is counted as if all its weights were trained: student.lora takes less."
        f" In training the live teacher takes another {SIZE * 2 / 1e6:.2f} MB in each process."
    )


@pytest.mark.parametrize(("gpus", "stage"), [(1, 0), (2, 1)])
def test_an_automatic_zero_stage_shards_where_there_are_several_processes(gpus: int, stage: int) -> None:
    assert plan_run(config(), gpu="L4", gpus=gpus).zero_stage == stage


def test_unknown_memory_is_called_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "memory_bytes", lambda: None)
    assert shown(plan_run(config()))[0].startswith("CPU, unknown, processes: 1")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gpu": "V100"}, "--gpu is V100, which the table does not have; it has: A100-40GB, A100-80GB, "),
        ({"gpus": 2}, "--gpus is 2, but this machine has 0: name the GPU to plan for with --gpu"),
        ({"params": "big"}, "'big' is not a number of parameters: write 175B, 1.5B, 135M, 10K or a whole number above 0"),
        ({"params": ""}, "'' is not a number of parameters"),
    ],
)
def test_a_wrong_option_is_told(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=rf"\A{re.escape(expected)}"):
        plan_run(config(), **options)


# ----- one model, as public estimators count it -----


def estimated(console_width: int, rule: Any, **options: Any) -> list[str]:
    console = Console(width=console_width, force_terminal=False)
    with console.capture() as capture:
        render_estimates(*size_of(None, "175B"), rule, console, **{"gpu": None, "as_json": False, **options})
    return [" ".join(line.split()) for line in capture.get().splitlines()]


def test_the_fewest_gpus_by_a_public_rule() -> None:
    lines = estimated(100, "simple")
    assert lines[0] == "175B parameters: 175.0B; fewest GPUs by the rule `simple`"
    assert "inference, bf16 350.0 GB 9 5 3 15" in lines
    assert "training, ZeRO-2 3,259.6 GiB -" in estimated(100, "deepspeed", gpu="A100-80")
    assert estimated(100, "deepspeed")[-1].endswith("The largest module is not known by a number of parameters alone, and counts as 0.")


def test_a_folder_tells_its_size(tmp_path: Path) -> None:
    saved = {
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "vocab_size": 10,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(saved))
    name, size = size_of(str(tmp_path), None)
    assert name == str(tmp_path)
    assert size.parameters == 2 * 10 * 8 + 4 * 8 * 8 + 3 * 8 * 16 + 3 * 8
    assert size_of(str(tmp_path / "config.json"), None)[1] == size
    assert size.largest_module == 128


@pytest.mark.parametrize(
    ("model", "params", "message"),
    [
        (None, None, "give a configuration, a model"),
        ("a", "1B", "give a configuration, a model"),
        ("no such/folder of mine", None, "is no YAML file, no folder with a config.json, and no hub id"),
    ],
)
def test_what_has_no_size_is_told(model: str | None, params: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        size_of(model, params)


def test_a_rule_that_is_not_known_is_told() -> None:
    with pytest.raises(ValueError, match="--rule is mine: give simple, accelerate or deepspeed"):
        rule_of("mine")
