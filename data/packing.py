"""Soft labels as bytes that say what they are: `pack` and `unpack`. Imports no torch.

    2 bytes   K1 (top-k) or S1 (sampled): the format and its version
    4 bytes   CRC-32 of all other bytes
    the rest  codes of data/bits.py, filled up to a whole byte

Many tokens share their likely successors, so the distinct ids of a record stand once, ascending, as gaps; a token names its own by their
places among these, again ascending and as gaps. Of a log-probability the distance to the least of its token is stored, of a token's
counts all but the last, which follows from the number of draws. Rationales of CommonsenseQA scored by SmolLM2 (49,152 tokens) take
86 bytes a token as top-k with k = 32 and 23 as 50 draws, Parquet included (tests/bench/soft_labels.py).
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from data.bits import BitReader, BitWriter, Whole, differences
from data.soft_labels import Sampled, SoftLabels, TopK

LOG_PROB_STEP = 2.0**-10
"""Nats between two log-probabilities of `TopK` that can be told apart; the error is at most half of it, 0.0005."""
TARGET_STEP = 2.0**-16
"""The same for the target's log-probability: its error is at most 0.000008 nats, so that means can be compared to five digits."""
LEAST_LOG_PROB = -(2.0**15 - 1)
"""What is less comes back as this (its probability is 0 in any arithmetic), but for minus infinity, which comes back as itself."""

_TOP_K, _SAMPLED = b"K1", b"S1"
_CHECKSUM = struct.Struct("<I")
_TEMPERATURE = struct.Struct("<d")
_INFINITE = -1


def pack(labels: SoftLabels) -> bytes:
    """Soft labels as bytes.

    Ids, counts, draws and temperature come back exactly; log-probabilities to half of `LOG_PROB_STEP`, those of targets to half of
    `TARGET_STEP` (or to what fp32 tells apart, where that is coarser: below -256 nats).
    """
    writer = BitWriter()
    if isinstance(labels, TopK):
        kind = _TOP_K
        _write_top_k(writer, labels)
    else:
        kind = _SAMPLED
        _write_sampled(writer, labels)
    body = writer.to_bytes()
    return kind + _CHECKSUM.pack(zlib.crc32(kind + body)) + body


def unpack(data: bytes) -> SoftLabels:
    """The inverse of `pack`. A token's ids of `TopK` come most probable first, equal ones (after rounding) by id.

    Raises:
        RuntimeError: if the bytes are no soft labels, of another version, truncated or damaged.
    """
    kind, body = data[:2], data[2 + _CHECKSUM.size :]
    if kind not in (_TOP_K, _SAMPLED):
        raise RuntimeError(f"packed soft labels start with {kind!r}, not {_TOP_K!r} or {_SAMPLED!r}: another version wrote them, or damage")
    if data[2 : 2 + _CHECKSUM.size] != _CHECKSUM.pack(zlib.crc32(kind + body)):
        raise RuntimeError(f"packed soft labels ({len(data)} bytes) do not match their checksum: they are truncated or damaged")
    reader = BitReader(body)
    return _read_top_k(reader) if kind == _TOP_K else _read_sampled(reader)


def _write_top_k(writer: BitWriter, labels: TopK) -> None:
    num_tokens, k = labels.ids.shape
    order = np.argsort(labels.ids, axis=1)
    known, places = _places(np.take_along_axis(labels.ids, order, axis=1).ravel(), np.full(num_tokens, k))
    steps = _steps(np.take_along_axis(labels.log_probs, order, axis=1), LOG_PROB_STEP)
    least = steps.max(axis=1, initial=0)
    # 0 is kept for minus infinity.
    above = np.where(steps == _INFINITE, 0, least[:, None] - steps + 1)
    writer.gamma(np.array([num_tokens + 1, k + 1, len(known) + 1]))
    writer.rice(_target_steps(labels), known, places, least, above.ravel())


def _read_top_k(reader: BitReader) -> TopK:
    num_tokens, k, num_known = (int(n) for n in reader.gamma(3) - 1)
    targets, known, places, least, above = reader.rice(num_tokens, num_known, num_tokens * k, num_tokens, num_tokens * k)
    ids = _ids(known, places, np.full(num_tokens, k)).reshape(num_tokens, k)
    above = above.reshape(num_tokens, k)
    log_probs = _log_probs(np.where(above == 0, _INFINITE, least[:, None] - above + 1), LOG_PROB_STEP)
    order = np.argsort(-log_probs, axis=1, kind="stable")
    return TopK(np.take_along_axis(ids, order, axis=1), np.take_along_axis(log_probs, order, axis=1), _target_log_probs(targets))


def _write_sampled(writer: BitWriter, labels: Sampled) -> None:
    distinct = labels.distinct.astype(np.int64)
    known, places = _places(labels.ids, distinct)
    last = _is_last(distinct)
    sums = differences(np.cumsum(labels.counts, dtype=np.int64)[last], 0)
    assert (sums == labels.draws).all(), "counts do not add up to the draws"
    writer.gamma(np.array([len(labels) + 1, labels.draws, len(known) + 1, len(places) + 1]))
    writer.binary(np.frombuffer(_TEMPERATURE.pack(labels.temperature), "<u4").astype(np.int64), 32)
    writer.rice(_target_steps(labels), distinct, known, places)
    writer.gamma(labels.counts[~last].astype(np.int64))


def _read_sampled(reader: BitReader) -> Sampled:
    num_tokens, draws, num_known, num_ids = (int(n) for n in reader.gamma(4) - (1, 0, 1, 1))
    (temperature,) = _TEMPERATURE.unpack(reader.binary(2, 32).astype("<u4").tobytes())
    targets, distinct, known, places = reader.rice(num_tokens, num_tokens, num_known, num_ids)
    last = _is_last(distinct)
    counts = np.zeros(num_ids, np.int64)
    counts[~last] = reader.gamma(num_ids - num_tokens)
    counts[last] = draws - differences(np.cumsum(counts)[last], 0)
    ids = _ids(known, places, distinct)
    return Sampled(ids, counts.astype(np.int32), distinct.astype(np.int32), _target_log_probs(targets), draws, temperature)


def _places(ids: NDArray[np.int32], sizes: Whole) -> tuple[Whole, Whole]:
    """Joined lists of ids of `sizes`, ascending within each, as gaps: those of the distinct ids, and of each id's place among them."""
    known, places = np.unique(ids, return_inverse=True)
    gaps = differences(places, -1)
    starts = np.cumsum(sizes)[:-1]
    gaps[starts] = places[starts] + 1
    assert (gaps > 0).all(), "the ids of a token are not distinct and ascending"
    return differences(known.astype(np.int64), -1) - 1, gaps - 1


def _ids(known: Whole, places: Whole, sizes: Whole) -> NDArray[np.int32]:
    """The inverse of `_places`."""
    found = np.cumsum(places + 1)
    ends = np.cumsum(sizes)
    # The sum runs through all lists; each starts again at what it was before.
    before = found[ends - 1] - differences(found[ends - 1], 0)
    ids: NDArray[np.int32] = (np.cumsum(known + 1) - 1)[found - np.repeat(before, sizes) - 1].astype(np.int32)
    return ids


def _is_last(sizes: Whole) -> NDArray[np.bool_]:
    last = np.zeros(int(sizes.sum()), np.bool_)
    last[np.cumsum(sizes) - 1] = True
    return last


def _target_steps(labels: SoftLabels) -> Whole:
    return _steps(labels.target_log_probs, TARGET_STEP) - _INFINITE


def _target_log_probs(steps: Whole) -> NDArray[np.float32]:
    return _log_probs(steps + _INFINITE, TARGET_STEP)


def _steps(log_probs: NDArray[np.float32], step: float) -> Whole:
    """How many steps below 0; `_INFINITE` for minus infinity."""
    assert not np.isnan(log_probs).any(), "a log-probability is not a number"
    assert log_probs.max(initial=0.0) < 1e-3, "a log-probability is above 0"
    limited = np.clip(log_probs.astype(np.float64), LEAST_LOG_PROB, 0.0)
    return np.where(np.isneginf(log_probs), _INFINITE, np.rint(limited / -step)).astype(np.int64)


def _log_probs(steps: Whole, step: float) -> NDArray[np.float32]:
    return np.where(steps == _INFINITE, -np.inf, 0.0 - steps * step).astype(np.float32)
