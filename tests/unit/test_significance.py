from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import binomtest

from train.significance import PairedBootstrap, PairedTest, mcnemar, paired_bootstrap, wilson


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


# ----- several seeds -----

Arm = list[list[bool]]


def bits(*seeds: str) -> Arm:
    return [[mark == "1" for mark in seed] for seed in seeds]


def test_arms_that_answer_alike_do_not_differ() -> None:
    arm = bits("110010", "110010")
    assert paired_bootstrap(arm, arm) == PairedBootstrap(0.0, 0.0, 0.0, 1.0)


def test_an_arm_that_is_right_where_the_other_is_wrong_everywhere() -> None:
    # Every draw of items gives the difference 1: none lies away from it, and p is as small as 99 draws let it be.
    found = paired_bootstrap(bits("0000", "0000"), bits("1111"), draws=99)
    assert found == PairedBootstrap(1.0, 1.0, 1.0, 1 / 100)


def test_one_seed_each_by_hand() -> None:
    # Two items, one gained: a draw takes it 0, 1 or 2 times of 2, so that the difference is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4.
    # Off by 1/2 or more in half of the draws; the interval takes in all of them.
    found = paired_bootstrap(bits("10"), bits("11"), draws=40_000)
    assert (found.difference, found.low, found.high) == (0.5, 0.0, 1.0)
    assert found.p_value == pytest.approx(0.5, abs=0.01)


def test_the_mean_difference_is_over_all_seeds_of_each_arm() -> None:
    found = paired_bootstrap(bits("1100", "1000"), bits("1111", "1110", "1100"))
    assert found.difference == pytest.approx((4 + 3 + 2) / 12 - (2 + 1) / 8)


def random_arms(seeds: int, items: int, *, gain: float, spread: float, seed: int) -> tuple[Arm, Arm]:
    """Items of every difficulty; trainings that scatter over them, and whose own level moves by `spread`."""
    random = np.random.default_rng(seed)
    hard = random.normal(size=items)
    arms = []
    for shift in (0.0, gain):
        own = 0.5 * random.normal(size=items)
        level = spread * random.normal(size=(seeds, 1))
        arms.append((hard + own + level + shift + 0.7 * random.normal(size=(seeds, items)) > 0).tolist())
    return arms[0], arms[1]


def test_with_one_seed_it_is_the_bootstrap_of_items() -> None:
    a, b = random_arms(1, 400, gain=0.2, spread=0.0, seed=1)
    difference = np.array(b[0], float) - np.array(a[0], float)
    found = paired_bootstrap(a, b, draws=40_000)
    error = float(difference.std()) / math.sqrt(400)
    assert found.high - found.difference == pytest.approx(1.96 * error, rel=0.05)
    assert found.difference - found.low == pytest.approx(found.high - found.difference)


def test_seeds_that_differ_as_a_whole_count_with_students_t() -> None:
    # All items of a seed are answered alike, so that items say nothing and seeds everything: 3 and 1 of 4 right in the mean.
    a, b = [[True] * 50, [False] * 50, [False] * 50, [False] * 50], [[True] * 50] * 3 + [[False] * 50]
    found = paired_bootstrap(a, b, draws=200_000)
    # Variance of a seed 3/16 * 4/3 = 1/4 in each arm; standard error of the difference sqrt(1/4 * 2/4) = 0.354, with 6 degrees of freedom.
    assert found.difference == 0.5
    assert found.high - 0.5 == pytest.approx(stats.t.ppf(0.975, 6) * math.sqrt(1 / 8), rel=0.02)
    assert found.p_value == pytest.approx(2 * stats.t.sf(0.5 / math.sqrt(1 / 8), 6), rel=0.02)


def test_scatter_over_items_is_not_counted_again_in_the_seeds() -> None:
    # Each seed answers each item by a coin of its own: 8 x 500 independent answers, whose difference has the error sqrt(2 / 4 / 4000).
    random = np.random.default_rng(3)
    halves = []
    for _ in range(40):
        a, b = (random.random((8, 500)) < 0.5 for _ in range(2))
        found = paired_bootstrap(a.tolist(), b.tolist(), draws=2000)
        halves.append(found.high - found.difference)
    assert float(np.median(halves)) == pytest.approx(1.96 * math.sqrt(2 / 4 / 4000), rel=0.15)


@pytest.mark.parametrize(("seeds", "spread"), [(4, 0.0), (4, 0.3), (2, 0.0), (2, 0.3)])
def test_a_difference_is_found_where_there_is_none_about_as_often_as_promised(seeds: int, spread: float) -> None:
    found = [paired_bootstrap(*random_arms(seeds, 200, gain=0.0, spread=spread, seed=n), draws=500).p_value < 0.05 for n in range(300)]
    # 5 % promised: 15 of 300, give or take; up to 9 % where two seeds must speak of a large spread.
    assert 2 <= sum(found) <= 30


def test_a_difference_that_is_there_is_found() -> None:
    found = [paired_bootstrap(*random_arms(4, 400, gain=0.25, spread=0.0, seed=n), draws=500) for n in range(100)]
    assert sum(test.p_value < 0.05 for test in found) > 75
    assert all((test.p_value < 0.05) == (not test.low <= 0 <= test.high) for test in found)


def test_the_same_seed_draws_the_same() -> None:
    a, b = random_arms(3, 50, gain=0.3, spread=0.2, seed=5)
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b)
    assert paired_bootstrap(a, b) != paired_bootstrap(a, b, seed=1)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ([], bits("1"), {}, r"a has 0 seeds, with \[\] items: give a seed or more"),
        (bits("1"), bits("1", "11"), {}, r"b has 2 seeds, with \[1, 2\] items"),
        (bits(""), bits("1"), {}, r"a has 1 seeds, with \[0\] items"),
        (bits("11"), bits("111"), {}, "the same items on both sides: a has 2, b has 3"),
        (bits("1"), bits("1"), {"draws": 0}, "draws is 0 and confidence 0.95: give at least one draw"),
        (bits("1"), bits("1"), {"confidence": 1.0}, "confidence 1.0: give at least one draw, and a share strictly between 0 and 1"),
    ],
)
def test_the_bootstrap_needs_answers_to_the_same_items(a: Arm, b: Arm, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(a, b, **options)  # type: ignore[arg-type]
