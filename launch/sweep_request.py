"""What the command line of a sweep asks for, checked before any work is done. Imports no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.config import Config, load_config, validate
from launch.pipeline import stages
from launch.sweep_plan import PlannedArm, Point, Share, SweepPlan, Targets
from train.artifacts import TaskFiles
from train.config import Arm, LossConfig, StudentConfig

_LOSSES: dict[Arm, dict[str, float]] = {
    "labels_only": {"label": 1.0, "rationale": 0.0},
    "step_by_step": {"label": 0.5, "rationale": 0.5},
    "soft_labels": {"label": 0.5, "rationale": 0.0, "soft": 0.5},
    "step_by_step_soft": {"label": 0.5, "rationale": 0.5, "soft": 0.5},
    "single_task": {"label": 1.0, "rationale": 0.0},
}
STUDENT = "student"
"""The arm that the configuration itself describes."""
_ALIASES = {"task_distillation": "labels_only@teacher"}
_ELSEWHERE = {
    "student.seed": "use --seeds",
    "student.data_fraction": "use --fractions",
    "student.targets": "end an arm's name in @gold or @teacher",
    "student.single_task": "name the arm single_task",
    "student.baselines": "name the arms",
}
"""Keys that the grid does not take, and the way out."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says, checked."""

    config: Config
    points: list[tuple[dict[str, str], Config]]
    """The grid: its values and the configuration with them."""
    arms: list[tuple[str, str, Targets]]
    """Label, kind and targets."""
    students: dict[str, list[StudentConfig]]
    """By label: the arm at every point of the grid."""
    shares: list[Share]

    def plan(self, task: TaskFiles, command: str) -> SweepPlan:
        """The plan, now that the task's rows are known.

        Raises:
            ValueError: if the grid, or an arm, changes nothing that any training reads.
        """
        arms = []
        for label, kind, targets in self.arms:
            arms.append(PlannedArm(label, kind, targets, [self._point(n, label, task) for n in range(len(self.points))]))
        _check_grid(arms)
        _check_differ(arms)
        first_seed = self.config.seed if self.config.student.seed is None else self.config.student.seed
        arms = [replace(arm, points=_distinct(arm.points)) for arm in arms]
        return SweepPlan(self.config.name, self.config.task.metric, first_seed, arms, self.shares, command)

    def _point(self, n: int, label: str, task: TaskFiles) -> Point:
        (values, config), student = self.points[n], self.students[label][n]
        table = stages(config.model_copy(update={"student": student}), task)
        return Point(values, student.model_dump(mode="json", exclude_unset=True), table[f"train.{student.arm}"].key)


def read_request(path: Path, overrides: Sequence[str], *, arms: str, seeds: int, grid: Sequence[str], fractions: str) -> Asked:
    """Checks what is asked for, before any work is done.

    Args:
        path: the configuration.
        overrides: of its keys, `key.sub=value`.
        arms: names with commas between, each with @gold or @teacher at its end or neither.
        seeds: of each cell whose share of the data does not give its own number.
        grid: each `student.KEY=VALUE,VALUE`; their product is tried.
        fractions: shares of the training rows with commas between, each `SHARE` or `SHARE:SEEDS`.

    Raises:
        ValueError: for what the user wrote.
    """
    config = load_config(path, overrides)
    if config.student.prune is not None:
        raise ValueError("student.prune has no effect in a sweep, which compares students before they are pruned: remove it")
    if config.launch.nodes > 1:
        raise ValueError(f"launch.nodes is {config.launch.nodes}, but the trials of a sweep run on this machine: set it to 1")
    if config.student.data_fraction != 1.0:
        share = config.student.data_fraction
        raise ValueError(f"student.data_fraction is {share:g}, which a sweep sets itself: remove it, and use --fractions")
    points = [(values, load_config(path, [*overrides, *(f"{k}={v}" for k, v in values.items())])) for values in _product(grid)]
    named = list(_arms(arms, config))
    students = {label: [_student(label, kind, targets, at) for _, at in points] for label, kind, targets in named}
    return Asked(config, points, named, students, _shares(fractions, seeds))


def _arms(text: str, config: Config) -> Iterator[tuple[str, str, Targets]]:
    known = [*_LOSSES, *_ALIASES, STUDENT]
    seen: set[str] = set()
    for name in (part.strip() for part in text.split(",")):
        kind, at, targets = name.partition("@")
        if kind not in known or (at and targets not in ("gold", "teacher")):
            listed = ", ".join(known)
            raise ValueError(
                f"--arms names {name!r}, which is no arm: give some of {listed}, each with @gold or @teacher at its end or without"
            )
        if kind in _ALIASES:
            kind, _, learnt = _ALIASES[kind].partition("@")
            if targets not in ("", learnt):
                raise ValueError(f"--arms names {name!r}, but {name.partition('@')[0]} learns the teacher's labels: leave @{targets} out")
            targets = learnt
        whose: Targets = "teacher" if (targets or config.student.targets) == "teacher" else "gold"
        label = f"{kind}@{whose}"
        if label in seen:
            raise ValueError(f"--arms names {label} twice: remove one")
        seen.add(label)
        yield label, kind, whose


def _student(label: str, kind: str, targets: Targets, config: Config) -> StudentConfig:
    """An arm's section of the configuration; the weights of its loss are the configuration's where that describes such an arm."""
    base = config.student.model_dump(mode="json", exclude_unset=True)
    values = {key: value for key, value in base.items() if f"{STUDENT}.{key}" not in _ELSEWHERE and key != "loss"} | {"targets": targets}
    if kind in (STUDENT, config.student.arm):
        values |= {key: base[key] for key in ("loss", "single_task") if key in base}
    else:
        loss: dict[str, Any] = dict(next(weights for arm, weights in _LOSSES.items() if arm == kind))
        if loss.get("soft"):
            loss |= {key: value for key, value in base.get("loss", {}).items() if key not in ("label", "rationale", "soft")}
        values |= {"loss": loss, **({"single_task": True} if kind == "single_task" else {})}
    # The whole configuration is checked with the arm in it. What only other arms need is no fault: they are named as baselines.
    own = "labels_only" if kind == "labels_only" else LossConfig.model_validate(values.get("loss", {})).arm
    others = [arm for arm in ("labels_only", "step_by_step") if arm != own]
    whole = {**config.model_dump(mode="json", exclude_unset=True), STUDENT: {**values, "baselines": others}}
    return validate(whole, f"--arms: {label}").student.model_copy(update={"baselines": []})


def _product(grid: Sequence[str]) -> list[dict[str, str]]:
    axes: dict[str, list[str]] = {}
    for text in grid:
        key, separator, values = text.partition("=")
        listed = [value.strip() for value in _split(values)]
        if not separator or not all(listed):
            raise ValueError(f"--grid {text!r} is not of the form student.KEY=VALUE,VALUE")
        if key in _ELSEWHERE:
            raise ValueError(f"--grid names {key}, which is no value to choose: {_ELSEWHERE[key]}")
        if not key.startswith(f"{STUDENT}."):
            raise ValueError(f"--grid names {key}, but arms share all but the student: give student.KEY=VALUE,VALUE")
        if key in axes or len(set(listed)) < len(listed):
            raise ValueError(f"--grid names {key if key in axes else f'a value of {key}'} twice: give it once, with commas between values")
        axes[key] = listed
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _split(text: str) -> list[str]:
    """Values between commas that stand outside brackets."""
    return re.split(r",(?![^\[{]*[\]}])", text)


def _shares(text: str, seeds: int) -> list[Share]:
    if seeds < 1:
        raise ValueError(f"--seeds is {seeds}: give 1 or more; a deviation needs 2, a comparison of arms 4 or so")
    shares: dict[float, Share] = {}
    for part in text.split(","):
        fraction, _, own = part.strip().partition(":")
        try:
            share = Share(float(fraction), int(own) if own else seeds)
        except ValueError:
            share = Share(0.0, 0)
        if not 0.0 < share.fraction <= 1.0 or share.seeds < 1:
            raise ValueError(
                f"--fractions holds {part.strip()!r}: give shares of the training rows above 0 and up to 1, such as 0.25,1, or with seeds "
                "of their own, 0.25:2,1:4"
            )
        if share.fraction in shares:
            raise ValueError(f"--fractions names {fraction} twice: remove one")
        shares[share.fraction] = share
    return sorted(shares.values(), key=lambda share: -share.fraction)


def _check_grid(arms: Sequence[PlannedArm]) -> None:
    for name in arms[0].points[0].values:
        if not any(_tells_apart(name, arm.points) for arm in arms):
            tried = ",".join(dict.fromkeys(point.values[name] for point in arms[0].points))
            raise ValueError(f"--grid {name}={tried} has no effect on what any arm learns: remove it, or name an arm that uses it")


def _tells_apart(name: str, points: Sequence[Point]) -> bool:
    """Whether two points that differ in this value only are different trainings."""
    keys: dict[tuple[str, ...], set[str]] = {}
    for point in points:
        rest = tuple(value for key, value in point.values.items() if key != name)
        keys.setdefault(rest, set()).add(point.key)
    return any(len(found) > 1 for found in keys.values())


def _distinct(points: Sequence[Point]) -> list[Point]:
    """The first of each training."""
    first: dict[str, Point] = {}
    for point in points:
        first.setdefault(point.key, point)
    return list(first.values())


def _check_differ(arms: Sequence[PlannedArm]) -> None:
    for first, second in itertools.combinations(arms, 2):
        if [point.key for point in first.points] == [point.key for point in second.points]:
            raise ValueError(f"--arms names {first.label} and {second.label}, which are the same in this configuration: remove one")
