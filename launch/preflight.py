"""What can be told before hours are spent: models that are not there or do not fit, rows that lack a teacher's words. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from data.tasks import read_task
from launch.config import Config
from launch.hardware import detect, memory_bytes
from launch.hub import check_hub
from launch.plan import gigabytes, hosts_hold
from launch.planning import Devices, TrainingPart, plan_run
from train.config import CutModel, ModelSource, ScratchModel
from train.places import locate
from train.teacher.recorded import check_fields


def check_models(config: Config, kinds: Collection[str]) -> None:
    """That the models which stages of these kinds read are there: the hub is asked for those that are neither here nor in its cache.

    Raises:
        ValueError: if a path leads nowhere, or the hub does not give a model.
        RuntimeError: if a package that is needed is not installed, or the hub cannot be asked.
    """
    teacher, student = config.teacher, config.student
    runs_here = teacher.source in ("deepspeed", "vllm") and bool({"tune", "teach"} & set(kinds))
    # A student may be made of its teacher, which lies in a folder of the run where it was tuned.
    is_source = "train" in kinds and teacher.tune is None and isinstance(student.model, CutModel)
    if "teach" in kinds and teacher.source == "vllm" and find_spec("vllm") is None:
        raise RuntimeError(
            "teacher.source is vllm, but the package vllm is not installed: pip install vllm, in an environment of its own if it asks for "
            "another torch; or serve the model with `vllm serve` and set source to endpoint"
        )
    if runs_here or is_source:
        _check_model(teacher.model, "teacher.model")
    if "train" in kinds:
        _check_model(student.model, "student.model")


def _check_model(source: ModelSource | None, key: str) -> None:
    if isinstance(source, str):
        check_hub(locate(source, key), key)
    elif isinstance(source, ScratchModel) and source.tokenizer is not None:
        key = f"{key}.tokenizer"
        check_hub(locate(source.tokenizer, key), key, is_tokenizer=True)


def check_recorded(config: Config, kinds: Collection[str], task_folder: Path) -> None:
    """That every row has what a recorded teacher's templates name, where its records are still to be made.

    Args:
        config: of the run.
        kinds: of the stages that are to run.
        task_folder: of the task's canonical rows.

    Raises:
        ValueError: if a template is malformed, or names a field that a row lacks.
    """
    if "teach" in kinds and config.teacher.source == "recorded":
        task = read_task(task_folder)
        for examples in (task.train, task.test):
            check_fields(config.teacher, examples, config.task.choices_field)


def check_fits(config: Config, kinds: Collection[str]) -> None:
    """That the GPUs here hold what stages of these kinds work on, by the plan; without GPUs, or of an unknown size, nothing is said.

    Raises:
        ValueError: if a model does not fit, however it is laid out.
    """
    if config.launch.device == "cpu" or not detect():
        return
    made = plan_run(config)
    if "tune" in kinds and made.tuning is not None:
        _check_training(made.tuning, made.devices, "teacher.model", "tune")
    if "teach" in kinds and config.teacher.source == "deepspeed" and made.teacher is not None and not made.teacher.plan.fits:
        offloads = config.teacher.sharding == "auto" and hosts_hold(made.teacher.parameters, made.devices.nodes, memory_bytes())
        if not offloads:
            raise ValueError(f"teacher.model does not fit: {made.teacher.plan.why} (`stepdown plan` says more)")
    if "train" in kinds and made.student is not None:
        _check_training(made.student, made.devices, "student.model", "train")


def _check_training(part: TrainingPart, devices: Devices, key: str, verb: str) -> None:
    if part.plan.fits or devices.usable_bytes is None:
        return
    place = f"each of {devices.processes} GPUs ({devices.name})" if devices.processes > 1 else f"one GPU ({devices.name})"
    raise ValueError(
        f"{key} does not fit: to {verb} {part.parameters:,} parameters takes {gigabytes(part.plan.memory.total)} on {place} of "
        f"{gigabytes(devices.usable_bytes)} usable, and no other layout, batch or offloading makes it fit: use a smaller model, or more or "
        "larger GPUs (`stepdown plan` says how many)"
    )
