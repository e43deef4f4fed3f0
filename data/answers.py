"""What an answer's text means: a choice, a number, or the value of an arithmetic expression. Never eval(). Imports no torch.

The loader checks gold labels with these, the scorer reads a model's answers with them: one reading for both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

MAX_CHARACTERS = 500
"""Longer texts are no number and no expression: a model that runs on must not cost time, or digits without end."""
MAX_NESTING = 50
"""Brackets and signs inside one another; deeper ones are not read."""

_NUMBER = re.compile(r"([+-]?)\$?\s?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)([eE][+-]?[0-9]{1,2})?\s?%?\.?")
_TOKEN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+|[-+*/()])")
_LETTERED = re.compile(r"\(?([A-Za-z])\)\s*(.*)", re.DOTALL)


def match_choice(text: str, choices: Sequence[str]) -> str | None:
    """The choice that `text` names, as the choices write it; None where it names none.

    A choice's own text (white space around the answer aside) comes first; then `(b)`, `b)` and `(b) text`, the last only where the
    text is that of choice b. A full stop after any of these is read over where it is no part of the choice. Case counts,
    as it does in the published agreement figures of recorded teachers.
    """
    stripped = text.strip()
    for candidate in (text, stripped):
        if candidate in choices:
            return candidate
    if (choice := _lettered_choice(stripped, choices)) is not None:
        return choice
    bare = stripped.removesuffix(".")
    return bare if bare in choices else _lettered_choice(bare, choices)


def _lettered_choice(text: str, choices: Sequence[str]) -> str | None:
    if (lettered := _LETTERED.fullmatch(text)) is None:
        return None
    index = ord(lettered[1].lower()) - ord("a")
    if index >= len(choices) or lettered[2] not in ("", choices[index].strip()):
        return None
    return choices[index]


def gold_choice(label: str, choices: Sequence[str]) -> str | None:
    """The choice that a gold label means; None where it means none, or several.

    Gold labels are forgiven what answers are not: where nothing matches as written, case and white space do not count.
    """
    if (exact := match_choice(label, choices)) is not None:
        return exact
    loose = {choice for choice in choices if _loose(choice) == _loose(label)}
    return loose.pop() if len(loose) == 1 else None


def _loose(text: str) -> str:
    return " ".join(text.split()).casefold()


def number_value(text: str) -> Decimal | None:
    """The number that the whole text is, exactly; None where it is none.

    A `$` before it, a `%` or a full stop after it and thousands separators are read over (`50%` is 50).
    """
    if len(text) > MAX_CHARACTERS or (match := _NUMBER.fullmatch(text.strip())) is None:
        return None
    value = Decimal(match[1] + match[2].replace(",", "") + (match[3] or ""))
    return value if len(format(value, "f")) <= MAX_CHARACTERS else None


def expression_value(text: str) -> Fraction | None:
    """The exact value of an arithmetic expression: numbers, + - * / and brackets; None where it does not evaluate.

    A full stop after it is read over.
    """
    if len(text) > MAX_CHARACTERS or (tokens := _tokens(text.rstrip().removesuffix("."))) is None:
        return None
    try:
        value = _Reader(tokens).value()
    except (_UnreadableError, ZeroDivisionError):
        return None
    return value if len(str(value)) <= MAX_CHARACTERS else None


def _tokens(text: str) -> list[str] | None:
    tokens, position, text = [], 0, text.rstrip()
    while position < len(text):
        if (match := _TOKEN.match(text, position)) is None:
            return None
        tokens.append(match[1])
        position = match.end()
    return tokens


class _UnreadableError(Exception):
    """The tokens are no expression."""


class _Reader:
    """Recursive descent over `sum = product {(+|-) product}`, `product = atom {(*|/) atom}`, `atom = [+|-] atom | number | (sum)`."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = [*tokens, ""]
        self._next = 0
        self._depth = 0

    def value(self) -> Fraction:
        """The value of all tokens."""
        value = self._sum()
        if self._take() != "":
            raise _UnreadableError
        return value

    def _take(self) -> str:
        self._next += 1
        return self._tokens[self._next - 1]

    def _take_one_of(self, signs: str) -> str:
        token = self._tokens[self._next]
        return self._take() if token and token in signs else ""

    def _sum(self) -> Fraction:
        value = self._product()
        while sign := self._take_one_of("+-"):
            term = self._product()
            value = value + term if sign == "+" else value - term
        return value

    def _product(self) -> Fraction:
        value = self._atom()
        while sign := self._take_one_of("*/"):
            factor = self._atom()
            value = value * factor if sign == "*" else value / factor
        return value

    def _atom(self) -> Fraction:
        token = self._take()
        if token and token[0] in ".0123456789":
            return Fraction(token)
        if token not in ("+", "-", "(") or self._depth == MAX_NESTING:
            raise _UnreadableError
        self._depth += 1
        value = self._sum() if token == "(" else self._atom()
        if token == "(" and self._take() != ")":
            raise _UnreadableError
        self._depth -= 1
        return -value if token == "-" else value
