"""A teacher that has already written: its labels and rationales stand in the task's rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from data.config import Metric
from data.examples import TaskExample
from data.records import TeacherRecord
from data.tasks import RowError, check_template, render
from train.config import TeacherConfig
from train.scoring import equal, parse_answer


def records(
    config: TeacherConfig, examples: Iterable[TaskExample], split: str, metric: Metric, choices_field: str | None
) -> Iterator[TeacherRecord]:
    """One record an example, from the templates `teacher.label` and `teacher.rationale` over the example's row.

    A row whose field is there but null or empty is one that the teacher did not answer: its record has no label, or an empty rationale.

    Raises:
        ValueError: if a template is malformed, or names a field that a row does not have.
    """
    assert config.label is not None, "the configuration refuses a recorded teacher without a label"
    assert config.rationale is not None, "the configuration refuses a recorded teacher without a rationale"
    for example in examples:
        label = _filled("teacher.label", config.label, example, choices_field)
        rationale = _filled("teacher.rationale", config.rationale, example, choices_field)
        yield record_of(example, split, metric, text=rationale, rationale=rationale.strip(), label=label if label.strip() else None)


def check_fields(config: TeacherConfig, examples: Iterable[TaskExample], choices_field: str | None) -> None:
    """That each example's row has what the templates name.

    Raises:
        ValueError: as `records`, for the first row that does not.
    """
    for key, template in (("teacher.label", config.label), ("teacher.rationale", config.rationale)):
        assert template is not None, "the configuration refuses a recorded teacher without them"
        for example in examples:
            _filled(key, template, example, choices_field)


def record_of(
    example: TaskExample, split: str, metric: Metric, *, text: str, rationale: str, label: str | None, generated_tokens: int = 0
) -> TeacherRecord:
    """A record with its label judged: usable (`parseable`), and the gold one (`agrees`)."""
    answer = parse_answer(label, metric, example.choices) if label is not None else None
    return TeacherRecord(
        id=example.id,
        split=split,
        text=text,
        rationale=rationale,
        label=label,
        parseable=answer is not None,
        agrees=equal(answer, example.label, metric, example.choices),
        generated_tokens=generated_tokens,
    )


def _filled(key: str, template: str, example: TaskExample, choices_field: str | None) -> str:
    """The template's text; empty where one of its fields is null."""
    check_template(template, key)
    try:
        render(template, {name: "" if value is None else value for name, value in example.fields.items()}, choices_field=choices_field)
    except RowError as error:
        raise ValueError(f"{key} is {template!r}: {error} in the row of example {example.id}; name a field that every row has") from error
    try:
        return render(template, example.fields, choices_field=choices_field)
    except RowError:  # every field is there, so one is null
        return ""
