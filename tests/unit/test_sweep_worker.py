"""Which trials a process of a sweep takes, and when it stops; the training itself is stood in for."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import sweep_worker
from launch.config import Config
from launch.sweep import Limits, State
from launch.sweep_plan import PlannedArm, Point, Share, SweepPlan
from train.progress import StageProgress
from train.student.results import Trial, TrialResult, read_result
from train.world import World

SMALL: dict[str, Any] = {"from_scratch": "t5"}
CONFIG = Config.model_validate(
    {
        "name": "mine",
        "task": {"train": "builtin:arithmetic", "test": "builtin:arithmetic", "metric": "number"},
        "teacher": {"source": "deepspeed", "model": SMALL, "tune": {}},
        "student": {"model": SMALL},
    }
)
POINTS = {label: [Point({"student.epochs": n}, {}, label + n) for n in ("1", "2")] for label in ("a@gold", "b@gold")}
PLAN = SweepPlan(
    "mine", "number", 0, [PlannedArm(label, label[0], "gold", points) for label, points in POINTS.items()], [Share(1.0, 2)], ""
)
ALONE = World(0, 1, torch.device("cpu"))


@dataclass
class Runner:
    """Every trial is better on validation the more epochs it has."""

    told: list[str] = field(default_factory=list)
    after: Callable[[], object] = lambda: None

    def run(self, trial: Trial, folder: Path) -> TrialResult:
        self.told.append(str(trial))
        epochs = int(trial.values["student.epochs"])
        answers = [{"id": "i", "parsed": "1", "correct": True}] if trial.scored else None
        result = TrialResult(trial, None, {"exact_match": 0.1 * epochs, "loss": 1.0}, 1, 1, 0.5, answers=answers)
        result.write(folder)
        self.after()
        return result


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Runner]:
    PLAN.write(tmp_path)

    def started(limits: Limits = Limits(), *, after: Callable[[], object] = lambda: None, config: Config = CONFIG) -> Runner:  # noqa: B008
        runner = Runner(after=after)
        monkeypatch.setattr(sweep_worker, "_runner", lambda *_: runner)
        sweep_worker.run_trials(tmp_path, config, ALONE, limits)
        return runner

    return started


def test_values_are_chosen_and_then_every_seed_is_scored_with_them(run: Callable[..., Runner], capsys: pytest.CaptureFixture[str]) -> None:
    assert run().told == [
        "a@gold epochs=1, seed 0, 100 %",
        "a@gold epochs=2, seed 0, 100 %",
        "b@gold epochs=1, seed 0, 100 %",
        "b@gold epochs=2, seed 0, 100 %",
        "a@gold epochs=2, seed 0, 100 %",
        "b@gold epochs=2, seed 0, 100 %",
        "a@gold epochs=2, seed 1, 100 %",
        "b@gold epochs=2, seed 1, 100 %",
    ]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[1/8] a@gold epochs=1, seed 0, 100 %: validation 10.0% at step 1 of 1, 0.5 s"
    assert lines[7] == "[8/8] b@gold epochs=2, seed 1, 100 %: validation 20.0% at step 1 of 1, 0.5 s; test 100.0%"


def test_a_start_does_so_many_trials_and_the_next_goes_on(run: Callable[..., Runner], capsys: pytest.CaptureFixture[str]) -> None:
    parts = [run(Limits(only=3)).told, run(Limits(only=3)).told, run(Limits(only=3)).told, run().told]
    assert [len(part) for part in parts] == [3, 3, 2, 0]
    assert [trial for part in parts for trial in part] == run_order()
    assert "[4/8] b@gold epochs=2, seed 0" in capsys.readouterr().err


def run_order() -> list[str]:
    tuning = [f"{label} epochs={n}, seed 0, 100 %" for label in POINTS for n in (1, 2)]
    return tuning + [f"{label} epochs=2, seed {seed}, 100 %" for seed in (0, 1) for label in POINTS]


def test_no_trial_begins_after_the_time(run: Callable[..., Runner]) -> None:
    assert run(Limits(until=time.time() - 1)).told == []
    assert len(run(Limits(until=time.time() + 60)).told) == 8


def test_a_process_that_is_killed_leaves_what_it_has_done(run: Callable[..., Runner], tmp_path: Path) -> None:
    done: list[int] = []

    def kill() -> None:
        done.append(1)
        if len(done) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(after=kill)
    assert len(State.read(tmp_path, PLAN).done) == 5
    assert run().told == run_order()[5:]


def test_processes_share_the_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = World.counter(ALONE)
    monkeypatch.setattr(World, "counter", lambda self: shared)
    trials = PLAN.tuning(PLAN.arms[0]) + PLAN.tuning(PLAN.arms[1])
    first, second = (sweep_worker._taken(trials, replace(ALONE, rank=rank, size=2), Limits()) for rank in (0, 1))
    taken = [next(first), next(second), next(second), next(first)]
    assert taken == trials
    assert (list(first), list(second)) == ([], [])


def test_what_failed_is_told_in_short(tmp_path: Path) -> None:
    trial = PLAN.tuning(PLAN.arms[0])[0]
    result = TrialResult(trial, failed="the loss is not finite at step 3 (label nan); nothing was updated from there on")
    result.write(tmp_path)
    assert read_result(tmp_path) == result
    assert sweep_worker._told(result) == "failed: the loss is not finite at step 3 (label nan)"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_training_inside_a_sweep_speaks_through_the_sweeps_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with StageProgress("sweep", 4, "trials") as outer:
        with StageProgress("labels_only, seed 3", 20, "steps") as inner:
            inner.advance(7, "loss 1.250")
            assert outer._bar is not None
            assert outer._bar.tasks[0].fields["note"] == "labels_only, seed 3 7/20 loss 1.250"
            assert inner._bar is None
        outer.advance(1)
        assert outer._bar.tasks[0].completed == 1
    with StageProgress("later", 2, "steps") as later:
        assert later._bar is not None
    assert "sweep (trials)" in terminal.getvalue()


def test_a_training_inside_a_silent_process_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with StageProgress("sweep", 4, "trials", enabled=False), StageProgress("training", 20, "steps") as inner:
        inner.advance(20, "loss 1.250")
    assert terminal.getvalue() == ""
