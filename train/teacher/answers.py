"""What a teacher's samples say: each parsed and judged, the majority kept, and asked again with a hint where it was wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from data.config import Metric, RationalesConfig
from data.consistency import answer_distribution, majority
from data.examples import TaskExample
from data.prompts import parse_solution
from data.records import TeacherRecord
from train.scoring import equal, parse_answer
from train.teacher.claims import Chunk
from train.teacher.draws import record_key
from train.teacher.recorded import record_of
from train.teacher.writing import Request, Writer, Written

NO_ANSWER = "no answer"
UNUSABLE: Mapping[Metric, str] = {
    "choice": "not a choice",
    "number": "not a number",
    "expression": "does not evaluate",
    "text": "empty",
}
"""Why a label cannot be used, by the task's metric."""

Attach = Callable[[TaskExample, TeacherRecord, Written], TeacherRecord]
"""Adds to a record what came along with the text that it keeps."""


def reject_reason(record: TeacherRecord, metric: Metric) -> str | None:
    """Why a record's label cannot be used; None where it can."""
    if record.parseable:
        return None
    return NO_ANSWER if record.label is None else UNUSABLE[metric]


@dataclass(frozen=True, slots=True)
class Answering:
    """Requests for the examples of a chunk, and records from what was written."""

    config: RationalesConfig
    metric: Metric
    writer: Writer
    seed: int
    distributions: bool
    """Keep how often each answer was drawn (soft-label format answers)."""
    attach: Attach | None = None
    """Of training records that were written without a hint: a distribution under a hint is not the one to learn."""

    def requests(self, chunk: Chunk) -> list[Request]:
        """`samples` requests an example, one example's after another's."""
        return [
            self.writer.request(example, None, record_key(self.seed, chunk.split, example.id, "sample", n))
            for example in chunk.examples
            for n in range(self.config.samples)
        ]

    def records(self, chunk: Chunk, written: Sequence[Written]) -> list[TeacherRecord]:
        """One record an example: the majority's label, with the rationale of the first sample that gave it."""
        size = self.config.samples
        return [self._record(chunk.split, e, written[n * size : (n + 1) * size]) for n, e in enumerate(chunk.examples)]

    def _record(self, split: str, example: TaskExample, samples: Sequence[Written]) -> TeacherRecord:
        parsed = [parse_solution(sample.text) for sample in samples]
        answers = [self._answer(label, example) for _, label in parsed]

        def same(left: str, right: str) -> bool:
            return equal(left, right, self.metric, example.choices)

        first, votes = majority(answers, same)
        rationale, label = parsed[first]
        kept, tokens = samples[first], sum(sample.num_tokens for sample in samples)
        judged = record_of(example, split, self.metric, text=kept.text, rationale=rationale, label=label, generated_tokens=tokens)
        record = replace(judged, votes=votes)
        if split != "train":  # the test split trains nobody
            return record
        if self.distributions:
            record = replace(record, answers=answer_distribution(answers, same))
        return record if self.attach is None else self.attach(example, record, kept)

    def _answer(self, label: str | None, example: TaskExample) -> str | None:
        """The label where it can be used; of a choice the text, whatever named it."""
        parsed = None if label is None else parse_answer(label, self.metric, example.choices)
        return parsed if self.metric == "choice" or parsed is None else label

    def hints(self, chunk: Chunk, records: Sequence[TeacherRecord]) -> dict[int, Request]:
        """By position, a request with the gold label as a hint where the teacher's was wrong or missing (STaR)."""
        if not self.config.rationalize or chunk.split != "train":
            return {}
        return {
            n: self.writer.request(example, example.label, record_key(self.seed, chunk.split, example.id, "hint"))
            for n, (example, record) in enumerate(zip(chunk.examples, records, strict=True))
            if not record.agrees
        }

    def rationalized(
        self,
        chunk: Chunk,
        records: Sequence[TeacherRecord],
        samples: Sequence[Written],
        hints: Mapping[int, Request],
        written: Sequence[Written],
    ) -> list[TeacherRecord]:
        """The records, each asked again replaced by the hinted answer where that one came to the gold label.

        Args:
            chunk: what was asked.
            records: of the first round.
            samples: that they were made of.
            hints: from `hints`.
            written: the answers to them, in their order.

        Source:
            Zelikman et al. 2022, STaR, arXiv 2203.14465, section 3.2.
        """
        found, size = list(records), self.config.samples
        for n, answer in zip(hints, written, strict=True):
            found[n] = self._rationalized(chunk.examples[n], records[n], samples[n * size : (n + 1) * size], answer)
        return found

    def _rationalized(self, example: TaskExample, record: TeacherRecord, samples: Sequence[Written], answer: Written) -> TeacherRecord:
        tokens = record.generated_tokens + answer.num_tokens
        rationale, label = parse_solution(answer.text)
        hinted = record_of(example, record.split, self.metric, text=answer.text, rationale=rationale, label=label, generated_tokens=tokens)
        if not hinted.agrees or not hinted.rationale:
            return replace(record, generated_tokens=tokens)
        said = [parse_solution(sample.text)[1] for sample in samples]
        votes = sum(equal(other, example.label, self.metric, example.choices) for other in said)
        return replace(hinted, votes=votes, rationalized=True, answers=record.answers)
