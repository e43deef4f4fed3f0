"""What each process of a sweep runs: trials, one after another, in one start of torch.

torchrun --standalone --nproc-per-node 1 -m launch.sweep_worker SWEEP_FOLDER ONLY UNTIL

Where the student fits one device (`student.zero_stage` auto or 0) each process takes trials of its own; else all train each trial together.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.tasks import read_task
from launch.config import RESOLVED, Config, load_config
from launch.pipeline import TASK, stages, task_stage
from launch.rundir import writing
from launch.sweep import Limits, State
from launch.sweep_plan import SweepPlan
from launch.worker import has_device, student_inputs
from train.artifacts import TaskFiles
from train.background import Background
from train.progress import StageProgress
from train.signals import STOPPED, Stopped, die_with_parent
from train.student.results import Trial, TrialResult
from train.tracking import Tracker

if TYPE_CHECKING:
    from train.student.trials import TrialRunner
    from train.world import World

_GPU_ANSWERS = 256
"""Test items answered at once on a GPU, unless the configuration says."""


def run_trials(folder: Path, config: Config, world: World, limits: Limits) -> None:
    """Runs what is left of the sweep in a folder, first the trials that choose values, then those that use them."""
    plan = SweepPlan.read(folder)
    together = world.size > 1 and config.student.zero_stage not in ("auto", 0)
    state = State.read(folder, plan)
    # No process may write a trial before all have looked.
    world.barrier()
    before = len(state.done)
    budget = min(plan.num_trials - before, limits.only or plan.num_trials)
    runner = _runner(config, world, together, budget)
    with StageProgress("sweep", plan.num_trials, "trials", enabled=world.is_main) as progress:
        line = _Line(plan, folder, world, progress, world.counter(), before)
        for left in (State.tuning_left, State.scored_left):
            trials = left(state)[:budget]
            budget -= len(trials)
            for trial in _shared(trials, world, limits) if together else _taken(trials, world, limits):
                line.tell(runner.run(trial, folder / trial.key), is_teller=world.is_main or not together)
            world.barrier()
            state = State.read(folder, plan)
            world.barrier()


def _taken(trials: Sequence[Trial], world: World, limits: Limits) -> Iterator[Trial]:
    """The trials that this process takes, each when it asks for one."""
    take = world.counter()
    while (n := take(1) - 1) < len(trials) and not _is_late(limits):
        yield trials[n]


def _shared(trials: Sequence[Trial], world: World, limits: Limits) -> Iterator[Trial]:
    """All trials, for every process; the main one looks at the clock."""
    import torch

    for trial in trials:
        if int(world.sum(torch.tensor(int(world.is_main and _is_late(limits))))):
            return
        yield trial


def _is_late(limits: Limits) -> bool:
    return limits.until is not None and time.time() > limits.until


@dataclass(slots=True)
class _Line:
    """Tells of each trial that ended, and moves the bar."""

    plan: SweepPlan
    folder: Path
    world: World
    progress: StageProgress
    count: Callable[[int], int]
    before: int
    """Trials that were done at the start."""

    def __post_init__(self) -> None:
        self.progress.advance(self.before)

    def tell(self, result: TrialResult, *, is_teller: bool) -> None:
        """One line; `is_teller` on one of the processes that trained it."""
        if not is_teller:
            return
        done = self.before + self.count(1)
        print(f"[{done}/{self.plan.num_trials}] {result.trial}: {_told(result)}", file=sys.stderr, flush=True)
        # Other processes' trials, too, as far as this one has heard.
        self.progress.advance(done - self.progress.done)


def _told(result: TrialResult) -> str:
    if result.failed is not None:
        return f"failed: {result.failed.partition(';')[0]}"
    found = f"validation {result.validation['exact_match']:.1%} at step {result.best_step} of {result.steps}, {result.seconds:.1f} s"
    return found if result.accuracy is None else f"{found}; test {result.accuracy:.1%}"


def _runner(config: Config, world: World, together: bool, num_trials: int) -> TrialRunner:
    from train.student.trials import TrialRunner
    from train.world import World

    task_files = TaskFiles.read(task_stage(config).folder)
    table = stages(config, task_files)
    task = read_task(table[TASK].folder)
    is_chosen = world.device.type == "cpu" or "batch_size" in config.evaluate.model_fields_set
    own = world if together else World(0, 1, world.device)

    def tracker(trial: Trial, folder: Path) -> Callable[[int], Tracker]:
        settings = {"student": trial.student, "key": trial.key}
        name = f"sweep {trial}"
        return lambda step: Tracker(
            folder, config.tracking, group=config.name, job_type=name, settings=settings, enabled=own.is_main, from_step=step
        )

    return TrialRunner(
        student_inputs(config, table, task),
        own,
        seed=config.seed,
        metric=config.task.metric,
        batch_size=config.evaluate.batch_size if is_chosen else _GPU_ANSWERS,
        num_trials=-(-num_trials // (1 if together else world.size)),
        open_tracker=tracker,
    )


def main(arguments: Sequence[str]) -> int:
    """Runs the trials; a fault that a user can mend is told in one line, by the first process that met it."""
    die_with_parent()  # before the imports of torch and DeepSpeed, which take seconds
    from train.engine import start, stop

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    folder = Path(arguments[0])
    config = load_config(folder / RESOLVED)
    if not has_device(config.launch.device):
        return 1
    world = start(config.launch.device)
    tell = world.counter()
    try:
        with writing(folder):
            run_trials(folder, config, world, Limits.read(*arguments[1:]))
    except Stopped:
        return STOPPED
    except (ValueError, RuntimeError) as error:
        # Often all processes meet the same one: they read the same files.
        if not str(error).startswith("stopped because") and tell(1) == 1:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        Background.drain()
    stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
