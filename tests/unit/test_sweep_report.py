"""The state of a sweep, the figures of its table, and how they are told."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from launch import sweep_report
from launch.sweep import Limits, State, find_sweep
from launch.sweep_figures import SweepReport, build
from launch.sweep_plan import PlannedArm, Point, Share, SweepPlan, Targets
from train.significance import paired_bootstrap
from train.student.results import Trial, TrialResult


def arm(kind: str, rates: Sequence[str] = ("1e-4", "2e-4"), targets: Targets = "gold") -> PlannedArm:
    label = f"{kind}@{targets}"
    return PlannedArm(label, kind, targets, [Point({"student.learning_rate": rate}, {}, f"{label}-{rate}") for rate in rates])


PLAN = SweepPlan("mine", "text", 7, [arm("labels_only"), arm("step_by_step")], [Share(1.0, 3), Share(0.25, 2)], "stepdown sweep <mine>")
LABELS, STEPS = PLAN.arms
FULL, QUARTER = PLAN.shares


def ended(
    folder: Path, trial: Trial, *, exact: float = 0.5, loss: float = 1.0, right: str | None = None, failed: str | None = None
) -> None:
    marks = [{"id": f"i{n}", "parsed": "x", "correct": mark == "1"} for n, mark in enumerate(right)] if right is not None else None
    found = {} if failed else {"exact_match": exact, "loss": loss}
    TrialResult(trial, failed, found, 3, 5, 2.0, None, 1, {"rows": 9}, marks).write(folder / trial.key)


def tune(folder: Path, planned: PlannedArm, *figures: tuple[float, float], plan: SweepPlan = PLAN) -> None:
    for trial, (exact, loss) in zip(plan.tuning(planned), figures, strict=True):
        ended(folder, trial, exact=exact, loss=loss)


def score(folder: Path, planned: PlannedArm, point: int, share: Share, *right: str) -> None:
    for trial, marks in zip(PLAN.scored(planned, planned.points[point], share), right, strict=False):
        ended(folder, trial, exact=0.6, right=marks)


def answers(*seeds: str) -> list[list[bool]]:
    return [[mark == "1" for mark in seed] for seed in seeds]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    PLAN.write(tmp_path)
    return tmp_path


def state(folder: Path, plan: SweepPlan = PLAN) -> State:
    return State.read(folder, plan)


# ----- what is done and what comes next -----


def test_tuning_comes_first_and_an_arm_is_scored_once_its_values_are_chosen(folder: Path) -> None:
    empty = state(folder)
    assert [str(trial) for trial in empty.tuning_left()] == [
        "labels_only@gold learning_rate=1e-4, seed 7, 100 %",
        "labels_only@gold learning_rate=2e-4, seed 7, 100 %",
        "step_by_step@gold learning_rate=1e-4, seed 7, 100 %",
        "step_by_step@gold learning_rate=2e-4, seed 7, 100 %",
    ]
    assert (empty.scored_left(), empty.done) == ([], [])
    tune(folder, LABELS, (0.4, 1.0), (0.5, 2.0))
    ended(folder, PLAN.tuning(STEPS)[0])
    half = state(folder)
    assert (len(half.tuning_left()), len(half.done)) == (1, 3)
    assert {trial.label for trial in half.scored_left()} == {"labels_only@gold"}
    assert {trial.values["student.learning_rate"] for trial in half.scored_left()} == {"2e-4"}


def test_all_data_and_every_arm_of_a_seed_come_before_the_next(folder: Path) -> None:
    tune(folder, LABELS, (0.5, 1.0), (0.4, 1.0))
    tune(folder, STEPS, (0.5, 1.0), (0.4, 1.0))
    score(folder, STEPS, 0, FULL, "11")
    left = state(folder).scored_left()
    assert [(trial.label.partition("@")[0], trial.seed, trial.fraction) for trial in left] == [
        ("labels_only", 7, 1.0),
        ("labels_only", 8, 1.0),
        ("step_by_step", 8, 1.0),
        ("labels_only", 9, 1.0),
        ("step_by_step", 9, 1.0),
        ("labels_only", 7, 0.25),
        ("step_by_step", 7, 0.25),
        ("labels_only", 8, 0.25),
        ("step_by_step", 8, 0.25),
    ]
    assert len(state(folder).done) == 5


@pytest.mark.parametrize(
    ("figures", "chosen"),
    [
        (((0.5, 2.0), (0.6, 3.0)), 1),  # more exact matches, at whatever loss
        (((0.5, 2.0), (0.5, 1.0)), 1),  # as many, at a lower loss
        (((0.5, 1.0), (0.5, 1.0)), 0),  # the first of equals
    ],
)
def test_validation_chooses(folder: Path, figures: tuple[tuple[float, float], ...], chosen: int) -> None:
    tune(folder, LABELS, *figures)
    assert state(folder).chosen(LABELS) == LABELS.points[chosen]


def test_a_setting_that_diverged_is_not_chosen(folder: Path) -> None:
    first, second = PLAN.tuning(LABELS)
    ended(folder, first, failed="the loss is not finite at step 1")
    assert state(folder).chosen(LABELS) is None  # the other has not been tried
    ended(folder, second, exact=0.0)
    assert state(folder).chosen(LABELS) == LABELS.points[1]
    ended(folder, second, failed="the loss is not finite at step 2")
    assert state(folder).chosen(LABELS) is None


def test_an_arm_without_a_choice_is_scored_at_once(tmp_path: Path) -> None:
    plan = replace(PLAN, arms=[arm("labels_only", ["1e-4"])])
    assert (state(tmp_path, plan).tuning_left(), len(state(tmp_path, plan).scored_left())) == ([], 5)


# ----- the figures -----


def whole(folder: Path) -> SweepReport:
    """Two arms on all data with three and two seeds; nothing at a quarter."""
    tune(folder, LABELS, (0.5, 1.0), (0.4, 1.0))
    tune(folder, STEPS, (0.4, 1.0), (0.5, 1.0))
    score(folder, LABELS, 0, FULL, "110000", "111000", "100000")
    score(folder, STEPS, 1, FULL, "111100", "111110")
    # Of values that were not chosen: an earlier plan's, which count nowhere.
    score(folder, STEPS, 0, FULL, "000000")
    return build(folder)


def test_a_cell_has_the_mean_and_deviation_of_its_seeds(folder: Path) -> None:
    report = whole(folder)
    labels, steps = report.cells[:2]
    assert (labels.values, steps.values) == ({"student.learning_rate": "1e-4"}, {"student.learning_rate": "2e-4"})
    assert (labels.seeds, steps.seeds, steps.planned) == ([7, 8, 9], [7, 8], 3)
    # 2, 3 and 1 of 6; 4 and 5 of 6.
    assert labels.mean == pytest.approx(1 / 3)
    assert labels.deviation == pytest.approx(1 / 6)
    assert steps.mean == pytest.approx(0.75)
    assert steps.deviation == pytest.approx((2 * (0.5 / 6) ** 2) ** 0.5)
    assert (labels.validations, labels.seconds, labels.rows) == ([0.6, 0.6, 0.6], 2.0, 9)
    assert (report.num_items, report.trials, report.trials_done) == (6, 14, 9)


def test_an_arm_is_compared_with_the_baseline_of_the_same_labels_and_share(folder: Path) -> None:
    labels, steps, *quarter = whole(folder).cells
    assert labels.comparison is None
    assert steps.comparison == paired_bootstrap(answers("110000", "111000", "100000"), answers("111100", "111110"))
    assert steps.comparison is not None
    assert steps.comparison.difference == pytest.approx(0.75 - 1 / 3)
    assert [(cell.fraction, cell.mean, cell.comparison) for cell in quarter] == [(0.25, None, None), (0.25, None, None)]


def test_an_arm_of_other_labels_has_no_baseline_here(tmp_path: Path) -> None:
    plan = replace(PLAN, arms=[arm("labels_only", ["1"]), arm("step_by_step", ["1"], "teacher")], shares=[Share(1.0, 1)])
    plan.write(tmp_path)
    for planned in plan.arms:
        ended(tmp_path, plan.scored(planned, planned.points[0], plan.shares[0])[0], right="10")
    assert [cell.comparison for cell in build(tmp_path).cells] == [None, None]


# ----- in words -----


def told(folder: Path, width: int = 300) -> str:
    stream = io.StringIO()
    sweep_report.write_report(folder, Console(file=stream, width=width))
    return stream.getvalue()


def test_the_table_says_what_is_not_run(folder: Path) -> None:
    whole(folder)
    lines = [" ".join(line.split()) for line in told(folder).splitlines()]
    found = paired_bootstrap(answers("110000", "111000", "100000"), answers("111100", "111110"))
    interval = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    assert lines[:6] == [
        "Arms",
        "Arm Data Chosen Seeds Test accuracy, % Validation Points 95 % interval p",
        "labels_only@gold 100 % learning_rate=1e-4 3 of 3 33.3 ± 16.7 60.0 % - - -",
        f"step_by_step@gold 100 % learning_rate=2e-4 2 of 3 75.0 ± 11.8 60.0 % +41.7 {interval} {found.p_value:.3f}",
        "labels_only@gold 25 % learning_rate=1e-4 0 of 2 not run - - - -",
        "step_by_step@gold 25 % learning_rate=2e-4 0 of 2 not run - - - -",
    ]
    assert "labels_only@gold not run 33.3 ± 16.7 (3)" in lines
    assert "step_by_step@gold learning_rate=2e-4 50.0 % 1.0000 chosen" in lines
    assert "9 of 14 trials are done; their trainings took 18.0 s." in lines
    assert any(line.startswith("step_by_step@gold on 100 % of the data gains 41.7 points against labels_only@gold (95 %") for line in lines)
    assert "Warning: 3 of 4 cells lack 5 of their trainings: the same command goes on with them." in lines


def test_nothing_is_run_yet(folder: Path) -> None:
    text = told(folder)
    assert text.count("not run") == 4 + 4 + 4  # cells, the learning curve and the grid
    assert "0 of 14 trials are done" in text


def test_the_files_hold_the_same(folder: Path) -> None:
    report = whole(folder)
    told(folder)
    values = json.loads((folder / "sweep.json").read_text())
    assert [cell["mean"] for cell in values["cells"]] == [cell.mean for cell in report.cells]
    markdown, html = (folder / "sweep.md").read_text(), (folder / "sweep.html").read_text()
    assert "| labels_only@gold | 100 % | learning_rate=1e-4 | 3 of 3 | 33.3 ± 16.7 | 60.0 % | - | - | - |" in markdown
    assert "stepdown sweep &lt;mine&gt;" in html
    # One point for each arm that was measured, of the shares that were.
    assert html.count("<svg") == 1
    assert "share of the training rows, %" in html


def test_one_share_has_no_curve_and_one_setting_no_tuning(tmp_path: Path) -> None:
    plan = replace(PLAN, arms=[arm("labels_only", ["1"])], shares=[Share(1.0, 1)])
    plan.write(tmp_path)
    assert [section.title for section in sweep_report.page(build(tmp_path)).sections] == ["Arms", "How it was made"]


def test_failures_are_told(folder: Path) -> None:
    tune(folder, LABELS, (0.5, 1.0), (0.4, 1.0))
    for trial in PLAN.tuning(STEPS):
        ended(folder, trial, failed="the loss is not finite at step 2")
    ended(folder, PLAN.scored(LABELS, LABELS.points[0], FULL)[0], failed="the gradient is not finite at step 9")
    text = told(folder)
    assert "Warning: labels_only@gold on 100 % of the data failed with seed 7: the gradient is not finite at step 9" in text
    assert "Warning: step_by_step@gold: every setting of the grid failed, so that nothing is scored; try others." in text
    assert "step_by_step@gold learning_rate=1e-4: the loss is not finite at step 2" in (folder / "sweep.md").read_text()


def test_one_seed_is_told_to_be_one(folder: Path) -> None:
    tune(folder, LABELS, (0.5, 1.0), (0.4, 1.0))
    tune(folder, STEPS, (0.5, 1.0), (0.4, 1.0))
    score(folder, LABELS, 0, FULL, "10")
    score(folder, STEPS, 0, FULL, "11")
    assert "Warning: A comparison of one seed speaks of that trained model alone" in told(folder)


def test_arms_that_tried_fewer_settings_and_single_task_are_explained(tmp_path: Path) -> None:
    plan = replace(PLAN, arms=[arm("labels_only", ["1", "2"]), arm("single_task", ["1", "2", "3"])])
    plan.write(tmp_path)
    text = (told(tmp_path), (tmp_path / "sweep.md").read_text())[1]
    assert "labels\\_only@gold has 2 different settings in this grid, not 3." in text.replace("labels_only", "labels\\_only")
    assert "Validation figures of single_task are of another task" in text


def test_a_narrow_terminal_leaves_columns_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole(folder)
    stream = io.StringIO()
    sweep_report.write_report(folder, Console(file=stream, width=90, force_terminal=True, color_system=None))
    head = stream.getvalue().splitlines()[1]
    assert head.split()[:3] == ["Arm", "Data", "Seeds"]
    assert "Validation" not in head
    assert "Chosen" not in head


# ----- where and how long -----


def test_a_sweep_is_found_by_its_path_or_its_runs_name(folder: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    PLAN.write(runs / "mine" / "sweep")
    assert find_sweep(str(folder)) == folder
    assert find_sweep("mine/sweep", str(runs)) == runs / "mine" / "sweep"
    assert find_sweep("mine", str(runs)) is None


def test_limits_go_to_the_workers_and_back() -> None:
    for limits in (Limits(), Limits(3, 12.5), Limits(only=3), Limits(until=12.5)):
        assert Limits.read(*limits.arguments()) == limits


@pytest.mark.parametrize(
    ("only", "minutes", "message"),
    [(0, None, "--only is 0: give 1 trial or more, or leave it out"), (None, -1.0, "--minutes is -1.0: give a time above 0")],
)
def test_a_limit_leaves_something_to_do(only: int | None, minutes: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits.of(only, minutes)
