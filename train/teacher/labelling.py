"""Soft labels by forwards of the teacher over what it wrote: at each target token, or over the answer choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from data.config import SoftLabelsConfig
from data.examples import TaskExample
from data.prompts import Encode, TextFormat
from data.records import TeacherRecord
from data.soft_labels import AnswerDistribution, SoftLabels
from train.teacher.claims import Chunk
from train.teacher.draws import record_key
from train.teacher.prompter import Prompter
from train.teacher.score import Solution


class Scores(Protocol):
    """What scores (`score.Scorer`)."""

    def tokens(self, solutions: Sequence[Solution], keys: Sequence[int]) -> list[tuple[SoftLabels | None, SoftLabels | None]]:
        """Soft labels of (rationale, label) of each solution."""

    def choices(self, contexts: Sequence[list[int]], choices: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        """Summed log-likelihoods of each context's continuations."""


@dataclass(frozen=True, slots=True)
class Labelling:
    """Adds soft labels to the records of a chunk. The teacher read the example alone, without a hint."""

    scorer: Scores
    prompter: Prompter
    form: TextFormat
    encode: Encode
    config: SoftLabelsConfig
    seed: int

    def added(self, chunk: Chunk, records: Sequence[TeacherRecord]) -> list[TeacherRecord]:
        """The same records, with the teacher's distributions at the tokens of its rationale and of the gold label, or over the choices.

        All are scored after the plain prompt, which is what a student learns to answer. A rationale written with a hint gets soft labels
        as any text does; what follows such a rationale is the hint's doing, so its label and choices get none.
        """
        if self.config.format == "choices":
            return self._over_choices(chunk, records)
        solutions = [self._solution(e, r, e.label) for e, r in zip(chunk.examples, records, strict=True)]
        keys = [record_key(self.seed, chunk.split, example.id, "soft") for example in chunk.examples]
        pairs = zip(records, self.scorer.tokens(solutions, keys), strict=True)
        return [replace(r, rationale_soft=rationale, label_soft=None if r.rationalized else label) for r, (rationale, label) in pairs]

    def _solution(self, example: TaskExample, record: TeacherRecord, label: str) -> Solution:
        prompt = list(self.prompter.prompt_ids(example.input))
        return Solution(prompt, *self.form.solution_ids(record.rationale, label, self.encode))

    def _over_choices(self, chunk: Chunk, records: Sequence[TeacherRecord]) -> list[TeacherRecord]:
        asked = [[self._solution(e, r, choice) for choice in e.choices] for e, r in zip(chunk.examples, records, strict=True)]
        sums = self._likelihoods(asked)
        return [
            r
            if r.rationalized
            else replace(
                r, answers=over_choices(e.choices, found, [len(s.label_ids) for s in solutions], mean=self.config.likelihood == "mean")
            )
            for e, r, solutions, found in zip(chunk.examples, records, asked, sums, strict=True)
        ]

    def _likelihoods(self, asked: Sequence[Sequence[Solution]]) -> list[list[float]]:
        """Summed log-likelihoods of the labels, each after the same prompt, rationale and `Answer:`."""
        if self.form.family == "decoder_only":
            contexts = [list(s[0].prompt_ids + s[0].rationale_ids + s[0].mark_ids) for s in asked]
            return self.scorer.choices(contexts, [[s.label_ids for s in solutions] for solutions in asked])
        # The encoder reads the prompt alone: what precedes the label is scored once by itself, and subtracted.
        heads = [s[0].rationale_ids + s[0].mark_ids for s in asked]
        targets = [[head, *(head + s.label_ids for s in solutions)] for head, solutions in zip(heads, asked, strict=True)]
        found = self.scorer.choices([list(s[0].prompt_ids) for s in asked], targets)
        return [[total - head for total in totals] for head, *totals in found]


def over_choices(choices: Sequence[str], sums: Sequence[float], lengths: Sequence[int], *, mean: bool) -> AnswerDistribution:
    """The softmax of the choices' log-likelihoods.

    Args:
        choices: the texts.
        sums: log-likelihood of each, summed over its tokens.
        lengths: how many tokens each has.
        mean: divide by the length before the softmax.
    """
    scores = [value / length if mean else value for value, length in zip(sums, lengths, strict=True)]
    weights = [math.exp(score - max(scores)) for score in scores]
    return AnswerDistribution(tuple(choices), tuple(weight / sum(weights) for weight in weights))
