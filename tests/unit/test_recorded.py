from __future__ import annotations

from typing import Any

import pytest

from data.config import Metric
from data.examples import TaskExample
from data.records import TeacherRecord
from train.config import TeacherConfig
from train.teacher.recorded import record_of, records


def config(label: str = "{said}", rationale: str = "{why}") -> TeacherConfig:
    return TeacherConfig(source="recorded", label=label, rationale=rationale)


def example(label: str = "4", choices: tuple[str, ...] = (), **fields: Any) -> TaskExample:
    return TaskExample("e", "2 + 2?", label, choices, fields=fields)


def one(given: TaskExample, metric: Metric = "number", choices_field: str | None = None, **templates: str) -> TeacherRecord:
    (found,) = records(config(**templates), [given], "train", metric, choices_field)
    return found


def test_a_record_reads_the_row() -> None:
    assert one(example(said="4", why="Two twos.")) == TeacherRecord(
        "e", "train", "Two twos.", "Two twos.", "4", parseable=True, agrees=True
    )


def test_every_example_has_its_record_in_order() -> None:
    examples = [TaskExample(str(n), "", "4", fields={"said": n, "why": "w"}) for n in (3, 4, 5)]
    found = list(records(config(), examples, "test", "number", None))
    assert [(r.id, r.split, r.label, r.agrees) for r in found] == [
        ("3", "test", "3", False),
        ("4", "test", "4", True),
        ("5", "test", "5", False),
    ]


@pytest.mark.parametrize(
    ("metric", "said", "gold", "parseable", "agrees"),
    [
        ("number", "4.0", "4", True, True),
        ("number", "four", "4", False, False),
        ("expression", "8 / 2", "4", True, True),
        ("expression", "8 /", "4", False, False),
        ("text", "Four.", "four", True, True),
        ("choice", "(b)", "five", True, True),
        ("choice", "six", "five", False, False),
    ],
)
def test_a_label_is_judged_as_the_metric_does(metric: Metric, said: str, gold: str, parseable: bool, agrees: bool) -> None:
    found = one(example(gold, ("four", "five") if metric == "choice" else (), said=said, why=""), metric)
    assert (found.label, found.parseable, found.agrees) == (said, parseable, agrees)


@pytest.mark.parametrize("nothing", [None, "", "  \n"])
def test_a_row_that_the_teacher_did_not_label_has_no_label(nothing: str | None) -> None:
    found = one(example(said=nothing, why="Two twos."), "text")
    assert (found.label, found.parseable, found.agrees, found.rationale) == (None, False, False, "Two twos.")


@pytest.mark.parametrize("nothing", [None, "", "  \n"])
def test_a_row_that_the_teacher_did_not_explain_has_no_rationale(nothing: str | None) -> None:
    found = one(example(said="4", why=nothing))
    assert (found.label, found.rationale, found.agrees) == ("4", "", True)


def test_a_null_field_among_other_text_gives_no_text_either() -> None:
    found = one(example(said=None, why=None), "text", label="It is {said}", rationale="Because {why}")
    assert (found.label, found.text, found.rationale) == (None, "", "")


@pytest.mark.parametrize("other", ["4", None])
@pytest.mark.parametrize(("key", "field"), [("label", "said"), ("rationale", "why")])
def test_a_field_that_a_row_lacks_is_an_error(key: str, field: str, other: str | None) -> None:
    row = {"said": other, "why": other}
    del row[field]
    message = rf"teacher\.{key} is '{{{field}}}': no field '{field}' \(has: \w+\) in the row of example e; name a field that every row has"
    with pytest.raises(ValueError, match=message):
        one(example(**row))


@pytest.mark.parametrize("key", ["label", "rationale"])
def test_a_malformed_template_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^teacher\.{key}: '\{{said' has a single '\{{' at character 1; write '\{{\{{' for a brace"):
        one(example(said="4", why="w"), **{key: "{said"})


def test_choices_may_stand_in_a_rationale() -> None:
    given = example("b", ("a", "b"), said="b", why="w", options=["a", "b"])
    assert one(given, "choice", "options", rationale="{options}\n{why}").rationale == "(a) a\n(b) b\nw"


def test_an_answer_without_a_label_is_not_usable() -> None:
    found = record_of(example(), "train", "number", text="runs on", rationale="runs on", label=None, generated_tokens=7)
    assert (found.label, found.parseable, found.agrees, found.generated_tokens) == (None, False, False, 7)
