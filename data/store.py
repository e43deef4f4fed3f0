"""The record store: Parquet shards that appear whole or not at all. Imports no torch.

A split is cut into chunks of `CHUNK` examples, in the order of the task's file, whatever the number of processes. Each chunk becomes
one shard, written under a temporary name and renamed when it is on disk; a chunk whose shard exists is done. So a killed teacher goes on
where it stopped, also with another number of processes, and no record is lost or doubled. The manifest is written last and names every
shard with its hash.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.records import SCHEMA, TeacherRecord
from data.soft_labels import TopK

CHUNK = 256
MANIFEST = "manifest.json"
_SOFT = ("label_soft", "rationale_soft")


def shard_path(folder: Path, split: str, chunk: int) -> Path:
    """Where the records of one chunk of a split lie."""
    return folder / f"{split}-{chunk:06d}.parquet"


def missing_chunks(folder: Path, split: str, num_examples: int) -> list[int]:
    """The chunks of a split of `num_examples` whose shard is not there yet."""
    return [c for c in range(-(-num_examples // CHUNK)) if not shard_path(folder, split, c).is_file()]


def write_shard(path: Path, records: Iterable[TeacherRecord]) -> None:
    """Writes records as one zstd Parquet file, by rename after fsync."""
    table = pa.Table.from_pylist([_to_row(record) for record in records], schema=SCHEMA)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, temporary, compression="zstd")
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def read_records(folder: Path, split: str) -> list[TeacherRecord]:
    """All records of a split, in the order of the task's file.

    Raises:
        RuntimeError: if a shard cannot be read or does not have the store's columns.
    """
    return [_from_row(row) for path in sorted(folder.glob(f"{split}-*.parquet")) for row in _read_table(path).to_pylist()]


def _read_table(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise RuntimeError(
            f"record shard {path} cannot be read ({error}): delete it and run again; only its chunk is written anew"
        ) from error
    if table.schema.names != SCHEMA.names:
        raise RuntimeError(
            f"record shard {path} has the columns {table.schema.names}, not {SCHEMA.names}: another version wrote it; delete the folder"
        )
    return table


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
            "or not in their order: delete the folder and run again"
        )


def manifest(folder: Path) -> dict[str, Any]:
    """Every shard with its bytes and sha256; the caller writes it as `MANIFEST`."""
    shards = sorted(folder.glob("*.parquet"))
    return {"shards": [{"file": p.name, "bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in shards]}


def _to_row(record: TeacherRecord) -> dict[str, Any]:
    row = {f.name: getattr(record, f.name) for f in fields(TeacherRecord)}
    return {**row, **{name: row[name].to_arrow() if row[name] is not None else None for name in _SOFT}}


def _from_row(row: dict[str, Any]) -> TeacherRecord:
    return TeacherRecord(**{**row, **{name: TopK.from_arrow(row[name]) if row[name] is not None else None for name in _SOFT}})
