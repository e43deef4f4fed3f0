"""What a record store should hold, and whether it does. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data import store
from data.examples import TaskExample
from data.sealing import ShardError
from data.store import load_shard, read_manifest, remedy, shard_path

_SHOWN = 3
MISSING = "is missing"
STRANGER = "belongs to no chunk of this task"


@dataclass(frozen=True, slots=True)
class Origin:
    """Who writes a store, and how it is asked: what a folder's name promises, in each shard again."""

    teacher: str
    """Name and revision of the model, or the key of the tuned one."""
    tokenizer: str
    """Hash of the teacher's tokenizer; empty where it has none here (a server, a recorded teacher)."""
    template: str
    """Hash of all that makes a prompt of an example."""

    def label(self, examples: Sequence[TaskExample]) -> dict[str, str]:
        """What the shard of these examples says of itself."""
        return {**asdict(self), "examples": content_hash(examples)}


@dataclass(frozen=True, slots=True)
class ShardState:
    """One shard as it was found."""

    file: str
    fault: str | None
    """Why it cannot be used; None for a good one."""


def content_hash(examples: Sequence[TaskExample]) -> str:
    """sha256 over ids and inputs, in order."""
    digest = hashlib.sha256()
    for example in examples:
        for text in (example.id, example.input):
            digest.update(f"{len(text.encode())}:{text}".encode())
    return digest.hexdigest()


def check_store(folder: Path, splits: Mapping[str, Sequence[TaskExample]], origin: Origin) -> list[ShardState]:
    """Every shard that should be there or is, with what is wrong with it.

    Args:
        folder: of the store.
        splits: the examples of each split, in the order of the task's file.
        origin: who should have written it.
    """
    named = read_manifest(folder)
    expected = dict(_expected(folder, splits, origin))
    strangers = sorted(path.name for path in folder.glob("*.parquet") if path.name not in expected)
    states = [ShardState(name, _fault(folder / name, label, ids, named.get(name))) for name, (label, ids) in expected.items()]
    return states + [ShardState(name, STRANGER) for name in strangers]


def refuse_bad(folder: Path, states: Sequence[ShardState]) -> None:
    """A teacher adds nothing to a store with bad shards; those not written yet are no fault.

    Raises:
        RuntimeError: naming the first bad ones, with the commands that write them anew.
    """
    bad = [state for state in states if state.fault not in (None, MISSING)]
    if bad:
        told = "; ".join(f"{state.file} {state.fault}" for state in bad[:_SHOWN])
        more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise RuntimeError(f"{folder}: {len(bad)} of {len(states)} shards cannot be used: {told}{more}. {remedy(folder)}")


def _expected(
    folder: Path, splits: Mapping[str, Sequence[TaskExample]], origin: Origin
) -> Iterator[tuple[str, tuple[dict[str, str], list[str]]]]:
    for split, examples in splits.items():
        for chunk in range(-(-len(examples) // store.CHUNK)):
            part = examples[chunk * store.CHUNK : (chunk + 1) * store.CHUNK]
            yield shard_path(folder, split, chunk).name, (origin.label(part), [example.id for example in part])


def _fault(path: Path, label: Mapping[str, str], ids: Sequence[str], named: Mapping[str, Any] | None) -> str | None:
    if not path.is_file():
        return MISSING
    try:
        table, found = load_shard(path)
    except ShardError as error:
        return str(error)
    if foreign := [what for what in label if found.get(what) != label[what]]:
        return _foreign(foreign[0], found, label)
    if table.column("id").to_pylist() != list(ids):
        return "holds records of other examples"
    if named is not None and named.get("sha256") != hashlib.sha256(path.read_bytes()).hexdigest():
        return "is not the file that the manifest names"
    return None


def _foreign(what: str, found: Mapping[str, str], label: Mapping[str, str]) -> str:
    if what == "teacher":
        return f"was written by another teacher ({found.get(what)!r}; here it is {label[what]!r})"
    reasons = {
        "tokenizer": "was written with another tokenizer",
        "template": "was written with another prompt template",
        "examples": "holds records of other examples",
    }
    return reasons[what]
