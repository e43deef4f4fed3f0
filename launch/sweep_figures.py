"""The figures of a sweep's table, from the files in its folder. Imports no torch."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.sweep import State
from launch.sweep_plan import PlannedArm, Share, SweepPlan
from train.significance import PairedBootstrap, paired_bootstrap
from train.student.results import TrialResult

BASELINE = "labels_only"
"""The arm that others are compared with, where it learns the same labels from as many rows."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm at one share of the data."""

    label: str
    arm: str
    targets: str
    fraction: float
    values: dict[str, str] | None
    """The grid's values that validation chose; None where they are not chosen yet."""
    planned: int
    """Seeds."""
    seeds: list[int]
    """Those that came to an end."""
    accuracies: list[float]
    """On the test split, of each of these seeds."""
    mean: float | None
    """Of the accuracies."""
    deviation: float | None
    """Standard deviation over seeds; None below two."""
    validations: list[float]
    """Exact matches, of each of these seeds."""
    seconds: float | None
    """Mean time of a training."""
    rows: int | None
    """That each learnt."""
    failures: list[str]
    """Why the others did not."""
    comparison: PairedBootstrap | None = None
    """With the baseline; None for the baseline, and where either is not run."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One setting that an arm tried."""

    label: str
    values: dict[str, str]
    exact_match: float | None
    """On validation; None where it is not run, or failed."""
    loss: float | None
    failed: str | None
    chosen: bool
    done: bool


@dataclass(frozen=True, slots=True)
class SweepReport:
    """Everything that is shown."""

    name: str
    folder: str
    command: str
    metric: str
    num_items: int | None
    cells: list[Cell]
    tried: list[Tried]
    trials: int
    trials_done: int
    seconds: float
    """Of all trainings."""


def build(folder: Path) -> SweepReport:
    """Reads a sweep's folder.

    Raises:
        RuntimeError: if a file in it is damaged.
    """
    plan = SweepPlan.read(folder)
    state = State.read(folder, plan)
    cells, answers = [], {}
    for share in plan.shares:
        for arm in plan.arms:
            done = _results(state, arm, share)
            cells.append(_cell(state, arm, share, done))
            answers[arm.label, share.fraction] = [_right(result) for result in done if result.answers is not None]
    return SweepReport(
        name=plan.name,
        folder=str(folder),
        command=plan.command,
        metric=plan.metric,
        num_items=next((len(seeds[0]) for seeds in answers.values() if seeds), None),
        cells=[dataclasses.replace(cell, comparison=_compared(cell, answers)) for cell in cells],
        tried=[tried for arm in plan.arms for tried in _tried(state, arm)],
        trials=plan.num_trials,
        trials_done=len(state.done),
        seconds=sum(result.seconds for result in state.done),
    )


def _results(state: State, arm: PlannedArm, share: Share) -> list[TrialResult]:
    point = state.chosen(arm)
    trials = [] if point is None else state.plan.scored(arm, point, share)
    return [state.results[trial.key] for trial in trials if trial.key in state.results]


def _cell(state: State, arm: PlannedArm, share: Share, done: Sequence[TrialResult]) -> Cell:
    point = state.chosen(arm)
    ended = [result for result in done if result.failed is None]
    accuracies = [accuracy for result in ended if (accuracy := result.accuracy) is not None]
    return Cell(
        label=arm.label,
        arm=arm.arm,
        targets=arm.targets,
        fraction=share.fraction,
        values=None if point is None else point.values,
        planned=share.seeds,
        seeds=[result.trial.seed for result in ended],
        accuracies=accuracies,
        mean=statistics.fmean(accuracies) if accuracies else None,
        deviation=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        validations=[result.validation["exact_match"] for result in ended],
        seconds=statistics.fmean(result.seconds for result in ended) if ended else None,
        rows=ended[0].counts.get("rows") if ended else None,
        failures=[f"seed {result.trial.seed}: {result.failed}" for result in done if result.failed is not None],
    )


def _right(result: TrialResult) -> list[bool]:
    return [bool(answer["correct"]) for answer in result.answers or ()]


def _compared(cell: Cell, answers: Mapping[tuple[str, float], list[list[bool]]]) -> PairedBootstrap | None:
    base, own = answers.get((f"{BASELINE}@{cell.targets}", cell.fraction)), answers[cell.label, cell.fraction]
    return paired_bootstrap(base, own) if base and own and cell.arm != BASELINE else None


def _tried(state: State, arm: PlannedArm) -> list[Tried]:
    chosen = state.chosen(arm)
    found = []
    for point, trial in zip(arm.points, state.plan.tuning(arm), strict=False):  # an arm without a choice tries nothing
        result = state.results.get(trial.key)
        ended = result is not None and result.failed is None
        found.append(
            Tried(
                arm.label,
                point.values,
                result.validation["exact_match"] if result is not None and ended else None,
                result.validation["loss"] if result is not None and ended else None,
                None if result is None else result.failed,
                chosen is not None and point.key == chosen.key,
                result is not None,
            )
        )
    return found
