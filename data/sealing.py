"""One shard of the record store as bytes: a Parquet file that says where it comes from, and in which no byte changes unnoticed.

The checksum stands in the file's own footer. It is that of the whole file with zeros in the checksum's place, so it covers data, footer
and label alike and is looked at before Arrow parses anything. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

CODEC = 2
"""Version of how records lie in a shard (columns, and the bytes of `data.packing`); another version is not read."""

_MAGIC = b"PAR1"
_LABEL = "stepdown"
_SEAL = b"stepdown-sha256="
_ZEROS = b"0" * 64


class ShardError(Exception):
    """Why a shard cannot be used, in a few words."""


def sealed(table: pa.Table, label: Mapping[str, str]) -> bytes:
    """A table as a zstd Parquet file with its label and checksum; the same table and label give the same bytes.

    Args:
        table: the records.
        label: where they come from, read back by `label_of`.
    """
    sink = pa.BufferOutputStream()
    # Texts and packed soft labels do not repeat, so a dictionary and the smallest and largest value would only take room.
    with pq.ParquetWriter(sink, table.schema, compression="zstd", use_dictionary=["split"], write_statistics=False) as writer:
        writer.write_table(table)
        described = json.dumps({"codec": CODEC, **label}, sort_keys=True)
        writer.add_key_value_metadata({_LABEL: described, f"{_LABEL}.seal": (_SEAL + _ZEROS).decode()})
    content: bytes = sink.getvalue().to_pybytes()
    return _with_checksum(content, hashlib.sha256(content).hexdigest().encode())


def opened(content: bytes) -> tuple[pa.Table, dict[str, str]]:
    """The table and the label of a shard whose checksum is right.

    Raises:
        ShardError: if it is truncated, damaged, or of another version.
    """
    verify(content)
    try:
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            label: dict[str, Any] = json.loads(file.metadata.metadata[_LABEL.encode()])
            table = file.read()
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise ShardError(f"cannot be read ({error})") from error
    if (codec := label.pop("codec", None)) != CODEC:
        raise ShardError(f"was written by another version (codec {codec}; this one reads {CODEC})")
    return table, label


def verify(content: bytes) -> None:
    """Compares a shard's bytes with its checksum.

    Raises:
        ShardError: if they differ, or there is none.
    """
    if len(content) < 2 * len(_MAGIC) or not content.startswith(_MAGIC):
        raise ShardError(f"is not a Parquet file ({len(content)} bytes)")
    if not content.endswith(_MAGIC):
        raise ShardError(f"is truncated or damaged at its end ({len(content)} bytes)")
    if (at := content.rfind(_SEAL)) < 0:
        raise ShardError("has no checksum: another version wrote it, or its end is damaged")
    found = content[at + len(_SEAL) : at + len(_SEAL) + len(_ZEROS)]
    if found != hashlib.sha256(_with_checksum(content, _ZEROS)).hexdigest().encode():
        raise ShardError("does not match its checksum (damaged or edited)")


def _with_checksum(content: bytes, checksum: bytes) -> bytes:
    at = content.rfind(_SEAL) + len(_SEAL)
    return content[:at] + checksum + content[at + len(checksum) :]
