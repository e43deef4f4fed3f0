from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from itertools import product
from typing import Literal

import numpy as np
import pytest

from data.config import RationalesConfig
from data.examples import TaskExample
from data.prompts import TextFormat
from data.records import TeacherRecord
from data.rows import Chosen, RowBuilder, TrainRow, TrainSequence, choose, share_of, usable_examples
from data.soft_labels import AnswerDistribution, Sampled, SoftLabels, TopK

Targets = Literal["gold", "teacher"]

FORM = TextFormat("encoder_decoder", eos_id=1, pad_id=0, max_input_tokens=64, max_label_tokens=6, max_rationale_tokens=16)
GOLD = TaskExample("e", "1 + 1?", "two")


def encode(text: str) -> list[int]:
    return [ord(c) + 10 for c in text]


def read(ids: list[int]) -> str:
    return "".join("<e>" if n == 1 else chr(n - 10) for n in ids)


def record(
    name: str = "e", rationale: str = "because", label: str | None = "two", *, parseable: bool = True, agrees: bool = True
) -> TeacherRecord:
    return TeacherRecord(name, "train", "", rationale, label, parseable=parseable, agrees=agrees)


def soft(tokens: int) -> TopK:
    return TopK(
        np.arange(2 * tokens, dtype=np.int32).reshape(tokens, 2), np.full((tokens, 2), -1, np.float32), np.full(tokens, -1, np.float32)
    )


def drawn(tokens: int) -> Sampled:
    """One draw at the first token, two distinct ones at the second, and so on in turn."""
    distinct = np.array([1 + n % 2 for n in range(tokens)], np.int32)
    number = int(distinct.sum())
    return Sampled(np.arange(number, dtype=np.int32), np.ones(number, np.int32), distinct, np.full(tokens, -1, np.float32), 2, 1.0)


RECORDS = {
    "none": None,
    "agreeing": record(),
    "disagreeing": record(label="three", agrees=False),
    "unparseable": record(label="???", parseable=False, agrees=False),
    "without label": record(label=None, parseable=False, agrees=False),
    "without rationale": record(rationale=""),
    "without both": record(rationale="", label=None, parseable=False, agrees=False),
}

# What each record gives: keep -> (rationale is kept). The label is a matter of targets, the row of drop_rows.
KEPT = {
    "all": {"agreeing", "disagreeing", "unparseable", "without label"},
    "parseable": {"agreeing", "disagreeing"},
    "agreeing": {"agreeing"},
}
TEACHER_LABELS = {"agreeing": "two", "disagreeing": "three", "without rationale": "two"}
TABLE = [case for case in product(RECORDS, KEPT, (False, True), ("gold", "teacher")) if case[1] != "all" or not case[2]]


@pytest.mark.parametrize(("name", "keep", "drop_rows", "targets"), TABLE)
def test_the_whole_truth_table_of_what_is_learnt(name: str, keep: str, drop_rows: bool, targets: Targets) -> None:
    rationales = RationalesConfig.model_validate({"keep": keep, "drop_rows": drop_rows})
    label = "two" if targets == "gold" else TEACHER_LABELS.get(name)
    kept = name in KEPT[keep]
    expected = Chosen(None, None) if label is None or (drop_rows and not kept) else Chosen(label, "because" if kept else None)
    assert choose(GOLD, RECORDS[name], rationales, targets) == expected


def test_the_truth_table_in_a_few_plain_words() -> None:
    def chosen(name: str, targets: Targets = "gold", **knobs: object) -> Chosen:
        return choose(GOLD, RECORDS[name], RationalesConfig.model_validate(knobs), targets)

    assert chosen("none") == Chosen("two", None)
    assert chosen("disagreeing") == Chosen("two", "because")
    assert chosen("disagreeing", keep="agreeing") == Chosen("two", None)
    assert chosen("disagreeing", keep="agreeing", drop_rows=True) == Chosen(None, None)
    assert chosen("disagreeing", "teacher") == Chosen("three", "because")
    assert chosen("unparseable", "teacher") == Chosen(None, None)
    assert chosen("unparseable") == Chosen("two", "because")
    assert chosen("without rationale", keep="parseable", drop_rows=True) == Chosen(None, None)


def test_there_is_no_rationale_without_a_label() -> None:
    # The first sequence of a row is its label: validation and the arms rely on it.
    for name, keep, drop_rows, targets in TABLE:
        found = choose(GOLD, RECORDS[name], RationalesConfig.model_validate({"keep": keep, "drop_rows": drop_rows}), targets)
        assert found.label is not None or found.rationale is None


EXAMPLES = [TaskExample(name, f"input {n}", "two") for n, name in enumerate(RECORDS)]
BY_ID = {name: dataclasses.replace(r, id=name) for name, r in RECORDS.items() if r is not None}


def build(
    *,
    rationales: bool = True,
    soft_labels: bool = False,
    targets: Targets = "gold",
    examples: list[TaskExample] = EXAMPLES,
    **knobs: object,
) -> tuple[list[TrainRow], dict[str, int]]:
    builder = RowBuilder(FORM, encode)
    config = RationalesConfig.model_validate(knobs)
    rows = builder.student_rows(examples, BY_ID, config, targets, with_rationales=rationales, with_soft_labels=soft_labels)
    return rows, dict(builder.counts)


def test_rows_read_as_the_two_tasks() -> None:
    rows, _ = build()
    assert [row.id for row in rows] == list(RECORDS)
    texts = {row.id: [(read(s.input_ids), read(s.target_ids), s.is_label) for s in row.sequences] for row in rows}
    assert texts["none"] == [("predict: input 0<e>", "two<e>", True)]
    assert texts["disagreeing"] == [("predict: input 2<e>", "two<e>", True), ("explain: input 2<e>", "because<e>", False)]


def test_what_was_done_is_counted() -> None:
    none_cut = {"inputs_cut": 0, "labels_cut": 0, "rationales_cut": 0, "answers_cut": 0, "soft_label_rows": 0, "answer_rows": 0}
    assert build()[1] == {"rows": 7, "label_rows": 7, "rationale_rows": 4, **none_cut}
    assert build(keep="agreeing")[1] == {"rows": 7, "label_rows": 7, "rationale_rows": 1, **none_cut}
    assert build(keep="parseable", drop_rows=True)[1] == {"rows": 2, "label_rows": 2, "rationale_rows": 2, **none_cut}
    assert build(targets="teacher")[1] == {"rows": 3, "label_rows": 3, "rationale_rows": 2, **none_cut}


def test_what_was_cut_is_counted() -> None:
    builder = RowBuilder(FORM, encode)
    example = TaskExample("e", "x" * 80, "a long label")
    rows = builder.student_rows(
        [example], {"e": record(rationale="r" * 40)}, RationalesConfig(), "gold", with_rationales=True, with_soft_labels=False
    )
    assert {name: builder.counts[name] for name in ("inputs_cut", "labels_cut", "rationales_cut")} == {
        "inputs_cut": 2,
        "labels_cut": 1,
        "rationales_cut": 1,
    }
    assert [read(s.target_ids) for s in rows[0].sequences] == ["a lon<e>", "r" * 15 + "<e>"]


@pytest.mark.parametrize("targets", ["gold", "teacher"])
@pytest.mark.parametrize(
    "knobs", [{}, {"keep": "agreeing"}, {"keep": "agreeing", "drop_rows": True}, {"keep": "parseable", "drop_rows": True}]
)
def test_arms_differ_in_their_rationales_only(knobs: dict[str, object], targets: Targets) -> None:
    labels_only, _ = build(rationales=False, targets=targets, **knobs)
    step_by_step, _ = build(rationales=True, targets=targets, **knobs)
    assert [row.id for row in labels_only] == [row.id for row in step_by_step]
    assert [row.sequences for row in labels_only] == [row.sequences[:1] for row in step_by_step]
    assert all(sequence.is_label for row in labels_only for sequence in row.sequences)
    assert any(len(row.sequences) == 2 for row in step_by_step)


def with_soft(
    label: str,
    tokens: int,
    targets: Targets,
    *,
    wanted: bool = True,
    rationale: str = "because",
    make: Callable[[int], SoftLabels] = soft,
) -> tuple[TrainRow, dict[str, int]]:
    scored = dataclasses.replace(record(label=label, rationale=rationale), label_soft=make(tokens), rationale_soft=make(40))
    builder = RowBuilder(FORM, encode)
    rows = builder.student_rows([GOLD], {"e": scored}, RationalesConfig(), targets, with_rationales=True, with_soft_labels=wanted)
    return rows[0], dict(builder.counts)


def test_soft_labels_lie_on_the_tokens_that_the_teacher_scored() -> None:
    row, counts = with_soft("two", 4, "gold")
    label, rationale = row.sequences
    assert label.soft is not None
    assert rationale.soft is not None
    assert (len(label.soft), len(label.target_ids)) == (4, 4)  # t, w, o and the end
    assert (len(rationale.soft), len(rationale.target_ids)) == (7, 8)  # the teacher does not end after its rationale
    assert counts["soft_label_rows"] == 2


@pytest.mark.parametrize("make", [soft, drawn])
def test_soft_labels_are_cut_with_their_target(make: Callable[[int], SoftLabels]) -> None:
    row, _ = with_soft("two", 9, "gold", rationale="r" * 60, make=make)
    label, rationale = (s.soft for s in row.sequences)
    assert label is not None
    assert rationale is not None
    assert (len(label), len(rationale)) == (4, 15)
    # Two stored ids a token, or 1, 2, 1, 2 drawn ones.
    assert label.ids.ravel().tolist() == list(range(8 if make is soft else 6))


def test_soft_labels_of_the_gold_label_are_not_put_on_another_one() -> None:
    gold, _ = with_soft("three", 4, "gold")
    other, counts = with_soft("three", 4, "teacher")
    agreeing, _ = with_soft("two", 4, "teacher")
    assert [row.sequences[0].soft is not None for row in (gold, other, agreeing)] == [True, False, True]
    assert (read(other.sequences[0].target_ids), counts["soft_label_rows"]) == ("three<e>", 1)


def test_an_arm_without_soft_labels_has_none() -> None:
    row, counts = with_soft("two", 4, "gold", wanted=False)
    assert ([s.soft for s in row.sequences], counts["soft_label_rows"]) == ([None, None], 0)


ANSWERS = AnswerDistribution(("two", "three", "a long answer", "four"), (0.5, 0.25, 0.2496, 0.0004))


def with_answers(
    answers: AnswerDistribution | None = ANSWERS, targets: Targets = "gold", *, wanted: bool = True, **knobs: object
) -> tuple[list[TrainRow], dict[str, int]]:
    told = dataclasses.replace(record(label="three", agrees=False), answers=answers)
    builder = RowBuilder(FORM, encode)
    config = RationalesConfig.model_validate(knobs)
    rows = builder.student_rows([GOLD], {"e": told}, config, targets, with_rationales=True, with_soft_labels=wanted)
    return rows, {name: value for name, value in builder.counts.items() if value}


@pytest.mark.parametrize("targets", ["gold", "teacher"])
def test_each_likely_answer_is_a_target_with_its_probability(targets: Targets) -> None:
    (row,), counts = with_answers(targets=targets)
    label, rationale, *answers = row.sequences
    assert (read(label.target_ids), label.weight) == ("two<e>" if targets == "gold" else "three<e>", None)
    assert (read(rationale.target_ids), rationale.weight) == ("because<e>", None)
    assert [(read(s.input_ids), read(s.target_ids), s.is_label) for s in answers] == [
        ("predict: 1 + 1?<e>", "two<e>", False),
        ("predict: 1 + 1?<e>", "three<e>", False),
        ("predict: 1 + 1?<e>", "a lon<e>", False),
    ]
    # The fourth is below one in a thousand, and the rest are scaled to 1.
    assert [s.weight for s in answers] == pytest.approx([0.5 / 0.9996, 0.25 / 0.9996, 0.2496 / 0.9996])
    assert counts == {"rows": 1, "label_rows": 1, "rationale_rows": 1, "soft_label_rows": 1, "answer_rows": 3, "answers_cut": 1}


@pytest.mark.parametrize("answers", [None, AnswerDistribution((), ()), AnswerDistribution(tuple("abc"), (0.0005, 0.0005, 0.0))])
def test_an_example_without_a_likely_answer_has_no_soft_part_and_is_counted(answers: AnswerDistribution | None) -> None:
    (row,), counts = with_answers(answers)
    assert [s.weight for s in row.sequences] == [None, None]
    assert counts == {"rows": 1, "label_rows": 1, "rationale_rows": 1, "rows_without_soft_labels": 1}


def test_an_answer_does_not_take_over_the_soft_labels_of_the_label() -> None:
    both = dataclasses.replace(record(), label_soft=soft(4), answers=ANSWERS)
    rows = RowBuilder(FORM, encode).student_rows(
        [GOLD], {"e": both}, RationalesConfig(), "gold", with_rationales=False, with_soft_labels=True
    )
    assert [s.soft is not None for s in rows[0].sequences] == [True, False, False, False]


def test_an_arm_without_soft_labels_has_no_answers() -> None:
    (row,), counts = with_answers(wanted=False)
    assert len(row.sequences) == 2
    assert counts == {"rows": 1, "label_rows": 1, "rationale_rows": 1}


def test_a_row_that_is_left_out_is_left_out_with_its_answers() -> None:
    assert with_answers(keep="agreeing", drop_rows=True) == ([], {})
    (row,), _ = with_answers(keep="agreeing")
    assert [s.weight is None for s in row.sequences] == [True, False, False, False]


def test_a_teacher_is_tuned_on_rationale_mark_and_label_as_one_target() -> None:
    builder = RowBuilder(FORM, encode)
    examples = [
        TaskExample("a", "1 + 1?", "2", rationale="one more"),
        TaskExample("b", "?", "long label", rationale="r" * 40),
        TaskExample("c", "?", "3"),
    ]
    rows = builder.solution_rows(examples)
    assert [(row.id, read(row.sequences[0].input_ids), read(row.sequences[0].target_ids)) for row in rows] == [
        ("a", "solve: 1 + 1?<e>", "one more Answer:2<e>"),
        ("b", "solve: ?<e>", "r" * 15 + " Answer:long <e>"),
        ("c", "solve: ?<e>", " Answer:3<e>"),
    ]
    assert all(len(row.sequences) == 1 and row.sequences[0].is_label for row in rows)
    counts = {name: value for name, value in builder.counts.items() if value}
    assert counts == {"rows": 3, "label_rows": 3, "rationale_rows": 2, "rationales_cut": 1, "labels_cut": 1}


@pytest.mark.parametrize(
    ("targets", "knobs", "expected"),
    [
        (
            "gold",
            {},
            [
                ("none", " Answer:two<e>"),
                ("agreeing", "because Answer:two<e>"),
                ("disagreeing", "because Answer:two<e>"),
                ("unparseable", "because Answer:two<e>"),
                ("without label", "because Answer:two<e>"),
                ("without rationale", " Answer:two<e>"),
                ("without both", " Answer:two<e>"),
            ],
        ),
        ("gold", {"keep": "agreeing", "drop_rows": True}, [("agreeing", "because Answer:two<e>")]),
        (
            "teacher",
            {"keep": "agreeing"},
            [
                ("agreeing", "because Answer:two<e>"),
                ("disagreeing", " Answer:three<e>"),
                ("without rationale", " Answer:two<e>"),
            ],
        ),
    ],
)
def test_one_task_learns_rationale_and_label_as_one_target(
    targets: Targets, knobs: dict[str, object], expected: list[tuple[str, str]]
) -> None:
    form = dataclasses.replace(FORM, max_label_tokens=8)
    builder = RowBuilder(form, encode)
    rows = builder.single_task_rows(EXAMPLES, BY_ID, RationalesConfig.model_validate(knobs), targets)
    sequences = [row.sequences for row in rows]
    assert all(len(found) == 1 and found[0].is_label and found[0].given == 0 for found in sequences)
    assert [(row.id, read(row.sequences[0].target_ids)) for row in rows] == expected
    numbers = {name: n for n, name in enumerate(RECORDS)}
    assert [read(row.sequences[0].input_ids) for row in rows] == [f"solve: input {numbers[row.id]}<e>" for row in rows]
    with_rationale = sum(text.startswith("because") for _, text in expected)
    counts = {name: value for name, value in builder.counts.items() if value}
    assert counts == {"rows": len(rows), "label_rows": len(rows), **({"rationale_rows": with_rationale} if with_rationale else {})}
    # The rows are those of the arms of two tasks.
    assert [row.id for row in rows] == [row.id for row in build(targets=targets, **knobs)[0]]


def test_a_student_of_one_task_is_tried_on_the_label_after_a_given_rationale() -> None:
    examples = [
        TaskExample("a", "?", "2", rationale="its own"),
        TaskExample("b", "?", "3", rationale="its own"),
        TaskExample("c", "?", "4"),
    ]
    rows = RowBuilder(FORM, encode).label_of_solution_rows(examples, {"a": "because", "b": ""})
    (a,), (b,), (c,) = (row.sequences for row in rows)
    assert [(read(s.target_ids[: s.given]), read(s.target_ids[s.given :])) for s in (a, b, c)] == [
        ("because Answer:", "2<e>"),
        ("its own Answer:", "3<e>"),
        (" Answer:", "4<e>"),
    ]
    assert all(s.is_label and read(s.input_ids) == "solve: ?<e>" for s in (a, b, c))


@pytest.mark.parametrize("given", [-1, 2, 3])
def test_a_target_that_is_given_whole_asks_nothing(given: int) -> None:
    with pytest.raises(AssertionError):
        TrainSequence([1], [2, 3], True, given=given)


# ----- a share of the rows -----


def test_usable_examples_are_those_that_give_a_row() -> None:
    for targets, knobs in (("gold", {}), ("teacher", {}), ("gold", {"keep": "parseable", "drop_rows": True})):
        usable = usable_examples(EXAMPLES, BY_ID, RationalesConfig.model_validate(knobs), targets)  # type: ignore[arg-type]
        assert [e.id for e in usable] == [row.id for row in build(targets=targets, **knobs)[0]]  # type: ignore[arg-type]


MANY = [TaskExample(f"e{n}", str(n), str(n)) for n in range(200)]


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 200), (0.5, 100), (0.125, 25), (0.013, 3), (0.0001, 1)])
def test_a_share_is_rounded_and_never_empty(fraction: float, count: int) -> None:
    assert len(share_of(MANY, fraction, 3)) == count
    assert share_of([], fraction, 3) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_a_smaller_share_is_part_of_every_larger_one_in_the_same_order(seed: int) -> None:
    shares = [share_of(MANY, fraction, seed) for fraction in (0.125, 0.25, 0.5, 1.0)]
    assert shares[-1] == MANY
    for smaller, larger in itertools.pairwise(shares):
        assert smaller == [example for example in larger if example in smaller]


def test_a_share_is_drawn_evenly_and_by_the_seed() -> None:
    shares = [{e.id for e in share_of(MANY, 0.5, seed)} for seed in range(40)]
    assert len({tuple(sorted(share)) for share in shares}) == 40
    taken = [sum(example.id in share for share in shares) for example in MANY]
    # Each example is in about half of 40 shares: 5 and 35 lie nearly five deviations off.
    assert (min(taken) > 4, max(taken) < 36, sum(taken)) == (True, True, 4000)


def test_a_share_is_not_what_the_first_epoch_begins_with() -> None:
    first = np.random.default_rng([7, 0]).permutation(200)[:50]
    both = {e.id for e in share_of(MANY, 0.25, 7)} & {f"e{n}" for n in first}
    assert 2 <= len(both) <= 25
