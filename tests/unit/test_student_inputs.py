"""What the worker hands to the student's stage."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data.tasks import Task, read_task
from launch.config import Config, validate
from launch.local import run_pipeline
from launch.pipeline import stages
from launch.worker import student_inputs
from train.artifacts import TaskFiles
from train.student.stage import StudentInputs

SMALL: dict[str, Any] = {"from_scratch": "t5", "d_model": 16, "layers": 1, "heads": 2}
CONFIG: dict[str, Any] = {
    "name": "mine",
    "task": {
        "train": "builtin:arithmetic",
        "validation": "builtin:arithmetic",
        "test": "builtin:arithmetic",
        "metric": "number",
        "arithmetic": {"train_rows": 6, "validation_rows": 3, "test_rows": 2},
    },
    "teacher": {"source": "recorded", "label": "{label}", "rationale": "So: {rationale}"},
    "student": {"model": SMALL, "single_task": True, "loss": {"label": 1, "rationale": 0}},
}


def config(**sections: Any) -> Config:
    return validate({**copy.deepcopy(CONFIG), **sections}, "file")


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.chdir(tmp_path)
    return read_task(run_pipeline(config(), Console(quiet=True), until="task")[0].stage.folder)


def inputs(made: Config, task: Task) -> StudentInputs:
    return student_inputs(made, stages(made, TaskFiles("digest", {}, {})), task)


def test_a_recorded_teacher_has_written_about_validation_rows_too(task: Task) -> None:
    found = inputs(config(), task).validation_records
    written = {id: record.rationale for id, record in found.items()}
    assert written == {example.id: f"So: {example.fields['rationale']}" for example in task.validation}
    assert len(found) == 3


def test_validation_rows_need_not_hold_what_the_teacher_wrote(task: Task) -> None:
    bare = [replace(example, fields={"question": "?"}) for example in task.validation]
    assert inputs(config(), replace(task, validation=bare)).validation_records == {}


def test_the_teacher_is_the_tuned_one_where_there_is_one(task: Task) -> None:
    tuned = config(teacher={"source": "deepspeed", "model": SMALL, "tune": {}})
    folder = stages(tuned, TaskFiles("digest", {}, {}))["tune"].folder
    assert (inputs(tuned, task).teacher, inputs(tuned, task).validation_records) == (str(folder / "model"), {})
    named = config(teacher={"source": "deepspeed", "model": "OWNER/large"})
    assert inputs(named, task).teacher == "OWNER/large"
    assert inputs(config(), task).teacher is None
    server = {"url": "http://localhost:8000/v1", "tokenizer": "OWNER/large"}
    soft = {"format": "top_k", "k": 5}
    served = inputs(config(teacher={"source": "endpoint", "model": "large", "endpoint": server, "soft_labels": soft}), task)
    assert (served.teacher, served.served_tokenizer) == ("large", "OWNER/large")
