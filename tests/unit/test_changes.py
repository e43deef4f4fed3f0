"""What is told of a run that goes on with another configuration."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from launch.changes import Earlier, told_changes
from launch.config import Config, validate
from launch.pipeline import Stage
from launch.rundir import VALUES_FILE, write_stages

SMALL: dict[str, Any] = {"from_scratch": "t5", "d_model": 16, "layers": 1, "heads": 2, "vocabulary": 300}
CONFIG: dict[str, Any] = {
    "name": "mine",
    "task": {"train": "a.jsonl", "test": "b.jsonl", "metric": "text"},
    "teacher": {"source": "deepspeed", "model": SMALL, "tune": {}},
    "student": {"model": SMALL, "learning_rate": 0.002, "baselines": ["labels_only"]},
}
STAGES = ["task", "tune", "teach", "train.labels_only", "train.step_by_step", "deploy.ctranslate2-int8"]
ANEW = ("train.labels_only", "train.step_by_step", "deploy.ctranslate2-int8")


def config(**sections: dict[str, Any]) -> Config:
    values = copy.deepcopy(CONFIG)
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    return validate(values, "file")


def table(folder: Path, key: str, *, anew: tuple[str, ...] = ()) -> list[Stage]:
    keys = {name: key if name in anew else "a" * 12 for name in STAGES}
    return [Stage(name, keys[name], folder / f"{name}-{keys[name]}", "worker") for name in STAGES]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was finished."""
    (tmp_path / VALUES_FILE).write_text(json.dumps(config().model_dump(mode="json")))
    stages = table(tmp_path, "a" * 12)
    for stage in stages:
        stage.folder.mkdir()
    write_stages(tmp_path, {stage.name: stage.folder for stage in stages})
    return tmp_path


def told_of(run: Path, now: Config, anew: tuple[str, ...]) -> str | None:
    stages = table(run, "b" * 12, anew=anew)
    return told_changes(Earlier.read(run), now, stages, [stage for stage in stages if stage.name not in anew])


def test_the_keys_and_what_hangs_on_them_are_told_in_one_line(run: Path) -> None:
    assert told_of(run, config(student={"learning_rate": 0.001}), ANEW) == (
        "changed since the last run here: student.learning_rate 0.002 -> 0.001. Runs anew: train.*, deploy.ctranslate2-int8; kept: task, "
        "tune, teach. Nothing made before is deleted."
    )


def test_of_a_kind_of_which_some_are_kept_each_is_named(run: Path) -> None:
    line = told_of(run, config(student={"loss": {"label": 0.7, "rationale": 0.3}}), ANEW[1:])
    assert line == (
        "changed since the last run here: student.loss.label 0.5 -> 0.7, student.loss.rationale 0.5 -> 0.3. Runs anew: train.step_by_step, "
        "deploy.ctranslate2-int8; kept: task, tune, teach, train.labels_only. Nothing made before is deleted."
    )


def test_keys_that_no_result_hangs_on_are_not_told(run: Path) -> None:
    now = config(student={"epochs": 3, "micro_batch_tokens": 512}, launch={"cpu_processes": 2}, tracking={"wandb": "disabled"})
    line = told_of(run, now, ANEW)
    assert line is not None and "student.epochs 10.0 -> 3.0. Runs anew" in line
    assert all(key not in line for key in ("micro_batch_tokens", "launch", "tracking"))


def test_a_section_in_place_of_a_value_a_long_value_and_many_keys(run: Path) -> None:
    (run / VALUES_FILE).write_text(json.dumps(config().model_dump(mode="json") | {"task": {"train": "x" * 60}}))
    line = told_of(run, config(student={"model": "org/name"}), ANEW)
    assert line is not None and f"task.train {'x' * 37}... -> a.jsonl" in line
    assert line.partition(". Runs anew")[0].endswith("more") and line.count(" -> ") == 5


def test_changed_files_are_told_where_no_key_is(run: Path) -> None:
    line = told_of(run, config(), tuple(STAGES))
    assert line == (
        "changed since the last run here: files that the configuration names, or the program. Runs anew: task, tune, teach, train.*, "
        "deploy.ctranslate2-int8. Nothing made before is deleted."
    )


def test_nothing_is_told_where_nothing_begins_again(run: Path, tmp_path: Path) -> None:
    assert told_of(run, config(deploy={"license": "mit"}), ()) is None
    stages = table(run, "a" * 12)
    assert told_changes(Earlier.read(run), config(), stages, []) is None, "the same stages go on"
    assert told_changes(Earlier.read(tmp_path / "new"), config(), stages, []) is None
    (run / "deploy.ctranslate2-int8-aaaaaaaaaaaa").rmdir()
    assert told_of(run, config(), ANEW[2:]) is None, "it had not begun"
    (run / VALUES_FILE).write_text("{")
    assert Earlier.read(run) is None
