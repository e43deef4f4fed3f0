"""Samples of what a teacher wrote, right and wrong, from its records. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data.examples import read_examples

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Written:
    """One training row, and what the teacher wrote for it."""

    input: str
    gold: str
    label: str | None
    agrees: bool
    rationale: str
    votes: int
    hinted: bool


def written(records_folder: Path, task_folder: Path, most: int) -> list[Written]:
    """The first training records whose label is the gold one, and the first whose is not; at most `most` of each.

    No more shards are read than it takes.
    """
    from data.store import read_shard  # pyarrow and numpy, which a report without records does not need

    shards = sorted(records_folder.glob("train-*.parquet"))
    examples = {example.id: example for example in read_examples(task_folder / "train.jsonl")} if shards else {}
    records = (record for path in shards for record in read_shard(path) if record.id in examples)
    chosen = first_of_each(((record.agrees, record) for record in records), most)
    return [
        Written(examples[r.id].input, examples[r.id].label, r.label, r.agrees, r.rationale or r.text, r.votes, r.rationalized)
        for r in chosen
    ]


def first_of_each(judged: Iterable[tuple[bool, T]], most: int) -> list[T]:
    """The first right ones, then the first wrong ones; reads no further than it must."""
    found: dict[bool, list[T]] = {True: [], False: []}
    for right, item in judged:
        if len(found[right]) < most:
            found[right].append(item)
        if all(len(items) == most for items in found.values()):
            break
    return found[True] + found[False]
