"""What each stage was planned to hold of a GPU's memory, and what it held. Arithmetic only: imports no torch.

The plan is made anew for what ran: the models as they lie in the stages' folders, the processes and the layout that the stages noted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

from launch.architecture import Architecture, architecture_of
from launch.config import Config
from launch.inference_memory import Inference, most_slots, teacher_memory, with_slots
from launch.ladder import StagePeak
from launch.memory import usable_bytes
from launch.parameters import is_known
from launch.pipeline import ARTIFACT_OF, TEACH, TUNE, Stage
from launch.sizes import CONFIG, sized
from launch.training_memory import Step, training_memory
from launch.workload import inference_of, row_of, step_of
from train.artifacts import Checkpoint, PeakMemory, Records
from train.config import Arm, LossConfig

_Planned = tuple[str, int | None]
"""The layout in words, and bytes of a process; None where `stepdown plan` has no figure for it."""


def stage_peaks(config: Config, done: Mapping[str, Stage]) -> list[StagePeak]:
    """Of all finished stages that held a model in workers and noted their peak.

    Args:
        config: of the run.
        done: its finished stages by name.
    """
    found = []
    for stage in done.values():
        peak = PeakMemory.read(stage.folder)
        if peak is None or (stage.kind == TEACH and config.teacher.source != "deepspeed"):
            continue
        layout, planned = _planned(config, done, stage, peak) if peak.device_bytes is not None else ("", None)
        ratio = peak.peak_bytes / planned if planned else None
        found.append(StagePeak(stage.name, peak.device, peak.processes, layout, planned, peak.peak_bytes, ratio))
    return found


def _planned(config: Config, done: Mapping[str, Stage], stage: Stage, peak: PeakMemory) -> _Planned:
    if stage.kind == TEACH:
        return _teaching(config, done, Records.read(stage.folder), peak)
    assert ARTIFACT_OF[stage.kind] is Checkpoint, stage.name
    made, model = Checkpoint.read(stage.folder), _shape(stage.folder)
    if model is None or stage.kind not in (TUNE, "train"):
        return "", None
    step = _tuning(config, model, made, peak) if stage.kind == TUNE else _training(config, done, stage, model, made, peak)
    passes = ", recorded passes" if step.graphs else ", compiled" if step.compiled else ""
    return f"ZeRO-{step.zero_stage}, {step.precision}{passes}", training_memory(model, step).allocated


def _tuning(config: Config, model: Architecture, made: Checkpoint, peak: PeakMemory) -> Step:
    tune = config.teacher.tune
    assert tune is not None
    row = row_of(tune, LossConfig(label=1.0, rationale=0.0), joint=True)
    return step_of(tune, model, row, peak.processes, on_gpu=True, rows=made.counts.get("rows", 0))


def _training(config: Config, done: Mapping[str, Stage], stage: Stage, model: Architecture, made: Checkpoint, peak: PeakMemory) -> Step:
    student = config.student.of_arm(cast(Arm, stage.detail))
    row = row_of(student, student.loss, joint=student.single_task)
    live = _teacher(config, done) if student.loss.soft and student.loss.teacher == "live" else None
    return step_of(student, model, row, peak.processes, on_gpu=True, rows=made.counts.get("rows", 0), live=live)


def _teaching(config: Config, done: Mapping[str, Stage], made: Records, peak: PeakMemory) -> _Planned:
    """As the teacher lay on the devices, with as many requests at once as there was room for, or were asked for."""
    model, layout = _teacher(config, done), cast(Literal["replica", "tensor", "zero3"], made.sharding)
    assert peak.device_bytes is not None
    if model is None:
        return layout, None
    degree = {"replica": 1, "tensor": made.tensor_degree, "zero3": peak.processes}[layout]
    how = replace(inference_of(config.teacher), sharding=layout, degree=degree)
    how = with_slots(how, _requests(config, model, how, made, usable_bytes(peak.device_bytes, peak.processes)))
    over = f" over {degree}" if degree > 1 else ""
    return f"{layout}{over}, {how.precision}, {how.slots} requests at once", teacher_memory(model, how).allocated


def _requests(config: Config, model: Architecture, how: Inference, made: Records, usable: int) -> int:
    asked = config.teacher.batch_size
    room = most_slots(model, how, usable) if asked == "auto" else asked
    return max(1, min(room, max(made.rows.values()) * config.teacher.rationales.samples))


def _teacher(config: Config, done: Mapping[str, Stage]) -> Architecture | None:
    tuned = _shape(done[TUNE].folder) if TUNE in done else None
    return tuned or sized(config.teacher.model, None, "teacher.model").model


def _shape(folder: Path) -> Architecture | None:
    """Of the model in a stage's folder."""
    path = folder / "model" / CONFIG
    saved = json.loads(path.read_text()) if path.is_file() else {}
    return architecture_of(saved) if is_known(saved) else None
