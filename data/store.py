"""The record store: Parquet shards that appear whole or not at all. Imports no torch.

A split is cut into chunks of `CHUNK` examples, in the order of the task's file, whatever the number of processes. Each chunk becomes
one shard (`data.sealing`), written under a temporary name and renamed when it is on disk; a chunk whose shard exists is done. So a killed
teacher goes on where it stopped, also with another number of processes, and no record is lost or doubled. The manifest is written last
and names every shard with its hash. Every reader verifies checksums; `data.store_check` compares a store with what it should hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from data.packing import pack, unpack
from data.records import SCHEMA, TeacherRecord
from data.sealing import ShardError, opened, sealed
from data.soft_labels import AnswerDistribution

CHUNK = 256
SPLITS = ("train", "test")
"""Whose examples get records."""
MANIFEST = "manifest.json"
STORE = "store.json"
"""Notes the configuration that writes the store, relative to its folder: what is damaged can be written anew with it."""
_SOFT = ("label_soft", "rationale_soft")


def shard_path(folder: Path, split: str, chunk: int) -> Path:
    """Where the records of one chunk of a split lie."""
    return folder / f"{split}-{chunk:06d}.parquet"


def missing_chunks(folder: Path, split: str, num_examples: int) -> list[int]:
    """The chunks of a split of `num_examples` whose shard is not there yet."""
    return [c for c in range(-(-num_examples // CHUNK)) if not shard_path(folder, split, c).is_file()]


@dataclass(frozen=True, slots=True)
class Part:
    """A share of the chunks of a store, for processes that write it beside others that they know nothing of."""

    index: int
    """From 0."""
    of: int

    def chunks(self, rows: Mapping[str, int]) -> dict[str, list[int]]:
        """The chunks of each split that are its own; those of all splits are dealt in turn.

        Args:
            rows: examples of each split, in the order of the splits.
        """
        every = [(split, chunk) for split, count in rows.items() for chunk in range(-(-count // CHUNK))]
        return {split: [chunk for of_split, chunk in every[self.index :: self.of] if of_split == split] for split in rows}

    def missing(self, folder: Path, rows: Mapping[str, int]) -> bool:
        """Whether a shard of its own is not there."""
        return any(set(own) & set(missing_chunks(folder, split, rows[split])) for split, own in self.chunks(rows).items())


def write_shard(path: Path, records: Iterable[TeacherRecord], label: Mapping[str, str] | None = None) -> None:
    """Writes records as one sealed Parquet file: temporary name, fsync, rename, fsync of the folder.

    Args:
        path: from `shard_path`.
        records: of one chunk, in the order of its examples.
        label: where they come from (`store_check.Origin.label`); what is left out is compared with nothing.
    """
    content = sealed(pa.Table.from_pylist([_to_row(record) for record in records], schema=SCHEMA), label or {})
    # The number of a process is its own within its node only.
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Removes the half-written shards of killed processes; nobody else may be writing."""
    for path in folder.glob(".*.parquet.*"):
        path.unlink(missing_ok=True)


def read_records(folder: Path, split: str) -> list[TeacherRecord]:
    """All records of a split, in the order of the task's file.

    Raises:
        RuntimeError: if a shard is damaged or of another version, or one that the manifest names is missing.
    """
    paths = sorted(folder.glob(f"{split}-*.parquet"))
    for lost in sorted(set(_named(folder, split)) - {path.name for path in paths}):
        raise RuntimeError(f"record shard {folder / lost} is missing: {remedy(folder)}")
    return [record for path in paths for record in read_shard(path)]


def read_shard(path: Path) -> list[TeacherRecord]:
    """The records of one shard.

    Raises:
        RuntimeError: if it is damaged or of another version.
    """
    try:
        return [_from_row(row) for row in load_shard(path)[0].to_pylist()]
    except ShardError as error:
        raise RuntimeError(f"record shard {path} {error}: {remedy(path.parent)}") from error


def load_shard(path: Path) -> tuple[pa.Table, dict[str, str]]:
    """The table and the label of one shard.

    Raises:
        ShardError: if it is damaged or of another version.
    """
    table, label = opened(path.read_bytes())
    if table.schema.names != SCHEMA.names:
        raise ShardError(f"has the columns {table.schema.names}, not {SCHEMA.names}: another version wrote it")
    return table, label


def remedy(folder: Path) -> str:
    """The commands that write anew what is bad in a store, and nothing else."""
    try:
        noted = json.loads((folder / STORE).read_text())["config"]
        config = os.path.relpath(folder / noted)
    except (OSError, ValueError, KeyError, TypeError):
        config = "CONFIG"  # of the run that wrote the store; a copied folder may not know it
    return f"`stepdown records repair {config}` deletes what is bad, and `stepdown run {config}` writes that anew and nothing else"


def check_complete(records: Sequence[TeacherRecord], ids: Sequence[str], folder: Path) -> None:
    """Each example has exactly one record, in order.

    Raises:
        RuntimeError: if one is missing, doubled or foreign.
    """
    found = [record.id for record in records]
    if found != list(ids):
        lost, foreign = set(ids) - set(found), set(found) - set(ids)
        raise RuntimeError(
            f"{folder}: {len(found)} records for {len(ids)} examples ({len(lost)} missing, {len(foreign)} of other examples), "
            f"or not in their order: {remedy(folder)}"
        )


def manifest(folder: Path) -> dict[str, Any]:
    """Every shard with its bytes and sha256; the caller writes it as `MANIFEST`."""
    shards = sorted(folder.glob("*.parquet"))
    return {"shards": [{"file": p.name, "bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in shards]}


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """What `MANIFEST` says of each file; nothing where it is not written yet or cannot be read."""
    try:
        return {shard["file"]: shard for shard in json.loads((folder / MANIFEST).read_text())["shards"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _named(folder: Path, split: str) -> list[str]:
    return [name for name in read_manifest(folder) if name.startswith(f"{split}-")]


def _to_row(record: TeacherRecord) -> dict[str, Any]:
    row = {f.name: getattr(record, f.name) for f in fields(TeacherRecord)}
    if record.answers is not None:
        pairs = zip(record.answers.answers, record.answers.probabilities, strict=True)
        row["answers"] = [{"answer": answer, "probability": probability} for answer, probability in pairs]
    return {**row, **{name: pack(row[name]) if row[name] is not None else None for name in _SOFT}}


def _from_row(row: dict[str, Any]) -> TeacherRecord:
    soft: dict[str, Any] = {name: unpack(row[name]) if row[name] is not None else None for name in _SOFT}
    if row["answers"] is not None:
        soft["answers"] = AnswerDistribution(
            tuple(pair["answer"] for pair in row["answers"]), tuple(pair["probability"] for pair in row["answers"])
        )
    return TeacherRecord(**{**row, **soft})
