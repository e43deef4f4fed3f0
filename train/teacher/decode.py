"""The decoding loop of a decoder-only teacher on a GPU: bound by memory, not by launches.

Requests of several chunks share a set of slots, each with room for its own tokens; the prefix that most prompts begin with lies in the
cache once. A step - one token for every slot - runs as a captured CUDA graph, `CHECK_EVERY` of them between two looks at which rows have
ended. Ended rows make room for waiting requests; when none wait, the rows that are left move together and smaller graphs go on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import distributed

from data.examples import TaskExample
from train.engine import InferenceModel
from train.teacher.generate import Decoding, Prompts
from train.teacher.slots import Row, Slots, begins_with
from train.teacher.writing import Request, Written

_MOST_SLOTS = 256
_SHORTEST_PREFIX = 32
_ROUND = 64
"""Capacities are multiples of this, so that prompts a little longer need no new cache."""
_FREE_SHARE = 0.85
"""Of the free memory that the cache may take; prompts in flight, logits and graphs need the rest."""
_KEPT_FREE = 4 << 30
"""Bytes left to the scoring pass, which runs between chunks; it takes smaller forwards where this is not there."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Chunk:
    answers: list[Written | None]
    missing: int


class LoopWriter:
    """Writes with the loop; see the module."""

    def __init__(self, teacher: InferenceModel, decoding: Decoding, prompts: Prompts, *, batch_size: int | Literal["auto"]) -> None:
        self.teacher, self.decoding, self.prompts = teacher, decoding, prompts
        self._most = _MOST_SLOTS if batch_size == "auto" else batch_size
        self._by_memory = batch_size == "auto"
        self._prefix: tuple[int, ...] | None = None
        self._slots: Slots | None = None

    def request(self, example: TaskExample, hint: str | None, key: int) -> Request:
        """The request for an example."""
        return self.prompts.request(example, hint, key)

    @torch.no_grad()
    def write(self, work: Iterable[tuple[int, Sequence[Request]]]) -> Iterator[tuple[int, list[Written]]]:
        """Answers chunks as they become whole; takes the next one when fewer requests wait than there are slots."""
        source, waiting = iter(work), list[Row]()
        chunks: dict[int, _Chunk] = {}
        more = True
        while more or waiting or (self._slots is not None and self._slots.rows):
            while more and len(waiting) < self._most:
                more = self._take(source, waiting, chunks)
            if not self._advanced(waiting):  # outside of its `except`, whose frames would hold the cache
                self._shrink(waiting)
            for number in [number for number, chunk in self._collect(chunks) if not chunk.missing]:
                answers = chunks.pop(number).answers
                yield number, [answer for answer in answers if answer is not None]

    def close(self) -> None:
        """Gives the cache's memory back; the next `write` makes it anew."""
        self._slots = None
        torch.cuda.empty_cache()

    def _take(self, source: Iterator[tuple[int, Sequence[Request]]], waiting: list[Row], chunks: dict[int, _Chunk]) -> bool:
        found = next(source, None)
        if found is None:
            return False
        number, requests = found
        chunks[number] = _Chunk([None] * len(requests), len(requests))
        waiting += [Row(number, n, request) for n, request in enumerate(requests)]
        waiting.sort(key=lambda row: (len(row.request.ids), -row.chunk, -row.position))  # the longest are taken first, from the end
        return True

    def _advanced(self, waiting: list[Row]) -> bool:
        """False where memory ran out."""
        try:
            self._advance(waiting)
        except torch.OutOfMemoryError:
            return False
        return True

    def _advance(self, waiting: list[Row]) -> None:
        """Fills free slots if it is worth a forward, then decodes until the next look."""
        slots = self._ready(waiting)
        free = slots.num_free
        if waiting and (free * 8 >= slots.size or not slots.rows):
            chosen = [waiting.pop() for _ in range(min(free, len(waiting)))]
            try:
                slots.fill(chosen)
            except torch.OutOfMemoryError:
                waiting += [row for row in reversed(chosen) if row not in slots.rows.values()]
                raise
        elif not waiting:
            slots.compact()
        slots.decode()

    def _collect(self, chunks: dict[int, _Chunk]) -> list[tuple[int, _Chunk]]:
        touched = {}
        for row in self._slots.ended() if self._slots is not None else []:
            chunk = touched[row.chunk] = chunks[row.chunk]
            chunk.answers[row.position] = self.decoding.written(row.written)
            chunk.missing -= 1
        return list(touched.items())

    def _ready(self, waiting: list[Row]) -> Slots:
        """The slots, made anew where a waiting prompt is longer than they are."""
        if self._prefix is None:
            self._prefix = _shared_prefix([row.request.ids for row in waiting])
        needed = max((self._own(row) for row in waiting), default=0) + self.decoding.max_new_tokens
        if self._slots is None or needed > self._slots.cache.capacity:
            rows = list(self._slots.rows.values()) if self._slots is not None else []
            self._slots = None  # its memory is free before the next is made
            needed = max([needed, *(self._own(row) + self.decoding.max_new_tokens for row in rows)])
            self._slots = self._make(-(-needed // _ROUND) * _ROUND, min(self._most, len(waiting) + len(rows)))
            waiting += rows
        return self._slots

    def _own(self, row: Row) -> int:
        assert self._prefix is not None
        return len(row.request.ids) - (len(self._prefix) if begins_with(row.request.ids, self._prefix) else 0)

    def _make(self, capacity: int, most: int) -> Slots:
        assert self._prefix is not None
        num = most
        if self._by_memory:
            num = self._agreed(max(1, min(most, free_bytes(self.teacher) // (capacity * token_bytes(self.teacher)))))
        return Slots(self.teacher, self.decoding, num, capacity, self._prefix)

    def _agreed(self, value: int) -> int:
        """The least that any process of a tensor group says."""
        if self.teacher.group is None:
            return value
        least = torch.tensor(value, device=self.teacher.world.device)
        distributed.all_reduce(least, distributed.ReduceOp.MIN, group=self.teacher.group)
        return int(least)

    def _shrink(self, waiting: list[Row]) -> None:
        """Half as many slots; what was written is kept, and rows under way go on from their last token."""
        assert self._slots is None or self._slots.size > 0
        size = self._slots.size if self._slots is not None else self._most
        if size == 1 or self.teacher.group is not None:
            raise RuntimeError(
                f"the GPU's memory does not hold {size} request(s) beside the teacher: set teacher.batch_size lower, "
                "or teacher.sharding to tensor or zero3; what is written so far is kept"
            )
        waiting += list(self._slots.rows.values()) if self._slots is not None else []
        self._slots = None
        torch.cuda.empty_cache()
        self._most = size // 2
        _log.warning("teacher: out of memory; going on with %d requests at once", self._most)


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What nearly all prompts begin with; empty where that is too short to keep apart.

    In sorted order two prompts share what all between them share: a tenth at either end may begin otherwise.
    """
    if len(prompts) < 2:
        return ()
    ordered = sorted(map(tuple, prompts))
    first, last = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    shared = 0
    while shared < min(len(first), len(last)) - 1 and first[shared] == last[shared]:
        shared += 1
    return tuple(first[:shared]) if shared >= _SHORTEST_PREFIX else ()


def token_bytes(teacher: InferenceModel) -> int:
    """Keys and values of one token in all layers, on this process."""
    config = teacher.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parts = teacher.degree if teacher.sharding == "tensor" else 1
    return int(2 * config.num_hidden_layers * -(-heads // parts) * width * next(teacher.model.parameters()).element_size())


def free_bytes(teacher: InferenceModel) -> int:
    """Memory of this process's device that keys and values may take."""
    if teacher.world.device.type != "cuda":
        return 1 << 33
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(teacher.world.device)
    return int(min(free * _FREE_SHARE, max(free - _KEPT_FREE, free // 2)))
