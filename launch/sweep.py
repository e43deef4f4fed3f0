"""Arms of one student side by side: tuned alike on validation, then scored once on the test split over several seeds. Imports no torch.

    stepdown sweep configs/cqa.yaml --arms labels_only,step_by_step --seeds 4 --grid student.learning_rate=5e-5,1e-4,2e-4,4e-4

Every trial is a folder OUTPUT/NAME/sweep/KEY, KEY a hash of what it reads; `trial.json` in it says that it is done. The same command goes
on where it was stopped, and a longer one (more arms, seeds, shares of the data) takes over the trials that it shares with an earlier one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from launch.config import RESOLVED, Config, dump_config
from launch.hardware import cpu_count
from launch.local import end_of, num_processes, run_pipeline, supervise, worker_environment
from launch.rundir import locked, run_folder, writing
from launch.sweep_plan import PLAN, PlannedArm, Point, SweepPlan
from launch.sweep_request import Asked
from train.student.results import Trial, TrialResult, read_result

SWEEP = "sweep"
"""A sweep's folder, in that of its run."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Where this start of a sweep ends, with the rest left for the next."""

    only: int | None = None
    """Most trials."""
    until: float | None = None
    """Seconds since the epoch after which no trial begins."""

    @classmethod
    def of(cls, only: int | None, minutes: float | None) -> Limits:
        """From the command line.

        Raises:
            ValueError: if a limit leaves nothing to do.
        """
        for name, value, least in (("--only", only, "1 trial or more"), ("--minutes", minutes, "a time above 0")):
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}: give {least}, or leave it out")
        return cls(only, None if minutes is None else time.time() + 60 * minutes)

    def arguments(self) -> list[str]:
        """As the worker reads them."""
        return [str(value) if value is not None else "-" for value in (self.only, self.until)]

    @classmethod
    def read(cls, only: str, until: str) -> Limits:
        """What `arguments` wrote."""
        return cls(None if only == "-" else int(only), None if until == "-" else float(until))


@dataclass(frozen=True, slots=True)
class State:
    """A plan, and the trials of it that are done."""

    plan: SweepPlan
    results: dict[str, TrialResult]
    """By the trial's key."""

    @classmethod
    def read(cls, folder: Path, plan: SweepPlan) -> State:
        """Looks for the plan's trials in a sweep's folder."""
        state = cls(plan, {})
        keys = [trial.key for arm in plan.arms for point in arm.points for trial in (*plan.tuning(arm), *_cells(plan, arm, point))]
        for key in dict.fromkeys(keys):
            if (result := read_result(folder / key)) is not None:
                state.results[key] = result
        return state

    def chosen(self, arm: PlannedArm) -> Point | None:
        """The setting that an arm's scored trials use: most exact matches on validation, then the least loss, then the first.

        None until every point has been tried, and where every one failed.
        """
        if not arm.is_tuned:
            return arm.points[0]
        tried = [self.results.get(trial.key) for trial in self.plan.tuning(arm)]
        if None in tried:
            return None
        ended = [(n, result) for n, result in enumerate(tried) if result is not None and result.failed is None]
        ranked = sorted((-result.validation["exact_match"], result.validation["loss"], n) for n, result in ended)
        return arm.points[ranked[0][2]] if ranked else None

    def tuning_left(self) -> list[Trial]:
        """Trials that choose values and are not done, in the order of the arms."""
        return self._left([trial for arm in self.plan.arms for trial in self.plan.tuning(arm)])

    def scored_left(self) -> list[Trial]:
        """Trials to score that are not done, of the arms whose values are chosen: all data first, one seed of every arm after another."""
        chosen = [(arm, point) for arm in self.plan.arms if (point := self.chosen(arm)) is not None]
        cells = [[self.plan.scored(arm, point, share) for arm, point in chosen] for share in self.plan.shares]
        return self._left([trial for arms in cells for seeds in zip(*arms, strict=True) for trial in seeds])

    @property
    def done(self) -> list[TrialResult]:
        """Trials of the plan that are done, with the values now chosen; of an arm without a choice those that tried to make it."""
        scored = [(arm, point) for arm in self.plan.arms if (point := self.chosen(arm)) is not None]
        trials = [trial for arm in self.plan.arms for trial in self.plan.tuning(arm)]
        trials += [trial for arm, point in scored for trial in _cells(self.plan, arm, point)]
        return [self.results[trial.key] for trial in trials if trial.key in self.results]

    def _left(self, trials: Sequence[Trial]) -> list[Trial]:
        return [trial for trial in trials if trial.key not in self.results]


def _cells(plan: SweepPlan, arm: PlannedArm, point: Point) -> list[Trial]:
    return [trial for share in plan.shares for trial in plan.scored(arm, point, share)]


def run_sweep(asked: Asked, console: Console, limits: Limits, command: str) -> Path:
    """Has the teacher write what is missing, then runs the trials that are not done.

    Args:
        asked: what to compare.
        console: where the pipeline's stages are told.
        limits: of this start.
        command: as the user typed it.

    Returns:
        The sweep's folder.

    Raises:
        ValueError: for what the user wrote.
        RuntimeError: for what the world refused, or a worker that failed (its message stands above).
    """
    config = asked.config
    task = run_pipeline(config, console, until="teach")[0].artifact
    plan = asked.plan(task, command)
    folder = run_folder(config) / SWEEP
    with locked(folder), writing(folder):
        # The workers read this, not the run's own copy, which another command may change meanwhile.
        temporary = folder / f".{RESOLVED}"
        temporary.write_text(dump_config(config))
        temporary.replace(folder / RESOLVED)
        plan.write(folder)
        state = State.read(folder, plan)
        if state.tuning_left() or state.scored_left():
            _run_workers(folder, config, limits)
    return folder


def _run_workers(folder: Path, config: Config, limits: Limits) -> None:
    processes = num_processes(config)
    status = supervise(worker_command(folder, processes, limits), worker_environment(processes, cpu_count(), config.launch.device))
    if status:
        raise end_of("the worker", status, kept="the trials that are done are")


def worker_command(folder: Path, processes: int, limits: Limits) -> list[str]:
    """The command line that runs a sweep's trials under torchrun."""
    torchrun = ["--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, "-m", "launch.agent", *torchrun, "-m", "launch.sweep_worker", str(folder), *limits.arguments()]


def find_sweep(name: str, output: str = "runs") -> Path | None:
    """The folder of a sweep given by its path, or as RUN/sweep; None where there is none."""
    return next((folder for folder in (Path(name), Path(output) / name) if (folder / PLAN).is_file()), None)
