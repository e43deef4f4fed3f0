from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch import planning, sizes
from launch.architecture import assumed_architecture
from launch.config import Config, validate
from launch.hardware import DetectedGpu
from launch.memory import CONTEXT_BYTES
from launch.parameters import config_of, count_parameters
from launch.plan_tables import as_document, render, sentence
from launch.planning import RunPlan, plan_model, plan_run
from launch.rules import render_estimates, rule_of
from launch.sizes import size_of
from train.config import ScratchModel

SMALL: dict[str, Any] = {"from_scratch": "t5", "d_model": 16, "layers": 1, "heads": 2, "vocabulary": 300}
LIVE: dict[str, Any] = {
    "name": "mine",
    "task": {"train": "a.jsonl", "test": "b.jsonl", "metric": "text"},
    "teacher": {"source": "deepspeed", "model": SMALL, "tune": {}},
    "student": {"model": SMALL},
}
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 10,
}  # fmt: skip
FETCHED = sizes.fetched
SIZE = count_parameters(config_of(ScratchModel.model_validate(SMALL), vocabulary=300) or {})


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


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(model: str) -> Path:
        raise RuntimeError(f"the hub does not give config.json of {model}: no network; give its folder, or --params")

    monkeypatch.setattr(sizes, "fetched", offline)


def shown(plan: RunPlan, width: int = 80) -> list[str]:
    console = Console(width=width, quiet=False, force_terminal=False)
    with console.capture() as capture:
        render(plan, console, as_json=False)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_small_run_on_a_cpu_by_hand() -> None:
    plan = plan_run(config(cpu_processes=2))
    assert SIZE is not None
    assert (plan.devices.name, plan.devices.processes, plan.devices.memory_bytes) == ("CPU", 2, 16 * 10**9)
    assert plan.teacher is not None
    assert plan.student is not None
    assert (plan.teacher.parameters, plan.student.parameters) == (SIZE, SIZE)
    assert plan.teacher.plan.weight_bytes_per_gpu == 4 * SIZE
    # fp32 under ZeRO-1 on two processes: weights, gradients, and half of the masters and of Adam's 8 bytes.
    memory = plan.student.plan.memory
    assert (memory.weights, memory.optimizer) == (4 * SIZE, 6 * SIZE)
    assert sentence(plan).startswith("On CPU the teacher fits: 2 copies with working memory: ")


def test_a_70b_teacher_on_eight_gpus() -> None:
    plan = plan_run(config(), gpu="A100-80", gpus=8, params="70B")
    assert plan.teacher is not None
    assert (plan.devices.name, plan.devices.processes, plan.teacher.parameters) == ("A100-80GB", 8, 70 * 10**9)
    assert (plan.teacher.plan.sharding, plan.teacher.plan.tensor_degree) == ("tensor", 4)
    assert plan.teacher.gpus == {"fp32": 5, "bf16": 2, "int8": 1, "int4": 1}
    assert sentence(plan).startswith("On 8 x A100-80GB the teacher fits split over 4 and writes 256 answers at once (one copy over 4 GPUs")
    lines = shown(plan)
    assert lines[0] == "8 x A100-80GB, 80.0 GB each, 73.8 GB of them usable"
    assert lines[2].split() == ["Bytes", "a", "process", "Teacher", "Tuning", "Student"]
    gpus = lines[next(n for n, line in enumerate(lines) if line.startswith("Fewest GPUs")) + 1 :]
    assert [line.split()[0] for line in gpus if line and not line[0].isspace()][:3] == ["A100-40GB", "A100-80GB", "H100-80GB"]
    assert "T4 (no bf16)" in "\n".join(lines)


@pytest.mark.parametrize("params", ["1B", "70B", "405B", "2T"])
def test_tables_fit_eighty_columns(params: str) -> None:
    text = shown(plan_run(config(), gpu="H200", gpus=8, nodes=4, params=params))
    assert "…" not in "".join(text)
    # The sentence at the end is wrapped by the terminal.
    assert max(len(line) for line in text[: text.index("", text.index(next(line for line in text if line.startswith("RTX"))))]) <= 80


def test_more_than_a_node_are_whole_nodes() -> None:
    lines = shown(plan_run(config(), gpu="A100-80", gpus=8, params="405B"))
    assert any(line.split()[:4] == ["A100-80GB", "16", "(2", "nodes)"] for line in lines)


def test_components_add_up_to_what_is_used() -> None:
    plan = plan_run(config(), gpu="A100-80", gpus=8, params="70B")
    document = as_document(plan)
    assert document["sentence"] == sentence(plan)
    assert plan.student is not None
    rows = {line.split("  ")[0].strip(): line.split()[-2:] for line in shown(plan) if line.endswith(("GB", "MB"))}
    assert rows["CUDA context, NCCL"] == ["2.2", "GB"]
    assert rows["Fragmentation margin"] == ["4.0", "GB"]
    total = (plan.student.plan.memory.total + 4 * 10**9 + 2.2e9) / 1e9
    assert rows["In all, at the fullest"] == [f"{total:.1f}", "GB"]


def test_a_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    render(plan_run(config(), gpu="L4", params="3B"), Console(), as_json=True)
    plan = json.loads(capsys.readouterr().out)
    assert (plan["devices"]["name"], plan["devices"]["per_node"], plan["teacher"]["plan"]["sharding"]) == ("L4", 1, "replica")
    assert plan["student"]["plan"]["step"]["zero_stage"] == 0
    assert plan["usable_bytes"] == int(24e9 * 0.95) - CONTEXT_BYTES
    assert set(plan["student"]["layout_bytes"]) == {"ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "offloaded"}


@pytest.mark.parametrize(
    ("name", "device", "memory"),
    [
        ("a100-40", "A100-40GB", 40),
        ("A100", "A100-80GB", 80),
        ("H100", "H100-80GB", 80),
        ("h200-141gb", "H200-141GB", 141),
        ("rtx 4090", "RTX 4090", 24),
        ("48GB", "48 GB", 48),
        ("mine=96 gb", "mine", 96),
    ],
)
def test_gpus_by_their_name_or_memory(name: str, device: str, memory: int) -> None:
    devices = plan_run(config(), gpu=name).devices
    assert (devices.name, devices.memory_bytes) == (device, memory * 10**9)


def test_the_number_of_gpus_is_the_options_else_the_configurations() -> None:
    assert plan_run(config(gpus_per_node=4), gpu="L4").devices.processes == 4
    assert plan_run(config(gpus_per_node=4), gpu="L4", gpus=2).devices.processes == 2
    assert plan_run(config(), gpu="L4").devices.processes == 1
    assert plan_run(config(), gpu="L4", gpus=2, nodes=3).devices.processes == 6
    assert plan_run(config(nodes=3), gpu="L4", gpus=2).devices.processes == 6


def test_the_gpus_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "detect", lambda: [DetectedGpu("NVIDIA A", 24 * 10**9), DetectedGpu("NVIDIA A", 20 * 10**9)])
    plan = plan_run(config())
    assert (plan.devices.name, plan.devices.processes, plan.devices.memory_bytes) == ("NVIDIA A", 2, 20 * 10**9)
    assert sentence(plan).startswith("On 2 x NVIDIA A the teacher fits as a copy on each and writes 256 answers at once ")
    assert plan_run(config(gpus_per_node=1)).devices.processes == 1
    assert plan_run(config(), gpus=1).devices.processes == 1
    assert plan_run(config(device="cpu")).devices.name == "CPU"


def test_a_teacher_that_does_not_fit_is_told() -> None:
    told = sentence(plan_run(config(), gpu="L4", gpus=2, params="70B"))
    assert told.startswith("On 2 x L4 the teacher does not fit: 70,000,000,000 parameters in bf16 take ")
    assert "use at least 8 such GPUs, larger ones, or a smaller teacher" in told
    assert "sharded by ZeRO-3 over all" in sentence(plan_run(config(), gpu="A100-80", gpus=3, params="80B"))


def test_a_student_that_does_not_fit_is_told_what_to_change() -> None:
    large = {"model": {"from_scratch": "llama", "d_model": 4096, "layers": 32, "heads": 32}}
    plan = plan_run(config(student=large), gpu="A100-80", gpus=8)
    assert plan.student is not None
    assert plan.student.plan.changes
    assert f"the student trains under ZeRO-{plan.student.plan.step.zero_stage} with {' '.join(plan.student.plan.changes)}, " in sentence(
        plan
    )
    assert "the student does not fit: " in sentence(plan_run(config(student=large), gpu="T4"))


def test_sizes_that_only_the_files_would_tell() -> None:
    hub = {"source": "deepspeed", "model": "OWNER/large"}
    plan = plan_run(config(hub, {"model": {**{k: v for k, v in SMALL.items() if k != "vocabulary"}, "tokenizer": "OWNER/large"}}))
    assert (plan.teacher, plan.student) == (None, None)
    assert shown(plan)[-1].strip() == (
        "The size of teacher.model is not known: the hub does not give config.json of OWNER/large: no network; give its folder, or "
        "--params. The size of student.model is not known before its tokenizer is read."
    )
    recorded = plan_run(config({"source": "recorded", "label": "{a}", "rationale": "{b}"}))
    assert recorded.teacher is None
    assert sentence(recorded).startswith("On CPU the student trains under ZeRO-0, ")
    package = plan_run(config({"source": "deepspeed", "model": "package:llm-x/model.gguf"}))
    assert package.remarks == ["the size of teacher.model is not known before its files are read"]


def test_a_hub_ids_config_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setattr(sizes, "fetched", lambda model: tmp_path / "config.json")
    plan = plan_run(config({"source": "deepspeed", "model": "OWNER/large"}, {"model": {"cut_from": "teacher", "layers": 1}}), gpu="L4")
    assert plan.teacher is not None
    assert plan.student is not None
    assert plan.teacher.parameters > plan.student.parameters > 0


def test_an_architecture_that_cannot_be_counted_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    plan = plan_run(config(student={"model": str(tmp_path)}))
    assert plan.remarks == ["student.model is of model_type 'bert', whose parameters cannot be counted"]


def test_a_student_cut_from_a_teacher_from_scratch_has_its_vocabulary() -> None:
    plan = plan_run(config(student={"model": {"cut_from": "teacher", "layers": 1}}))
    assert plan.student is not None
    assert plan.teacher is not None
    assert plan.student.parameters == plan.teacher.parameters == SIZE


def test_what_the_tables_do_not_show_is_said() -> None:
    knobs = {"model": SMALL, "zero_stage": 2, "offload_optimizer": True, "loss": {"soft": 0.5, "teacher": "live"}}
    plan = plan_run(config(student=knobs), gpu="L4", gpus=2, params="1B")
    assert plan.student is not None
    assert SIZE is not None
    assert (plan.student.plan.memory.optimizer, plan.student.plan.host_bytes) == (0, 18 * -(-SIZE // 2))
    assert plan.student.plan.memory.teacher == 2 * 10**9
    assert plan.remarks == [
        "of a number of parameters the shape is assumed: as many layers as heads, keys and values in eight groups",
        "the optimizer takes 0.0 GB of the host's memory a process",
    ]
    assert plan_run(config(), gpu="T4").remarks == ["T4 has no bf16 arithmetic, which is slow there: set student.precision to fp32"]


@pytest.mark.parametrize(("gpus", "stage"), [(1, 0), (2, 1)])
def test_an_automatic_zero_stage_shards_where_there_are_several_processes(gpus: int, stage: int) -> None:
    student = plan_run(config(), gpu="L4", gpus=gpus).student
    assert student is not None
    assert student.plan.step.zero_stage == stage


def test_unknown_memory_is_called_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "memory_bytes", lambda: None)
    assert shown(plan_run(config()))[0].startswith("CPU, unknown, processes: 1")


def test_hours_and_disk_are_for_so_many_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n' * 30)
    values = copy.deepcopy(LIVE)
    values["task"]["train"] = str(tmp_path / "rows.jsonl")
    values["teacher"] = {"source": "deepspeed", "model": "OWNER/large", "soft_labels": {"k": 32}}
    counted = plan_run(validate(values, "file"), gpu="A100-80", params="8B").outlook
    assert counted is not None
    assert (counted.rows, counted.assumed_rows) == (30, False)
    # 128 tokens of text at 4 bytes, 32 of a label at 85.8.
    assert counted.record_bytes == 30 * 128 * 4 + int(30 * 32 * 85.8)
    more = plan_run(validate(values, "file"), gpu="A100-80", params="8B", rows=60).outlook
    assert more is not None
    assert more.writing_hours == pytest.approx(2 * (counted.writing_hours or 0))
    assumed = plan_run(config(), gpu="A100-80")
    assert assumed.outlook is not None
    assert (assumed.outlook.rows, assumed.outlook.assumed_rows) == (10_000, True)
    assert any(
        line.startswith("At most, 10,000 rows, assumed (--rows), each as long as the configuration allows: ") for line in shown(assumed)
    )
    unknown = plan_run(config(), gpu="48GB").outlook
    assert unknown is not None
    assert (unknown.writing_hours, unknown.training_hours) == (None, None), "the speed of a GPU of one's own is not known"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gpu": "V100"}, "--gpu is V100, which the table does not have; it has: A100-40GB, A100-80GB, "),
        ({"gpu": "0GB"}, "--gpu is 0GB, which the table does not have"),
        ({"gpus": 2}, "--gpus is 2, but this machine has 0: name the GPU to plan for with --gpu"),
        ({"params": "big"}, "'big' is not a number of parameters: write 175B, 1.5B, 135M, 10K or a whole number above 0"),
        ({"params": ""}, "'' is not a number of parameters"),
    ],
)
def test_a_wrong_option_is_told(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=rf"\A{re.escape(expected)}"):
        plan_run(config(), **options)


# ----- one model by itself -----


def test_one_model_as_a_teacher_and_in_training() -> None:
    plan = plan_model(assumed_architecture(175 * 10**9), gpu="A100-80", gpus=8)
    assert plan.teacher is not None
    assert plan.teacher.plan.weight_bytes_per_gpu * 8 > 350 * 10**9, "embeddings are on each"
    row = next(row for row in plan.gpus if row.name == "A100-80GB")
    assert row.teacher is not None
    assert row.teacher >= 5, "the weights alone need five"
    assert plan.outlook is None


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
    # The largest of weights, gradients and states, and below it what all of them take; A100-40, A100-80, H200 and L4.
    assert estimated(80, "accelerate")[-3:-1] == [
        "training, bf16 1,303.9 GiB 33 17 10 55",
        "training, all added up 2,933.7 GiB 74 37 21 123",
    ]
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
def test_what_has_no_size_is_told(model: str | None, params: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "fetched", FETCHED)
    with pytest.raises(ValueError, match=message):
        size_of(model, params)


def test_a_rule_that_is_not_known_is_told() -> None:
    with pytest.raises(ValueError, match="--rule is mine: give simple, accelerate or deepspeed"):
        rule_of("mine")
