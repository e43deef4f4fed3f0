from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from train.significance import PairedTest, mcnemar, wilson


def flags(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    a = [True] * both + [False] * gained + [True] * lost + [False] * neither
    b = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return a, b


def test_mcnemar_by_hand() -> None:
    # Six discordant items, one of them lost: 2 * (C(6,0) + C(6,1)) / 64 = 14 / 64.
    assert mcnemar(*flags(3, 5, 1, 2)) == PairedTest(gained=5, lost=1, p_value=14 / 64)


def test_mcnemar_of_equal_answers_is_one() -> None:
    assert mcnemar([True, False], [True, False]) == PairedTest(0, 0, 1.0)
    assert mcnemar([], []) == PairedTest(0, 0, 1.0)


@pytest.mark.parametrize(("gained", "lost"), [(1, 0), (52, 35), (35, 52), (10, 10), (0, 40), (700, 610), (4000, 4200)])
def test_mcnemar_equals_scipy(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost, 0.5).pvalue
    assert mcnemar(*flags(2, gained, lost, 1)).p_value == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("lost", [50_000, 49_600, 45_000, 0])
def test_mcnemar_of_100_000_discordant_pairs(lost: int) -> None:
    p_value = mcnemar(*flags(0, 100_000 - lost, lost, 0)).p_value
    assert p_value == pytest.approx(binomtest(lost, 100_000, 0.5).pvalue, rel=1e-6)
    assert math.isfinite(p_value)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.booleans())))
def test_mcnemar_turned_round_swaps_gained_and_lost(pairs: list[tuple[bool, bool]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    there, back = mcnemar(a, b), mcnemar(b, a)
    assert (there.gained, there.lost, there.p_value) == (back.lost, back.gained, back.p_value)
    assert 0 < there.p_value <= 1
    assert there.gained - there.lost == sum(b) - sum(a)


def test_mcnemar_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="same items on both sides: a has 2, b has 1"):
        mcnemar([True, False], [True])


def test_wilson_by_hand() -> None:
    # z = 1.959964: 8 of 10, centre (0.8 + 0.192073) / 1.384146, half 0.226502.
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.490162, abs=1e-6)
    assert high == pytest.approx(0.943318, abs=1e-6)


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (1, 1), (405, 500), (74, 99_999)])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_wilson_equals_scipy(correct: int, n: int, confidence: float) -> None:
    expected = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    assert wilson(correct, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_touches_the_ends_only_at_all_or_none() -> None:
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0
    assert 0 < wilson(1, 7)[0] < 1 / 7 < wilson(1, 7)[1] < 1


@pytest.mark.parametrize(
    ("correct", "n", "confidence", "message"),
    [
        (0, 0, 0.95, "n is 0: an interval needs at least one item"),
        (5, 4, 0.95, "correct is 5, outside 0 to n"),
        (-1, 4, 0.95, "correct is -1, outside 0 to n"),
        (1, 4, 1.0, "confidence is 1.0: give a share strictly between 0 and 1"),
        (1, 4, 95, "confidence is 95: give a share strictly between 0 and 1"),
    ],
)
def test_wilson_refuses(correct: int, n: int, confidence: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wilson(correct, n, confidence)
