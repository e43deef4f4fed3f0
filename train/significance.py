"""Is one model better than another on the same items, and how sure is one model's accuracy? Pure Python, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Two models on the same items: only the items on which they differ tell them apart."""

    gained: int
    """Items that a gets wrong and b gets right."""
    lost: int
    """Items that a gets right and b gets wrong."""
    p_value: float
    """Exact, two-sided: how often a fair coin splits the discordant items at least this unevenly."""


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> PairedTest:
    """Exact McNemar test of b against a.

    Args:
        a: for each item, whether the first model is right.
        b: the same items in the same order, for the second model.

    Raises:
        ValueError: if the two have different lengths.

    Source: McNemar (1947), with the binomial distribution in place of its chi-square approximation.
    """
    if len(a) != len(b):
        raise ValueError(f"a paired test needs the same items on both sides: a has {len(a)}, b has {len(b)}")
    gained = sum(not x and bool(y) for x, y in zip(a, b, strict=True))
    lost = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    return PairedTest(gained, lost, _two_sided(gained, lost))


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for an accuracy, as two shares (0 to 1).

    It stays inside 0 to 1 and keeps its width where all or none are right, which the normal interval does not.

    Args:
        correct: items answered right.
        n: items asked.
        confidence: share of such intervals that hold the true accuracy, between 0 and 1.

    Raises:
        ValueError: if n is not positive, correct is not in 0 to n, or confidence not strictly between 0 and 1.

    Source: Wilson (1927), without continuity correction.
    """
    if n < 1:
        raise ValueError(f"n is {n}: an interval needs at least one item")
    if not 0 <= correct <= n:
        raise ValueError(f"correct is {correct}, outside 0 to n ({n})")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}: give a share strictly between 0 and 1, such as 0.95")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = correct / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    # The ends are exactly 0 and 1 there; rounding would leave 1e-17.
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == n else centre + half
    return low, high


def _two_sided(gained: int, lost: int) -> float:
    """min(1, 2 P(X <= fewer)) for X binomial(gained + lost, 1/2).

    The largest term is a quotient of integers, which Python rounds once however long they are, so nothing overflows; the
    others follow from it by their ratios.
    """
    num_pairs, fewer = gained + lost, min(gained, lost)
    term = total = math.comb(num_pairs, fewer) / (1 << num_pairs)
    for k in range(fewer, 0, -1):
        term *= k / (num_pairs - k + 1)
        total += term
        if term < total * 1e-18:
            break
    return min(1.0, 2 * total)
