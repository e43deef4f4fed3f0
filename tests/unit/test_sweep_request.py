"""What the command line of a sweep may ask for, and the plan that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.sweep_plan import Share, SweepPlan
from launch.sweep_request import read_request
from train.artifacts import TaskFiles

SMALL: dict[str, Any] = {"from_scratch": "t5", "d_model": 16, "layers": 1, "heads": 2}
CONFIG: dict[str, Any] = {
    "name": "mine",
    "seed": 7,
    "task": {"train": "builtin:arithmetic", "test": "builtin:arithmetic", "metric": "number"},
    "teacher": {"source": "deepspeed", "model": SMALL, "tune": {}, "soft_labels": {"k": 8}},
    "student": {"model": SMALL, "loss": {"label": 0.3, "rationale": 0.7}, "epochs": 2},
    "launch": {"device": "cpu"},
}
TASK = TaskFiles("digest", {"train": 9, "test": 2}, {})


def planned(
    folder: Path,
    arms: str = "labels_only,step_by_step",
    *,
    seeds: int = 2,
    grid: Sequence[str] = (),
    fractions: str = "1",
    **sections: dict[str, Any],
) -> SweepPlan:
    config = {key: {**value, **sections.get(key, {})} if isinstance(value, dict) else value for key, value in CONFIG.items()}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(config))
    return read_request(path, (), arms=arms, seeds=seeds, grid=grid, fractions=fractions).plan(TASK, "stepdown sweep mine.yaml")


def test_each_arm_tries_the_same_grid_and_then_trains_every_seed_on_every_share(tmp_path: Path) -> None:
    grid = ["student.learning_rate=1e-4,2e-4", "student.epochs=3,6"]
    plan = planned(tmp_path, grid=grid, fractions="0.25:1,1", seeds=3)
    assert [arm.label for arm in plan.arms] == ["labels_only@gold", "step_by_step@gold"]
    assert plan.shares == [Share(1.0, 3), Share(0.25, 1)]
    for arm in plan.arms:
        tuning = plan.tuning(arm)
        assert [(t.values["student.learning_rate"], t.values["student.epochs"]) for t in tuning] == [
            ("1e-4", "3"),
            ("1e-4", "6"),
            ("2e-4", "3"),
            ("2e-4", "6"),
        ]
        assert {(t.seed, t.fraction, t.scored) for t in tuning} == {(7, 1.0, False)}
        assert [(t.student["learning_rate"], t.student["epochs"]) for t in tuning] == [(1e-4, 3), (1e-4, 6), (2e-4, 3), (2e-4, 6)]
        scored = plan.scored(arm, arm.points[2], plan.shares[0])
        assert [(t.seed, t.fraction, t.scored, t.student["seed"]) for t in scored] == [
            (7, 1.0, True, 7),
            (8, 1.0, True, 8),
            (9, 1.0, True, 9),
        ]
        assert {t.values["student.learning_rate"] for t in scored} == {"2e-4"}
        # The tuning trial of the chosen point is another folder: it has not answered the test split.
        assert scored[0].key not in {t.key for t in tuning}
    assert plan.num_trials == 2 * (4 + 3 + 1)


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    plan = planned(tmp_path, grid=["student.learning_rate=1e-4,2e-4"])
    plan.write(tmp_path)
    assert SweepPlan.read(tmp_path) == plan


def test_a_damaged_plan_is_told(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"arms": 3}')
    with pytest.raises(RuntimeError, match=r"plan\.json cannot be read .*; start the sweep again"):
        SweepPlan.read(tmp_path)


def test_without_a_grid_nothing_is_tuned(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert [plan.tuning(arm) for arm in plan.arms] == [[], []]
    assert plan.num_trials == 4


def test_arms_have_their_losses_and_the_configuration_gives_those_of_its_own_arm(tmp_path: Path) -> None:
    plan = planned(tmp_path, "labels_only,step_by_step,soft_labels,step_by_step_soft,single_task,labels_only@teacher")
    assert [(arm.label, arm.points[0].student["loss"], arm.points[0].student.get("single_task", False)) for arm in plan.arms] == [
        ("labels_only@gold", {"label": 1.0, "rationale": 0.0}, False),
        ("step_by_step@gold", {"label": 0.3, "rationale": 0.7}, False),
        ("soft_labels@gold", {"label": 0.5, "rationale": 0.0, "soft": 0.5}, False),
        ("step_by_step_soft@gold", {"label": 0.5, "rationale": 0.5, "soft": 0.5}, False),
        ("single_task@gold", {"label": 1.0, "rationale": 0.0}, True),
        ("labels_only@teacher", {"label": 1.0, "rationale": 0.0}, False),
    ]
    assert [arm.points[0].student["targets"] for arm in plan.arms] == ["gold"] * 5 + ["teacher"]
    # All but what makes an arm is the same.
    assert {arm.points[0].student["epochs"] for arm in plan.arms} == {2.0}


def test_task_distillation_is_labels_only_on_the_teachers_labels(tmp_path: Path) -> None:
    named, plain = planned(tmp_path, "task_distillation"), planned(tmp_path, "labels_only@teacher")
    assert named == plain
    assert planned(tmp_path, "task_distillation@teacher") == plain


def test_the_student_is_what_the_configuration_says(tmp_path: Path) -> None:
    plan = planned(tmp_path, "labels_only,student,student@gold", student={"targets": "teacher", "loss": {"soft": 0.25}})
    assert [(arm.label, arm.points[0].student["loss"]) for arm in plan.arms] == [
        ("labels_only@teacher", {"label": 1.0, "rationale": 0.0}),
        ("student@teacher", {"soft": 0.25}),
        ("student@gold", {"soft": 0.25}),
    ]


def test_a_divergence_goes_with_every_arm_that_has_soft_labels(tmp_path: Path) -> None:
    loss = {"label": 0.2, "rationale": 0.2, "soft": 0.6, "teacher": "live", "divergence": "jsd", "beta": 0.3}
    plan = planned(tmp_path, "labels_only,soft_labels,step_by_step_soft", student={"loss": loss})
    about = {"teacher": "live", "divergence": "jsd", "beta": 0.3}
    assert [arm.points[0].student["loss"] for arm in plan.arms] == [
        {"label": 1.0, "rationale": 0.0},
        {"label": 0.5, "rationale": 0.0, "soft": 0.5, **about},
        loss,
    ]


def test_a_filter_of_rationales_is_no_fault_of_the_arms_without_them(tmp_path: Path) -> None:
    plan = planned(tmp_path, "labels_only,step_by_step", teacher={"rationales": {"keep": "agreeing"}})
    assert len(plan.arms) == 2


def test_an_arm_that_a_key_of_the_grid_does_not_touch_tries_each_training_once(tmp_path: Path) -> None:
    plan = planned(tmp_path, grid=["student.loss.rationale=0.5,0.9", "student.learning_rate=1e-4,2e-4"])
    assert [len(arm.points) for arm in plan.arms] == [2, 4]
    assert [point.student["loss"]["rationale"] for point in plan.arms[1].points] == [0.5, 0.5, 0.9, 0.9]


def test_values_between_brackets_hold_commas(tmp_path: Path) -> None:
    grid = ["student.lora={rank: 4, alpha: 8},{rank: 8, alpha: 8}"]
    plan = planned(tmp_path, "labels_only", grid=grid)
    assert [point.student["lora"] for point in plan.arms[0].points] == [{"rank": 4, "alpha": 8.0}, {"rank": 8, "alpha": 8.0}]


def test_a_trial_is_known_by_what_it_reads(tmp_path: Path) -> None:
    def keys(**sections: dict[str, Any]) -> set[str]:
        plan = planned(tmp_path, "labels_only", **sections)
        return {trial.key for trial in plan.scored(plan.arms[0], plan.arms[0].points[0], plan.shares[0])}

    first = keys()
    assert len(first) == 2
    assert keys() == first
    # What changes no result changes no key; the same value written otherwise is the same.
    assert keys(student={"micro_batch_tokens": 512, "epochs": 2.0}) == first
    assert keys(student={"epochs": 3}).isdisjoint(first)
    assert keys(teacher={"rationales": {"max_new_tokens": 9}}).isdisjoint(first)
    assert keys(task={"metric": "text"}).isdisjoint(first)
    # Seeds count from the student's own where it has one: 8 and 9 share one with 7 and 8.
    assert len(keys(student={"seed": 8}) & first) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"arms": "labels_only,both"},
            r"--arms names 'both', which is no arm: give some of labels_only, .*, student, each",
        ),
        ({"arms": "labels_only@silver"}, r"--arms names 'labels_only@silver', which is no arm"),
        ({"arms": ""}, r"--arms names '', which is no arm"),
        ({"arms": "task_distillation@gold"}, r"task_distillation learns the teacher's labels: leave @gold out"),
        ({"arms": "labels_only@teacher,task_distillation"}, r"--arms names labels_only@teacher twice: remove one"),
        ({"arms": "step_by_step,student"}, r"--arms names step_by_step@gold and student@gold, which are the same in this configuration"),
        ({"seeds": 0}, r"--seeds is 0: give 1 or more"),
        ({"grid": ["student.learning_rate"]}, r"--grid 'student\.learning_rate' is not of the form student\.KEY=VALUE,VALUE"),
        ({"grid": ["student.learning_rate=1e-4,"]}, r"is not of the form student\.KEY=VALUE,VALUE"),
        ({"grid": ["teacher.model=a,b"]}, r"--grid names teacher\.model, but arms share all but the student"),
        ({"grid": ["student.seed=1,2"]}, r"--grid names student\.seed, which is no value to choose: use --seeds"),
        ({"grid": ["student.data_fraction=0.5,1"]}, r"student\.data_fraction, which is no value to choose: use --fractions"),
        ({"grid": ["student.targets=gold,teacher"]}, r"student\.targets, .*: end an arm's name in @gold or @teacher"),
        ({"grid": ["student.epochs=1,2", "student.epochs=3"]}, r"--grid names student\.epochs twice: give it once"),
        ({"grid": ["student.epochs=1,1"]}, r"--grid names a value of student\.epochs twice"),
        ({"grid": ["student.learning_rat=1,2"]}, r"student\.learning_rat: unknown key; did you mean learning_rate\?"),
        ({"grid": ["student.epochs=0,1"]}, r"student\.epochs: is 0; input should be greater than 0"),
        (
            {"grid": ["student.micro_batch_tokens=64,128"]},
            r"--grid student\.micro_batch_tokens=64,128 has no effect on",
        ),
        ({"arms": "labels_only", "grid": ["student.loss.rationale=0.2,0.4"]}, r"student\.loss\.rationale=0\.2,0\.4 has no effect"),
        ({"fractions": "0"}, r"--fractions holds '0': give shares of the training rows above 0 and up to 1"),
        ({"fractions": "1,1.5"}, r"--fractions holds '1\.5'"),
        ({"fractions": "0.5:0"}, r"--fractions holds '0\.5:0'"),
        ({"fractions": "half"}, r"--fractions holds 'half'"),
        ({"fractions": "1,1.0"}, r"--fractions names 1\.0 twice"),
        ({"launch": {"nodes": 2}}, r"launch\.nodes is 2, but the trials of a sweep run on this machine: set it to 1"),
        ({"student": {"data_fraction": 0.5}}, r"student\.data_fraction is 0\.5, which a sweep sets itself: remove it, and use --fractions"),
        (
            {"arms": "soft_labels", "teacher": {"soft_labels": None}},
            r"--arms: soft_labels@gold:\n  student\.loss\.soft has a weight, but teacher\.soft_labels is missing",
        ),
    ],
)
def test_what_cannot_be_done_is_told_before_any_work(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(tmp_path, **options)
