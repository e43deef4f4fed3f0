"""Votes counted by hand, by collections.Counter, and what no order of samples may change."""

from __future__ import annotations

import math
from collections import Counter
from operator import eq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import Metric
from data.consistency import Same, answer_distribution, majority
from train.scoring import equal

CHOICES = ("bank", "library", "park")


def same(metric: Metric) -> Same:
    return lambda left, right: equal(left, right, metric, CHOICES if metric == "choice" else ())


@pytest.mark.parametrize(
    ("answers", "metric", "winner", "votes"),
    [
        (["4", "5", "5.0"], "number", 1, 2),
        (["4", "4.0", "5", "5"], "number", 0, 2),
        (["5", "4", "4", "5"], "number", 0, 2),
        ([None, None, "7"], "number", 2, 1),
        ([None, None], "number", 0, 2),
        (["3"], "number", 0, 1),
        ([None], "number", 0, 1),
        (["2 * 3", "10 / 3", "3.3333333", "(4 + 2)", "6"], "expression", 0, 3),
        (["park", "(b)", "library"], "choice", 1, 2),
        (["A cat", "a dog", "a  CAT."], "text", 0, 2),
    ],
)
def test_the_majority(answers: list[str | None], metric: Metric, winner: int, votes: int) -> None:
    assert majority(answers, same(metric)) == (winner, votes)


def test_the_distribution_is_over_answers_as_they_were_first_written() -> None:
    found = answer_distribution(["4.0", None, "5", "4", "4.00", None], same("number"))
    assert found is not None
    assert (found.answers, found.probabilities) == (("4.0", "5"), (0.75, 0.25))


def test_no_answer_gives_no_distribution() -> None:
    assert answer_distribution([None, None], eq) is None


ANSWERS = st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=20)


@given(ANSWERS)
def test_counting_agrees_with_a_counter(answers: list[str | None]) -> None:
    counts = Counter(answer for answer in answers if answer is not None)
    winner, votes = majority(answers, eq)
    found = answer_distribution(answers, eq)
    if not counts:
        assert (winner, votes, found) == (0, len(answers), None)
        return
    best, most = counts.most_common(1)[0]  # of equals, the first met
    assert (answers[winner], votes, winner) == (best, most, answers.index(best))
    assert found is not None
    assert dict(zip(found.answers, found.probabilities, strict=True)) == {a: n / counts.total() for a, n in counts.items()}
    assert list(found.answers) == list(counts)
    assert math.isclose(sum(found.probabilities), 1.0)


@given(ANSWERS)
def test_a_sample_without_an_answer_changes_nothing_but_positions(answers: list[str | None]) -> None:
    if any(answer is not None for answer in answers):
        winner, votes = majority(answers, eq)
        assert majority([None, *answers, None], eq) == (winner + 1, votes)
        assert answer_distribution([None, *answers], eq) == answer_distribution(answers, eq)
