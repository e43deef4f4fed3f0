from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.bits import BLOCK, BitReader, BitWriter, differences

NUMBERS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2000), st.integers(0, 2**32 - 2)), max_size=3 * BLOCK)


def whole(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def bit_text(data: bytes) -> str:
    return "".join(f"{byte:08b}" for byte in data)


def packed_text(text: str) -> bytes:
    text = text.replace(" ", "")
    return bytes(int(text[start : start + 8].ljust(8, "0"), 2) for start in range(0, len(text), 8))


def test_binary_by_hand() -> None:
    writer = BitWriter()
    writer.binary(whole([5, 0, 1]), whole([3, 0, 2]))
    writer.binary(whole([1, 2]), 4)
    assert writer.to_bytes() == packed_text("101 01 0001 0010")


def test_gamma_by_hand() -> None:
    writer = BitWriter()
    writer.gamma(whole([1, 2, 3, 4]))
    # The lengths less one in unary, then what follows the leading one.
    assert writer.to_bytes() == packed_text("1 01 01 001  0 1 00")


def test_rice_by_hand() -> None:
    writer = BitWriter()
    writer.rice(whole([5, 3]))
    # Parameter 1 makes 7 bits of them (0: 10, 2: 7 as well, 3: 8); 5 is 2 and 1, 3 is 1 and 1.
    assert writer.to_bytes() == packed_text("00001  001 01  1 1")


def rice_decoded(text: str, count: int) -> list[int]:
    """The code read bit by bit."""
    num_blocks = -(-count // BLOCK)
    parameters = [int(text[5 * b : 5 * b + 5], 2) for b in range(num_blocks)]
    at, high, values = 5 * num_blocks, [], []
    for _ in range(count):
        end = text.index("1", at)
        high.append(end - at)
        at = end + 1
    for n in range(count):
        width = parameters[n // BLOCK]
        values.append((high[n] << width) + int(text[at : at + width] or "0", 2))
        at += width
    return values


@settings(max_examples=50, deadline=None)
@given(NUMBERS)
def test_rice_is_read_bit_by_bit_too(values: list[int]) -> None:
    writer = BitWriter()
    writer.rice(whole(values))
    assert rice_decoded(bit_text(writer.to_bytes()), len(values)) == values


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["rice", "gamma", "binary", "fixed"]), NUMBERS), max_size=5))
def test_arrays_come_back_in_order(arrays: list[tuple[str, list[int]]]) -> None:
    writer = BitWriter()
    for kind, values in arrays:
        match kind:
            case "rice":
                writer.rice(whole(values))
            case "gamma":
                writer.gamma(whole(values) + 1)
            case "binary":
                writer.binary(whole(values), whole([value.bit_length() for value in values]))
            case _:
                writer.binary(whole(values), 32)
    reader = BitReader(writer.to_bytes())
    for kind, values in arrays:
        match kind:
            case "rice":
                (found,) = reader.rice(len(values))
            case "gamma":
                found = reader.gamma(len(values)) - 1
            case "binary":
                found = reader.binary(len(values), whole([value.bit_length() for value in values]))
            case _:
                found = reader.binary(len(values), 32)
        assert (found.dtype, found.tolist()) == (np.dtype(np.int64), values)


@settings(max_examples=50, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=4))
def test_arrays_that_are_written_at_once_are_read_at_once(arrays: list[list[int]]) -> None:
    writer = BitWriter()
    writer.rice(*map(whole, arrays))
    writer.gamma(whole([7]))
    reader = BitReader(writer.to_bytes())
    assert [found.tolist() for found in reader.rice(*map(len, arrays))] == arrays
    assert reader.gamma(1).tolist() == [7]


def test_a_block_ends_with_its_array() -> None:
    writer = BitWriter()
    writer.rice(whole([5, 3]), whole([]), whole([0]))
    # The parameters 1 and 0, then all unary parts, then all others.
    assert writer.to_bytes() == packed_text("00001 00000  001 01 1  1 1")


@pytest.mark.parametrize("mean", [0.1, 0.7, 3.0, 50.0, 1e3, 1e6])
def test_a_geometric_distribution_takes_little_more_than_its_entropy(mean: float) -> None:
    p = 1 / (1 + mean)
    values = np.random.default_rng(0).geometric(p, 64 * BLOCK).astype(np.int64) - 1
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) / p
    writer = BitWriter()
    writer.rice(values)
    bits = 8 * len(writer.to_bytes()) / len(values)
    # Unary alone spends 1 bit at least; a block spends 5 on its parameter.
    assert bits <= max(1.1 * entropy, 1 + mean) + 5 / BLOCK + 0.1


@pytest.mark.parametrize("tail", [0, 10_000])
def test_no_parameter_is_much_shorter_than_the_one_that_was_chosen(tail: int) -> None:
    random = np.random.default_rng(1)
    scales = random.choice([0.3, 4.0, 100.0, 5e5], (200, 1))
    values = random.exponential(scales, (200, BLOCK)).astype(np.int64)
    values[:, 0] += tail
    best = sum(min(int((block >> r).sum()) + BLOCK * (r + 1) for r in range(32)) + 5 for block in values)
    writer = BitWriter()
    writer.rice(values.ravel())
    assert best <= 8 * len(writer.to_bytes()) <= 1.03 * best


def test_a_number_out_of_range_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="a value is negative"):
        BitWriter().rice(whole([3, -1]))
    with pytest.raises(AssertionError, match="a value is negative"):
        BitWriter().gamma(whole([3, 0]))
    with pytest.raises(AssertionError, match="a value does not fit 32 bits"):
        BitWriter().binary(whole([0, 1 << 32]), 32)


def test_differences_are_those_of_numpy() -> None:
    values = whole([3, 4, 9, 2])
    assert differences(values, -1).tolist() == np.diff(values, prepend=-1).tolist() == [4, 1, 5, -7]
    assert differences(whole([]), 5).tolist() == []
