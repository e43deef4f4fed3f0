"""Codes of whole numbers as bits, vectorised: Golomb-Rice in blocks that adapt, and Elias gamma. Imports no torch.

A code word has a part in unary and a part in binary. Each array's unary parts stand together, and so do its binary parts: then the ends
of all words are found at once, and no number waits for the one before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
"""Numbers that share a Rice parameter: enough to pay for its 5 bits, few enough to follow a change of scale."""
_PARAMETER_BITS = 5
_CANDIDATES = np.array([-2, -1, 0])
"""Rice parameters that are tried, from the length of the block's mean in bits: the shortest code is nearly always among them."""

_USED = {size: np.arange(size, 0, -1) <= np.arange(size + 1)[:, None] for size in (8, 16, 32)}

Bits = NDArray[np.uint8]
Whole = NDArray[np.int64]


class BitWriter:
    """Collects arrays of whole numbers below 2^32."""

    def __init__(self) -> None:
        self._parts: list[Bits] = []

    def binary(self, values: Whole, widths: Whole | int) -> None:
        """Writes each value in its number of bits (0 to 32), or all in the same number."""
        if not len(values):
            return
        assert values.max() < 1 << 32, "a value does not fit 32 bits"
        size = _word_size(widths)
        bits = np.unpackbits(values.astype(f">u{size // 8}").view(np.uint8))
        self._parts.append(bits.reshape(-1, size)[:, size - widths :].ravel() if isinstance(widths, int) else bits[_used(widths, size)])

    def gamma(self, values: Whole) -> None:
        """Writes values of at least 1 in the Elias gamma code: short where most are 1 and a few are large."""
        lengths = _bit_lengths(values) - 1
        self._unary(lengths)
        self.binary(values - (1 << lengths), lengths)

    def rice(self, *arrays: Whole) -> None:
        """Writes arrays of values of at least 0 in the Golomb-Rice code, each block of `BLOCK` with the parameter that makes it shortest.

        A block ends with its array; arrays that are written at once are read at once.
        """
        values, sizes = np.concatenate(arrays), _block_sizes([len(array) for array in arrays])
        parameters = _rice_parameters(values, sizes)
        self.binary(parameters, _PARAMETER_BITS)
        widths = np.repeat(parameters, sizes)
        high = values >> widths
        self._unary(high)
        self.binary(values - (high << widths), widths)

    def to_bytes(self) -> bytes:
        """All that was written, filled up with zeros to whole bytes."""
        return np.packbits(np.concatenate([*self._parts, np.zeros(0, np.uint8)])).tobytes()

    def _unary(self, values: Whole) -> None:
        assert values.min(initial=0) >= 0, "a value is negative"
        ends = np.cumsum(values + 1)
        bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
        bits[ends - 1] = 1
        self._parts.append(bits)


class BitReader:
    """Reads what a `BitWriter` wrote, in the same order; it must be told how many numbers each array has."""

    def __init__(self, data: bytes) -> None:
        self._bits = np.unpackbits(np.frombuffer(data, np.uint8))
        self._ones = np.flatnonzero(self._bits.view(np.bool_))
        self._position = 0

    def binary(self, count: int, widths: Whole | int) -> Whole:
        """The next `count` values, written in these numbers of bits."""
        if not count:
            return np.zeros(0, np.int64)
        size = _word_size(widths)
        end = self._position + (widths * count if isinstance(widths, int) else int(widths.sum()))
        taken = self._bits[self._position : end]
        bits = np.zeros(count * size, np.uint8)
        if isinstance(widths, int):
            bits.reshape(count, size)[:, size - widths :] = taken.reshape(count, widths)
        else:
            bits[_used(widths, size)] = taken
        self._position = end
        return np.packbits(bits).view(f">u{size // 8}").astype(np.int64)

    def gamma(self, count: int) -> Whole:
        """The next `count` values in the Elias gamma code."""
        lengths = self._unary(count)
        return self.binary(count, lengths) + (1 << lengths)

    def rice(self, *counts: int) -> list[Whole]:
        """The next arrays, of `counts` values, in the Golomb-Rice code."""
        sizes, total = _block_sizes(counts), sum(counts)
        widths = np.repeat(self.binary(len(sizes), _PARAMETER_BITS), sizes)
        values = (self._unary(total) << widths) + self.binary(total, widths)
        ends = list(itertools.accumulate(counts))
        return [values[end - count : end] for count, end in zip(counts, ends, strict=True)]

    def _unary(self, count: int) -> Whole:
        first = int(self._ones.searchsorted(self._position))
        ends = self._ones[first : first + count]
        values = differences(ends, self._position - 1) - 1
        self._position = int(ends[-1]) + 1 if count else self._position
        return values


def differences(values: Whole, before: int) -> Whole:
    """Each value less the one before it, the first less `before`; `np.diff(prepend=)` takes three times as long."""
    found = values.copy()
    found[1:] -= values[:-1]
    found[:1] -= before
    return found


def _word_size(widths: Whole | int) -> int:
    widest = int(np.max(widths))
    return 8 if widest <= 8 else 16 if widest <= 16 else 32


def _used(widths: Whole, size: int) -> NDArray[np.bool_]:
    """Which bits of words of `size` bits a value of each width takes, word after word."""
    return _USED[size].take(widths, axis=0).ravel()


def _bit_lengths(values: Whole) -> Whole:
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def _block_sizes(counts: Sequence[int]) -> Whole:
    """How many values each block of these arrays has: `BLOCK`, or what is left of its array."""
    filled = [(count, -(-count // BLOCK)) for count in counts if count]
    sizes = np.full(sum(blocks for _, blocks in filled), BLOCK)
    last = -1
    for count, blocks in filled:
        last += blocks
        sizes[last] -= blocks * BLOCK - count
    return sizes


def _rice_parameters(values: Whole, sizes: Whole) -> Whole:
    if not len(sizes):
        return sizes
    starts = np.cumsum(sizes) - sizes
    means = np.add.reduceat(values, starts) // sizes
    tried = (_bit_lengths(means) + _CANDIDATES[:, None]).clip(0, 31)
    lengths = tried * sizes + np.add.reduceat(values >> np.repeat(tried, sizes, axis=1), starts, axis=1)
    best: Whole = tried[lengths.argmin(axis=0), np.arange(len(sizes))]
    return best
