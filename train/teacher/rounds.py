"""Chunks in, records out: who writes is asked, and asked again with hints, as it has room."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from data.records import TeacherRecord
from train.engine import InferenceModel
from train.teacher.answers import Answering
from train.teacher.claims import Chunk
from train.teacher.writing import Request, Written

Answered = tuple[Chunk, list[TeacherRecord]]


@dataclass(frozen=True, slots=True)
class _Pending:
    """A piece of work that the writer has."""

    chunk: Chunk
    hints: dict[int, Request] = field(default_factory=dict)
    """By position; empty in a chunk's first round."""
    records: Sequence[TeacherRecord] = ()
    samples: Sequence[Written] = ()
    """Of the first round, as are the records."""


def streamed(answering: Answering, chunks: Iterator[Chunk]) -> Iterator[Answered]:
    """Each chunk with its records when it is whole, in any order.

    The writer takes the next chunk when it has room for it; requests with hints go before new chunks.
    """
    numbers = itertools.count()
    again: deque[tuple[int, list[Request]]] = deque()
    pending: dict[int, _Pending] = {}

    def work() -> Iterator[tuple[int, list[Request]]]:
        while True:
            if not again:
                if (chunk := next(chunks, None)) is None:
                    return
                pending[number := next(numbers)] = _Pending(chunk)
                again.append((number, answering.requests(chunk)))
            yield again.popleft()

    while True:
        for number, written in answering.writer.write(work()):
            done = pending.pop(number)
            if done.hints:
                yield done.chunk, answering.rationalized(done.chunk, done.records, done.samples, done.hints, written)
                continue
            records = answering.records(done.chunk, written)
            hints = answering.hints(done.chunk, records)
            if not hints:
                yield done.chunk, records
                continue
            pending[number := next(numbers)] = _Pending(done.chunk, hints, records, written)
            again.append((number, list(hints.values())))
        # Hints for the last chunks came up when the writer had already been told that there is no more.
        if not again:
            return


def in_step(answering: Answering, chunks: Iterator[Chunk], teacher: InferenceModel) -> Iterator[Answered]:
    """The same where all processes must make the same number of forwards: one chunk each, then the hints of all."""
    for chunk in chunks:
        requests = answering.requests(chunk)
        ((_, samples),) = answering.writer.write([(0, requests)])
        records = answering.records(chunk, samples)
        hints = answering.hints(chunk, records)
        if teacher.most(len(hints)):
            # A process without hints asks something again, for the others' sake.
            ((_, written),) = answering.writer.write([(1, list(hints.values()) or requests[:1])])
            records = answering.rationalized(chunk, records, samples, hints, written[: len(hints)])
        yield chunk, records
