"""What can be told before hours are spent: models that are not where they should be, or do not fit the GPUs here. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection

from launch.config import Config
from launch.hardware import detect, memory_bytes
from launch.plan import gigabytes, hosts_hold
from launch.planning import Devices, TrainingPart, plan_run
from train.places import locate


def check_models(config: Config, kinds: Collection[str]) -> None:
    """That the models which stages of these kinds read are there, as far as their names tell; asks no network.

    Raises:
        ValueError: if a path leads nowhere.
        RuntimeError: if a package that is needed is not installed.
    """
    teacher, student = config.teacher, config.student.model
    if {"tune", "teach"} & set(kinds) and teacher.source in ("deepspeed", "vllm") and isinstance(teacher.model, str):
        locate(teacher.model, "teacher.model")
    if "train" in kinds and isinstance(student, str):
        locate(student, "student.model")


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
