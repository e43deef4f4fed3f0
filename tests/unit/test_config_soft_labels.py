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


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("form", ["sampled", "choices", "answers"])
def test_a_divergence_that_stored_labels_do_not_serve_is_told(form: str, divergence: str) -> None:
    loss = {"loss": {"soft": 0.5, "divergence": divergence}}
    assert message(CHOICE, {"format": form}, loss, rationales={"samples": 5}) == (
        f"student.loss.divergence is {divergence}, but teacher.soft_labels.format is {form}, which serves forward_kl only: "
        "set divergence to forward_kl, format to top_k, or student.loss.teacher to live"
    )
    assert config(CHOICE, {"format": "top_k"}, loss).student.loss.divergence == divergence
    live = {"loss": {"soft": 0.5, "divergence": divergence, "teacher": "live"}}
    assert config(CHOICE, {"format": form}, live, rationales={"samples": 5}).student.loss.teacher == "live"


@pytest.mark.parametrize("source", ["vllm", "endpoint"])
def test_a_live_teacher_runs_here(source: str) -> None:
    teacher = SERVER if source == "endpoint" else {"source": source}
    assert message(NUMBER, None, {"loss": {"soft": 0.5, "teacher": "live"}}, **teacher) == (
        f"student.loss.teacher is live, but with teacher.source: {source} no model of the teacher runs here: "
        "set teacher.source to deepspeed, or remove student.loss.teacher"
    )
    live = config(NUMBER, None, {"loss": {"soft": 0.5, "teacher": "live", "temperature": 2.0}})
    assert (live.teacher.soft_labels, live.student.loss.temperature) == (None, 2.0)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({"teacher": "live"}, "teacher has no effect while soft is 0: give soft a weight, or remove teacher"),
        ({"soft": 1, "beta": 0.5}, "beta has no effect on forward_kl: remove it, or set divergence to jsd"),
        (
            {"soft": 1, "skew": 0.5},
            "skew has no effect on forward_kl: remove it, or set divergence to skew_forward_kl or skew_reverse_kl",
        ),
        (
            {"soft": 1, "temperature": 2},
            "temperature cannot change stored soft labels, which keep that of teacher.soft_labels.temperature: remove it, "
            "or set teacher: live",
        ),
    ],
)
def test_a_knob_of_the_divergence_without_effect_is_told(loss: dict[str, Any], expected: str) -> None:
    assert message(CHOICE, {"format": "top_k"}, {"loss": loss}) == f"student.loss: {expected}"


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
