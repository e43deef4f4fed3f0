"""Which process writes which chunk, so that none is written twice and none waits for a slower one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import distributed

from data.examples import TaskExample
from data.store import CHUNK, missing_chunks
from train.engine import InferenceModel
from train.world import World


@dataclass(frozen=True, slots=True)
class Chunk:
    """Examples whose records make one shard."""

    split: str
    number: int
    examples: Sequence[TaskExample]
    kept: bool = True
    """False for a chunk that is answered only to stay in step with the others."""


def missing(folder: Path, split: str, examples: Sequence[TaskExample], world: World) -> list[Chunk]:
    """The chunks whose shard is not there, as the main process sees the folder: the same list on every process."""
    absent = torch.zeros(-(-len(examples) // CHUNK), dtype=torch.int64)
    if world.is_main:
        absent[missing_chunks(folder, split, len(examples))] = 1
    numbers = [n for n, is_absent in enumerate(world.sum(absent).tolist()) if is_absent]
    return [Chunk(split, n, examples[n * CHUNK : (n + 1) * CHUNK]) for n in numbers]


def claimed(chunks: Sequence[Chunk], world: World, teacher: InferenceModel | None) -> Iterator[Chunk]:
    """The chunks that this process takes, each when it asks for one; every process must call this.

    Args:
        chunks: the same on every process.
        world: the processes.
        teacher: placed on its devices; None where it is a server or an engine of its own, which the main process alone asks. The
            processes of a tensor group take the same chunks; where all must step together, each takes its turn, and one without a chunk
            gets another's, not to be kept.
    """
    if teacher is None:
        return iter(chunks if world.is_main else ())
    if teacher.in_step:
        return _turns(chunks, teacher)
    return _taken(chunks, _Counter(world, teacher))


class _Counter:
    """Gives every number from 0 up to one process, or to one tensor group."""

    def __init__(self, world: World, teacher: InferenceModel) -> None:
        self.world, self.teacher = world, teacher
        self.add = world.counter()

    def next(self) -> int:
        if self.teacher.group is None:
            return self.add(1) - 1
        taken = torch.tensor(self.add(1) - 1 if self.teacher.is_writer else 0, device=self.world.device)
        distributed.broadcast(taken, group=self.teacher.group, group_src=0)
        return int(taken)


def _taken(chunks: Sequence[Chunk], counter: _Counter) -> Iterator[Chunk]:
    while (n := counter.next()) < len(chunks):
        yield chunks[n]


def _turns(chunks: Sequence[Chunk], teacher: InferenceModel) -> Iterator[Chunk]:
    for first in range(0, len(chunks), teacher.num_groups):
        mine = first + teacher.group_rank
        yield chunks[mine] if mine < len(chunks) else replace(chunks[first], kept=False)
