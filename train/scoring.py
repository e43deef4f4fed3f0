"""Answers parsed and compared. Pure functions of text; never eval(). Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from data.answers import expression_value, match_choice, number_value
from data.config import Metric

RELATIVE_TOLERANCE = Fraction(1, 1_000_000)
"""Two values of which one is not a whole number are the same within this share of the larger."""


def parse_answer(text: str, metric: Metric, choices: Sequence[str]) -> str | None:
    """A usable answer in its canonical form, or None for one that cannot be used.

    Parsing a canonical form gives it back.

    Args:
        text: what a model or a recorded teacher wrote as its label.
        metric: `choice` (the choice as written), `number` (a decimal), `expression` (its exact value, `p` or `p/q`) or `text`
            (case, spacing and a full stop at the end do not count).
        choices: the answer choices (metric `choice`), else empty.
    """
    if metric == "choice":
        return match_choice(text, choices)
    if metric == "number":
        number = number_value(text)
        return None if number is None else _plain_decimal(format(number, "f"))
    if metric == "expression":
        value = expression_value(text)
        return None if value is None else str(value)
    return " ".join(text.split()).casefold().rstrip(". ") or None


def _plain_decimal(digits: str) -> str:
    plain = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return "0" if plain == "-0" else plain


def equal(answer: str | None, label: str, metric: Metric, choices: Sequence[str]) -> bool:
    """Whether an answer, raw or from `parse_answer`, is the label; values are compared by value, an unusable answer never is.

    Whole numbers must agree exactly, others within a relative 1e-6.
    """
    parsed = None if answer is None else parse_answer(answer, metric, choices)
    gold = parse_answer(label, metric, choices)
    if parsed is None or gold is None:
        return False
    if metric in ("choice", "text"):
        return parsed == gold
    return _same_value(Fraction(parsed), Fraction(gold))


def _same_value(left: Fraction, right: Fraction) -> bool:
    if left.denominator == right.denominator == 1:
        return left == right
    return abs(left - right) <= RELATIVE_TOLERANCE * max(abs(left), abs(right))
