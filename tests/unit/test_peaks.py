"""The peak of each stage, measured and set against the plan of what ran: the same figures that tests/bench/memory.py found on GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from launch.architecture import architecture_of
from launch.config import Config, validate
from launch.inference_memory import Inference, decoding_memory, most_slots
from launch.ladder import StagePeak
from launch.memory import usable_bytes
from launch.peaks import stage_peaks
from launch.pipeline import Stage
from train.artifacts import MEMORY_FILE, Checkpoint, PeakMemory, Records
from train.peaks import measuring
from train.serving import peak_resident_bytes
from train.signals import Stopped
from train.world import World

ROOT = Path(__file__).resolve().parents[2]
MEASURED: dict[str, Any] = json.loads((ROOT / "tests" / "bench" / "memory.json").read_text())
PEAKS = {row["case"]: row["peak_bytes"] for row in MEASURED["rows"]}
GPU, GPU_BYTES = MEASURED["machine"]["device"], MEASURED["machine"]["device_bytes"]
MB = 10**6


# ----- measured -----


def alone() -> World:
    return World(0, 1, torch.device("cpu"))


def hold(num_bytes: int) -> None:
    """Takes so much memory, and gives it back to the system."""
    np.ones(num_bytes, dtype=np.uint8)


def test_each_stage_of_a_process_has_its_own_peak(tmp_path: Path) -> None:
    hold(600 * MB)
    before = peak_resident_bytes()
    with measuring(tmp_path / "small", alone()):
        hold(100 * MB)
    with measuring(tmp_path / "large", alone()):
        hold(300 * MB)
    small, large = PeakMemory.read(tmp_path / "small"), PeakMemory.read(tmp_path / "large")
    assert small is not None and large is not None
    assert (small.device, small.device_bytes, small.processes) == ("cpu", None, 1)
    assert large.peak_bytes - small.peak_bytes == pytest.approx(200 * MB, rel=0.1)
    assert before - small.peak_bytes > 400 * MB


def test_what_is_noted_is_the_most_of_any_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[list[int]] = []

    def summed(self: World, values: torch.Tensor) -> torch.Tensor:
        gathered.append(values.tolist())
        return values + torch.tensor([5, 7 * 10**12, 3]) * (values == 0)

    monkeypatch.setattr(World, "sum", summed)
    with measuring(tmp_path, World(2, 3, torch.device("cpu"))):
        pass
    assert gathered[0][:2] == [0, 0] and gathered[0][2] > MB, "each process brings its own"
    assert PeakMemory.read(tmp_path) is None, "only the main process writes"
    with measuring(tmp_path, World(0, 3, torch.device("cpu"))):
        pass
    assert PeakMemory.read(tmp_path) == PeakMemory("cpu", None, 3, 7 * 10**12)


def test_on_a_gpu_it_is_what_torch_allocated_since_the_stage_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peak, device = [9 * 10**9], torch.device("cuda", 1)

    def forget(of: torch.device) -> None:
        assert of == device
        peak[0] = 10**9

    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", forget)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda of: peak[0] if of == device else 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda of: SimpleNamespace(name=GPU, total_memory=GPU_BYTES))
    monkeypatch.setattr(World, "sum", lambda self, values: values)
    with measuring(tmp_path, World(0, 1, device)):
        peak[0] = max(peak[0], 5 * 10**9)
    assert PeakMemory.read(tmp_path) == PeakMemory(GPU, GPU_BYTES, 1, 5 * 10**9)


@pytest.mark.parametrize(("error", "noted"), [(Stopped("asked"), True), (RuntimeError("broken"), False)])
def test_a_stage_that_is_stopped_notes_what_it_held_so_far(error: Exception, noted: bool, tmp_path: Path) -> None:
    with pytest.raises(type(error)), measuring(tmp_path, alone()):
        raise error
    assert (PeakMemory.read(tmp_path) is not None) == noted


def test_the_most_of_all_starts_on_like_devices_and_of_all_parts_counts(tmp_path: Path) -> None:
    for peak in (PeakMemory("g", 10, 2, 7), PeakMemory("g", 10, 2, 5)):  # killed near its end, the second start had little to do
        peak.write(tmp_path)
    assert PeakMemory.read(tmp_path) == PeakMemory("g", 10, 2, 7)
    PeakMemory("g", 10, 4, 3).write(tmp_path)
    assert PeakMemory.read(tmp_path) == PeakMemory("g", 10, 4, 3), "the plan is of what ran last"
    PeakMemory("g", 10, 1, 9).write(tmp_path / "part-1-of-2")
    assert PeakMemory.read(tmp_path) == PeakMemory("g", 10, 1, 9)
    assert PeakMemory.read(tmp_path / "nowhere") is None


# ----- planned -----

FORM = {"max_input_tokens": 256, "max_label_tokens": 16, "max_rationale_tokens": 128}


def config(folder: Path, **student: Any) -> Config:
    """A Llama of 8B that teaches one of 1B, at the lengths of tests/bench/memory.py."""
    (folder / "teacher").mkdir(parents=True)
    (folder / "teacher" / "config.json").write_text(json.dumps(shape("teacher")))
    values = {
        "name": "mine",
        "task": {"train": "a.jsonl", "test": "b.jsonl", "metric": "text"},
        "teacher": {
            "source": "deepspeed",
            "model": str(folder / "teacher"),
            "batch_size": 64,
            "rationales": {"max_input_tokens": 512, "max_new_tokens": 64},
        },
        "student": {"model": "org/student", "compile": "off", "micro_batch_tokens": 16384, **FORM, **student},
    }
    return validate(values, "file")


def shape(name: str) -> dict[str, Any]:
    sizes = MEASURED["machine"][name]
    keys = {"width": "hidden_size", "neurons": "intermediate_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
    keys |= {"key_value_heads": "num_key_value_heads", "vocabulary": "vocab_size", "tied": "tie_word_embeddings"}
    return {"model_type": "llama", **{keys[key]: value for key, value in sizes.items()}}


def trained(folder: Path, name: str, peak: PeakMemory, rows: int = 100) -> Stage:
    stage = Stage(name, "0" * 12, folder / name, "worker")
    Checkpoint("decoder_only", 1, 4, 40, 40, {}, {"rows": rows}, 256, 16, 128, peak.processes).write(stage.folder)
    (stage.folder / "model").mkdir()
    (stage.folder / "model" / "config.json").write_text(json.dumps(shape("student")))
    peak.write(stage.folder)
    return stage


def taught(folder: Path, peak: PeakMemory, rows: int = 1000, **made: Any) -> Stage:
    stage = Stage("teach", "0" * 12, folder / "teach", "worker")
    Records({"train": rows, "test": 10}, {}, {}, **{"sharding": "replica", "processes": peak.processes, **made}).write(stage.folder)
    peak.write(stage.folder)
    return stage


def one(config: Config, stage: Stage) -> StagePeak:
    [found] = stage_peaks(config, {stage.name: stage})
    return found


@pytest.mark.parametrize(
    ("case", "processes", "batch_size", "changes", "layout"),
    [
        ("alone", 1, 24, {}, "ZeRO-0, bf16"),
        ("alone, graphs", 1, 24, {"compile": "graphs"}, "ZeRO-0, bf16, recorded passes"),
        ("alone, checkpointing", 1, 24, {"activation_checkpointing": True}, "ZeRO-0, bf16"),
        ("zero1", 2, 96, {}, "ZeRO-1, bf16"),
        ("zero2", 2, 96, {"zero_stage": 2}, "ZeRO-2, bf16"),
        ("zero3", 2, 96, {"zero_stage": 3}, "ZeRO-3, bf16"),
        ("zero1, 4096 tokens", 2, 24, {"micro_batch_tokens": 4096}, "ZeRO-1, bf16"),
    ],
)
def test_a_training_is_set_against_the_plan_of_its_layout(
    case: str, processes: int, batch_size: int, changes: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    """24 rows of a label and a rationale are a forward of 15,744 tokens; the bench had 25 in one, a token less each."""
    stage = trained(tmp_path, "train.step_by_step", PeakMemory(GPU, GPU_BYTES, processes, PEAKS[case]))
    found = one(config(tmp_path, batch_size=batch_size, **changes), stage)
    assert (found.stage, found.device, found.processes, found.layout) == ("train.step_by_step", GPU, processes, layout)
    assert found.measured_bytes == PEAKS[case]
    assert found.planned_bytes is not None and found.ratio is not None
    assert found.ratio == found.measured_bytes / found.planned_bytes == pytest.approx(1.0, abs=0.1)


def test_the_rows_that_were_learnt_tell_whether_passes_were_compiled(tmp_path: Path) -> None:
    """`compile: auto` compiles from 300 steps on."""
    made = config(tmp_path, batch_size=25, compile="auto", epochs=1)
    few = trained(tmp_path / "few", "train.step_by_step", PeakMemory(GPU, GPU_BYTES, 1, 1), rows=25 * 299)
    many = trained(tmp_path / "many", "train.step_by_step", PeakMemory(GPU, GPU_BYTES, 1, 1), rows=25 * 300)
    assert one(made, few).layout == "ZeRO-0, bf16"
    assert one(made, many).layout == "ZeRO-0, bf16, recorded passes"


def test_a_teacher_is_set_against_the_plan_of_how_it_lay(tmp_path: Path) -> None:
    made = config(tmp_path)
    replica = one(made, taught(tmp_path / "a", PeakMemory(GPU, GPU_BYTES, 2, PEAKS["decode, 64"])))
    assert replica.layout == "replica, bf16, 64 requests at once"
    assert replica.ratio == pytest.approx(1.0, abs=0.1)
    model = architecture_of(shape("teacher"))
    tensor = one(made, taught(tmp_path / "b", PeakMemory(GPU, GPU_BYTES, 4, 1), sharding="tensor", tensor_degree=2))
    assert tensor.layout == "tensor over 2, bf16, 64 requests at once"
    assert tensor.planned_bytes == decoding_memory(model, Inference("tensor", 2, prompt=512, new=64, slots=64)).total
    zero3 = one(made, taught(tmp_path / "c", PeakMemory(GPU, GPU_BYTES, 4, 1), sharding="zero3"))
    assert zero3.layout == "zero3 over 4, bf16, 64 requests at once"
    assert zero3.planned_bytes == decoding_memory(model, Inference("zero3", 4, prompt=512, new=64, slots=64)).total


def test_requests_at_once_are_those_that_had_room_or_that_there_were(tmp_path: Path) -> None:
    made = config(tmp_path)
    auto = made.model_copy(update={"teacher": made.teacher.model_copy(update={"batch_size": "auto"})})
    room = most_slots(architecture_of(shape("teacher")), Inference(prompt=512, new=64, scored=0), usable_bytes(24 * 10**9, 1))
    assert 1 < room < 256
    small = one(auto, taught(tmp_path / "a", PeakMemory("L4", 24 * 10**9, 1, 1)))
    assert small.layout == f"replica, bf16, {room} requests at once"
    few = one(made, taught(tmp_path / "b", PeakMemory(GPU, GPU_BYTES, 1, 1), rows=20))
    assert few.layout == "replica, bf16, 20 requests at once"


def test_on_a_cpu_and_of_work_that_is_not_planned_there_is_no_plan(tmp_path: Path) -> None:
    made = config(tmp_path)
    on_cpu = one(made, trained(tmp_path / "a", "train.step_by_step", PeakMemory("cpu", None, 1, 5)))
    assert on_cpu == StagePeak("train.step_by_step", "cpu", 1, "", None, 5, None)
    recovered = one(made, trained(tmp_path / "b", "recover.gguf-q4_0", PeakMemory(GPU, GPU_BYTES, 1, 5)))
    assert recovered == StagePeak("recover.gguf-q4_0", GPU, 1, "", None, 5, None)


def test_stages_without_a_model_here_or_of_an_earlier_version_are_left_out(tmp_path: Path) -> None:
    made = config(tmp_path)
    served = made.model_copy(update={"teacher": made.teacher.model_copy(update={"source": "endpoint"})})
    taught_there = taught(tmp_path, PeakMemory("cpu", None, 1, 5), sharding="endpoint")
    assert stage_peaks(served, {"teach": taught_there}) == []
    (taught_there.folder / MEMORY_FILE).unlink()
    assert stage_peaks(made, {"teach": taught_there}) == []
