"""What the sections of a configuration must say together about soft labels."""

from __future__ import annotations

from typing import Any

import pytest

from launch.config import Config, validate

CHOICE = {"train": "train.jsonl", "test": "test.jsonl", "metric": "choice", "choices": "options"}
NUMBER = {"train": "train.jsonl", "test": "test.jsonl", "metric": "number"}
SERVER = {"source": "endpoint", "model": "large", "endpoint": {"url": "http://localhost:8000/v1"}}


def config(task: dict[str, Any], soft_labels: dict[str, Any] | None, student: dict[str, Any] | None = None, **teacher: Any) -> Config:
    given = {"source": "deepspeed", "model": "some/llama", **teacher, **({"soft_labels": soft_labels} if soft_labels else {})}
    model = {"model": "some/t5", "loss": {"soft": 0.5 if soft_labels else 0.0}}
    return validate({"name": "small", "task": task, "teacher": given, "student": {**model, **(student or {})}}, "file")


def message(*arguments: Any, **teacher: Any) -> str:
    with pytest.raises(ValueError, match=r"\Afile:\n  ") as raised:
        config(*arguments, **teacher)
    return str(raised.value).removeprefix("file:\n  ")


@pytest.mark.parametrize("metric", ["number", "text", "expression"])
def test_choices_need_a_task_that_has_them(metric: str) -> None:
    assert message({**NUMBER, "metric": metric}, {"format": "choices"}) == (
        f"teacher.soft_labels.format is choices, but task.metric is {metric}, whose examples have no answer choices: "
        "set metric to choice and name the field that lists them in task.choices, or use format: answers, top_k or sampled"
    )


def test_every_format_fits_some_task() -> None:
    assert config(CHOICE, {"format": "choices"}).teacher.soft_labels is not None
    for task in (CHOICE, NUMBER):
        for soft in ({"format": "top_k"}, {"format": "sampled"}):
            assert config(task, soft).teacher.soft_labels is not None
        for teacher in ({}, SERVER):
            found = config(task, {"format": "answers"}, rationales={"samples": 5}, **teacher).teacher.soft_labels
            assert found is not None
            assert not found.on_tokens


def test_one_sample_is_no_distribution_over_answers() -> None:
    assert "format is answers" in message(NUMBER, {"format": "answers"})
    assert "samples is 1" in message(NUMBER, {"format": "answers"})


@pytest.mark.parametrize("form", ["top_k", "sampled", "choices", "answers"])
def test_recorded_teachers_have_no_soft_labels(form: str) -> None:
    teacher = {"source": "recorded", "model": None, "label": "{label}", "rationale": "{why}"}
    assert message(CHOICE, {"format": form}, **teacher) == "teacher: soft_labels has no effect with source: recorded; remove it"


@pytest.mark.parametrize(
    ("teacher", "why"),
    [
        (SERVER, "a server does not give its layers away"),
        ({"source": "recorded", "model": None, "label": "{label}", "rationale": "{why}"}, "a recorded teacher has no layers"),
    ],
)
def test_a_student_is_cut_from_a_model_that_is_here(teacher: dict[str, Any], why: str) -> None:
    found = message(NUMBER, None, {"model": {"cut_from": "teacher", "layers": 2}}, **teacher)
    assert found == f"student.model is {{cut_from: teacher}}, but {why}: name a model"
