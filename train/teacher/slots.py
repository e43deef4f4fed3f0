"""The slots of the decoding loop: the cache, the rows in it, and the step that gives each a token."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

from train.engine import InferenceModel
from train.teacher.attention import Joined, KeyValueCache, OneEach, attending
from train.teacher.draws import draw_keys
from train.teacher.generate import CHECK_EVERY, Decoding, choose
from train.teacher.writing import Request

_FEWEST_SLOTS = 32
"""Below this many rows a step reads little else than the weights: moving rows together gains nothing."""
_PREFILL_TOKENS = 16384
"""Tokens of prompts in one forward: enough to keep a GPU busy, few enough for memory."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Row:
    """A request on its way."""

    chunk: int
    position: int
    request: Request
    written: list[int] = field(default_factory=list)
    """Tokens known so far; a row that must start again goes on after them."""


class Slots:
    """The cache, the rows in it, and the step."""

    def __init__(self, teacher: InferenceModel, decoding: Decoding, size: int, capacity: int, prefix: tuple[int, ...]) -> None:
        self.teacher, self.decoding, self.size, self.prefix = teacher, decoding, size, prefix
        self.cache = KeyValueCache(size, capacity, len(prefix))
        self.rows: dict[int, Row] = {}
        self.active = size
        """Slots that a step works on: the first of them."""
        made: dict[str, Any] = {"device": teacher.world.device, "dtype": torch.int64}
        self.tokens, self.keys, self.counts = (torch.zeros(size, **made) for _ in range(3))
        self.lengths, self.prefixed = (torch.zeros(size, device=made["device"], dtype=torch.int32) for _ in range(2))
        # One column more than can be written: rows that have ended but not been seen to write there.
        self.out = torch.zeros(size, decoding.max_new_tokens + 1, **made)
        self._graphs: dict[int, Callable[[], None]] = {}
        self._ended: list[Row] = []
        if prefix:
            zero = ints([0], made["device"])
            batch = Joined(ints([0, len(prefix)], made["device"]), len(prefix), zero, zero, zero, as_prefix=True)
            self._forward(torch.tensor([prefix], **made), torch.arange(len(prefix), device=made["device"])[None], batch, None)

    @property
    def num_free(self) -> int:
        """Slots without a row."""
        return self.size - len(self.rows)

    def fill(self, rows: Sequence[Row]) -> None:
        """Puts rows into free slots: their prompts in forwards of at most `_PREFILL_TOKENS`, and their next token."""
        self.active = self.size
        free = [slot for slot in range(self.size) if slot not in self.rows]
        pairs = list(zip(free, rows, strict=False))
        while pairs:
            part = pairs[:1]
            tokens = len(self._own(part[0][1])[0])
            for slot, row in pairs[1:]:
                tokens += len(self._own(row)[0])
                if tokens > _PREFILL_TOKENS:
                    break
                part.append((slot, row))
            self._prefill(part)
            pairs = pairs[len(part) :]

    def _own(self, row: Row) -> tuple[list[int], bool]:
        """A row's tokens after the shared prefix, and whether it begins with that."""
        ids = [*row.request.ids, *row.written]
        prefixed = begins_with(row.request.ids, self.prefix)
        return ids[len(self.prefix) if prefixed else 0 :], prefixed

    def _prefill(self, pairs: Sequence[tuple[int, Row]]) -> None:
        device = self.tokens.device
        own = [self._own(row) for _, row in pairs]
        lengths = [len(ids) for ids, _ in own]
        slots, flags = ints([slot for slot, _ in pairs], device), ints([int(prefixed) for _, prefixed in own], device)
        ends = torch.tensor(lengths).cumsum(0)
        batch = Joined(ints([0, *ends.tolist()], device), max(lengths), slots, torch.zeros_like(slots), flags)
        positions = [torch.arange(len(ids)) + (len(self.prefix) if prefixed else 0) for ids, prefixed in own]
        ids = torch.tensor([token for ids, _ in own for token in ids])
        logits = self._forward(ids[None].to(device), torch.cat(positions)[None].to(device), batch, (ends - 1).to(device))
        at = slots.long()
        keys = draw_keys([row.request.key for _, row in pairs], device)
        counts = torch.tensor([len(row.written) for _, row in pairs], device=device)
        chosen = self._chosen(logits, keys, counts)
        written = torch.zeros(len(pairs), self.out.shape[1], dtype=torch.int64)
        for n, (_, row) in enumerate(pairs):
            written[n, : len(row.written)] = torch.tensor(row.written, dtype=torch.int64)
        self.out[at] = written.to(device).scatter_(1, counts[:, None], chosen[:, None])
        self.tokens[at], self.keys[at], self.counts[at] = chosen, keys, counts + 1
        self.lengths[at], self.prefixed[at] = ints(lengths, device), flags
        self.rows |= dict(pairs)

    def decode(self) -> None:
        """`CHECK_EVERY` steps, then a look at every row."""
        if not self.rows:
            return
        step = self._graphs.get(self.active) or self._captured(self.active)
        for _ in range(CHECK_EVERY):
            step()
        known = torch.cat([self.out[: self.active], self.counts[: self.active, None]], dim=1).tolist()
        most = self.decoding.max_new_tokens
        for slot, row in list(self.rows.items()):
            count = min(known[slot][-1], most)
            row.written = known[slot][:count]
            if count == most or self.decoding.ended(row.written):
                self._ended.append(self.rows.pop(slot))

    def ended(self) -> list[Row]:
        """Rows that have ended since the last call."""
        found, self._ended = self._ended, []
        return found

    def compact(self) -> None:
        """Moves the rows to the first slots where half of the steps' work would do."""
        smaller = self.active
        while smaller // 2 >= max(len(self.rows), _FEWEST_SLOTS):
            smaller //= 2
        if smaller == self.active:
            return
        moving = sorted(slot for slot in self.rows if slot >= smaller)
        into = [slot for slot in range(smaller) if slot not in self.rows][: len(moving)]
        if moving:
            source, target = (torch.tensor(slots, device=self.tokens.device) for slots in (moving, into))
            for tensor in (self.tokens, self.keys, self.counts, self.lengths, self.prefixed, self.out):
                tensor[target] = tensor[source]
            for layer in self.cache.layers.values():
                layer.keys[target], layer.values[target] = layer.keys[source], layer.values[source]
        for old, new in zip(moving, into, strict=True):
            self.rows[new] = self.rows.pop(old)
        self.active = smaller

    def _step(self, num: int) -> None:
        """One token for each of the first `num` slots, wholly on the device."""
        positions = (self.lengths[:num] + self.prefixed[:num] * len(self.prefix)).long()
        batch = OneEach(self.lengths[:num], self.prefixed[:num])
        logits = self._forward(self.tokens[None, :num], positions[None], batch, None)
        chosen = self._chosen(logits, self.keys[:num], self.counts[:num])
        self.out[:num].scatter_(1, self.counts[:num, None], chosen[:, None])
        self.tokens[:num].copy_(chosen)
        self.counts[:num].add_(1).clamp_(max=self.decoding.max_new_tokens)
        self.lengths[:num].add_(1).clamp_(max=self.cache.capacity - 1)

    def _captured(self, num: int) -> Callable[[], None]:
        """The step as a CUDA graph; as plain launches where the model cannot be captured."""
        step: Callable[[], None] = lambda: self._step(num)  # noqa: E731
        if self.tokens.is_cuda:
            before = [t.clone() for t in self._state]
            try:
                step = _capture(step)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                _log.warning("teacher: decoding without a CUDA graph, because it cannot be captured (%s)", str(error).split("\n")[0])
            for tensor, value in zip(self._state, before, strict=True):
                tensor.copy_(value)
        self._graphs[num] = step
        return step

    @property
    def _state(self) -> tuple[Tensor, ...]:
        return self.tokens, self.counts, self.lengths, self.out

    def _forward(self, ids: Tensor, positions: Tensor, batch: Joined | OneEach, keep: Tensor | None) -> Tensor:
        """Logits [n, V] of the row's tokens, or of those in `keep`."""
        with attending(self.teacher.model, self.cache, batch):
            found = self.teacher.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=0 if keep is None else keep)
        logits: Tensor = found.logits[0]
        return logits

    def _chosen(self, logits: Tensor, keys: Tensor, counts: Tensor) -> Tensor:
        chosen = choose(logits[:, : self.decoding.vocabulary], self.decoding.sampling, keys, counts)
        if self.teacher.group is not None:
            # Were one process of a tensor group to round otherwise, their texts would part for good.
            distributed.broadcast(chosen, distributed.get_global_rank(self.teacher.group, 0), group=self.teacher.group)
        return chosen


def _capture(step: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels and libraries load before the capture
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The threads of NCCL ask for events all the time, which a capture that heeds other threads takes for an error.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


def begins_with(ids: Sequence[int], prefix: Sequence[int]) -> bool:
    """`ids` are the prefix and at least one token more; nothing begins with an empty prefix."""
    return bool(prefix) and len(ids) > len(prefix) and tuple(ids[: len(prefix)]) == tuple(prefix)


def ints(values: Sequence[int], device: torch.device) -> Tensor:
    """Numbers as int32, as the attention takes them."""
    return torch.tensor(values, dtype=torch.int32, device=device)
