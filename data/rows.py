"""What a model learns from each example: which target texts, as token ids, with which soft labels. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from data.config import RationalesConfig
from data.examples import TaskExample
from data.prompts import Encode, Part, TextFormat
from data.records import TeacherRecord
from data.soft_labels import AnswerDistribution, SoftLabels

LEAST_PROBABILITY = 1e-3
"""Of an answer to learn: each costs a sequence of the batch. Less likely ones are left out, and the others' probabilities add up to 1."""


@dataclass(frozen=True, slots=True)
class TrainSequence:
    """One input with one target."""

    input_ids: list[int]
    target_ids: list[int]
    is_label: bool
    """The target counts in the label's loss, else in the rationale's; one with a weight in neither."""
    soft: SoftLabels | None = None
    """Soft labels of the first tokens of the target."""
    weight: float | None = None
    """The teacher's probability of this target, one of its answers: it counts in the soft labels' loss, so much. None for the others."""
    given: int = 0
    """So many of the target's first tokens are given: the model reads them, but they count in no loss and in no exact match."""

    def __post_init__(self) -> None:
        assert self.weight is None or (self.weight > 0 and not self.is_label and self.soft is None), self
        assert 0 <= self.given < max(1, len(self.target_ids)), self


@dataclass(frozen=True, slots=True)
class TrainRow:
    """What one example gives: its label, its rationale, and the answers of the teacher where it gave probabilities of them."""

    id: str
    sequences: tuple[TrainSequence, ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The texts to learn from one example; None where it has no such loss."""

    label: str | None
    rationale: str | None


def choose(example: TaskExample, record: TeacherRecord | None, rationales: RationalesConfig, targets: Literal["gold", "teacher"]) -> Chosen:
    """Which texts of an example and its record the student learns.

    `keep` chooses rationales; the label stays, so that arms differ in one thing only, unless `drop_rows` is set. With
    `targets: teacher` an example without a usable teacher's label is left out whole: arms with and without rationales see the same rows.
    """
    usable = record is not None and bool(record.rationale)
    if record is not None and rationales.keep == "parseable":
        usable = usable and record.parseable
    if record is not None and rationales.keep == "agreeing":
        usable = usable and record.agrees
    if rationales.drop_rows and not usable:
        return Chosen(None, None)
    label = example.label if targets == "gold" else record.label if record is not None and record.parseable else None
    if targets == "teacher" and label is None:
        return Chosen(None, None)
    return Chosen(label, record.rationale if record is not None and usable else None)


def usable_examples(
    examples: Iterable[TaskExample],
    records: Mapping[str, TeacherRecord],
    rationales: RationalesConfig,
    targets: Literal["gold", "teacher"],
) -> list[TaskExample]:
    """The examples that give a row, by `choose`: the same for all arms."""
    return [example for example in examples if choose(example, records.get(example.id), rationales, targets).label is not None]


def share_of(examples: Sequence[TaskExample], fraction: float, seed: int) -> list[TaskExample]:
    """A random share of the examples, in their own order; with one seed a smaller share is part of every larger one.

    Args:
        examples: of which the share is taken.
        fraction: of them, above 0; one example is always taken where there are any.
        seed: of the draw.
    """
    # Two numbers are the seed of an epoch's order (`Order`): with a third, the share is not what the first epoch begins with.
    drawn = np.random.default_rng([seed, 0, 1]).permutation(len(examples))[: max(1, round(fraction * len(examples)))]
    return [examples[n] for n in sorted(drawn)]


class RowBuilder:
    """Turns texts into rows of token ids and counts what it did (`counts`)."""

    def __init__(self, text_format: TextFormat, encode: Encode) -> None:
        self.format = text_format
        self.encode = encode
        kept = ("rows", "label_rows", "rationale_rows", "soft_label_rows", "answer_rows")
        cut = ("inputs_cut", "labels_cut", "rationales_cut", "answers_cut")
        self.counts: Counter[str] = Counter(dict.fromkeys((*kept, *cut), 0))

    def student_rows(
        self,
        examples: Iterable[TaskExample],
        records: Mapping[str, TeacherRecord],
        rationales: RationalesConfig,
        targets: Literal["gold", "teacher"],
        *,
        with_rationales: bool,
        with_soft_labels: bool,
    ) -> list[TrainRow]:
        """Rows of the two tasks: `predict` -> label, `explain` -> rationale; and with soft labels `predict` -> each likely answer.

        Args:
            examples: what to learn.
            records: what the teacher wrote, by the example's id.
            rationales: `keep` and `drop_rows`.
            targets: whose labels.
            with_rationales: False for an arm that learns labels only.
            with_soft_labels: attach the teacher's soft labels where it scored the very tokens of the target, and add its answers,
                whatever the label is.
        """
        rows = []
        for example in examples:
            record = records.get(example.id)
            chosen = choose(example, record, rationales, targets)
            soft = record if with_soft_labels else None
            sequences = [self._label(example, chosen.label, soft)] if chosen.label is not None else []
            if chosen.rationale is not None and with_rationales:
                sequences.append(self._rationale(example, chosen.rationale, soft))
            if soft is not None and soft.answers is not None and sequences:
                sequences += self._answers(sequences[0], soft.answers)
            if sequences:
                rows.append(TrainRow(example.id, tuple(sequences)))
                self.counts["rows"] += 1
                if with_soft_labels:
                    self.counts["rows_without_soft_labels"] += all(s.soft is None and s.weight is None for s in sequences)
        return rows

    def single_task_rows(
        self,
        examples: Iterable[TaskExample],
        records: Mapping[str, TeacherRecord],
        rationales: RationalesConfig,
        targets: Literal["gold", "teacher"],
    ) -> list[TrainRow]:
        """Rows of one task: `solve` -> rationale and label as one target; where `choose` gives no rationale, the mark and the label.

        Args:
            examples: what to learn.
            records: what the teacher wrote, by the example's id.
            rationales: `keep` and `drop_rows`.
            targets: whose labels.

        Source: Hsieh et al. 2023, arXiv 2305.02301, section 4.4 (the single-task form that the two tasks are compared with).
        """
        chosen = [(example, choose(example, records.get(example.id), rationales, targets)) for example in examples]
        return [self._solution(example, found.rationale or "", found.label) for example, found in chosen if found.label is not None]

    def label_of_solution_rows(self, examples: Iterable[TaskExample], rationales: Mapping[str, str]) -> list[TrainRow]:
        """Rows that try a model that solves: the gold label's tokens, after a rationale that is given.

        Args:
            examples: what to ask.
            rationales: by the example's id; where one is missing the task's own, and where there is none the label follows its mark alone.
        """
        return [self._solution(e, rationales.get(e.id) or e.rationale or "", e.label, label_only=True) for e in examples]

    def solution_rows(self, examples: Iterable[TaskExample]) -> list[TrainRow]:
        """Rows that tune a teacher: `solve` -> gold rationale and label as one target."""
        return [self._solution(example, example.rationale or "", example.label) for example in examples]

    def _solution(self, example: TaskExample, rationale: str, label: str, *, label_only: bool = False) -> TrainRow:
        head, mark, tail = self.format.solution_ids(rationale, label, self.encode)
        rationale_cut = self.format.rationale_ids(rationale, self.encode)[1]
        label_cut = self.format.label_ids(label, self.encode)[1]
        self.counts.update(
            rows=1, label_rows=1, rationale_rows=int(bool(rationale)), rationales_cut=int(rationale_cut), labels_cut=int(label_cut)
        )
        given = len(head) + len(mark) if label_only else 0
        sequence = TrainSequence(self._input("solve", example.input), [*head, *mark, *tail], True, given=given)
        return TrainRow(example.id, (sequence,))

    def _input(self, part: Part, text: str) -> list[int]:
        ids, cut = self.format.prompt_ids(part, text, self.encode)
        self.counts["inputs_cut"] += cut
        return ids

    def _label(self, example: TaskExample, label: str, record: TeacherRecord | None) -> TrainSequence:
        ids, cut = self.format.label_ids(label, self.encode)
        # The teacher scored the gold label: its soft labels are of no use at the tokens of another one.
        soft = record.label_soft if record is not None and label == example.label else None
        soft = soft.cut(len(ids)) if soft is not None else None
        self.counts.update(label_rows=1, labels_cut=int(cut), soft_label_rows=int(soft is not None))
        return TrainSequence(self._input("predict", example.input), ids, True, soft)

    def _answers(self, label: TrainSequence, distribution: AnswerDistribution) -> list[TrainSequence]:
        """The likely answers to the label's input, each with its probability."""
        pairs = zip(distribution.answers, distribution.probabilities, strict=True)
        likely = [(answer, probability) for answer, probability in pairs if probability >= LEAST_PROBABILITY]
        mass = sum(probability for _, probability in likely)
        encoded = [self.format.label_ids(answer, self.encode) for answer, _ in likely]
        self.counts.update(answer_rows=len(likely), answers_cut=sum(cut for _, cut in encoded), soft_label_rows=int(bool(likely)))
        weights = [probability / mass for _, probability in likely]
        return [
            replace(label, target_ids=ids, is_label=False, soft=None, weight=weight)
            for (ids, _), weight in zip(encoded, weights, strict=True)
        ]

    def _rationale(self, example: TaskExample, rationale: str, record: TeacherRecord | None) -> TrainSequence:
        ids, cut = self.format.rationale_ids(rationale, self.encode)
        soft = record.rationale_soft if record is not None else None
        soft = soft.cut(len(ids) - 1) if soft is not None else None
        self.counts.update(rationale_rows=1, rationales_cut=int(cut), soft_label_rows=int(soft is not None))
        return TrainSequence(self._input("explain", example.input), ids, False, soft)
