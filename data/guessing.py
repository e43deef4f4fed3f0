"""What the columns of a file are for, guessed from their names and values. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data.answers import number_value
from data.config import MAX_CHOICES
from data.tasks import field_problem

_LABELS = "label answer target output completion response class category sentiment intent summary translation result expected gold y"
_RATIONALES = "rationale explanation solution reasoning cot chain_of_thought steps work"
_CHOICES = "choices options candidates answers"
_IDS = ("id", "idx", "index", "uuid", "guid", "key", "row")
_MAX_CLASS_CHARACTERS = 40
_ROWS_A_CLASS = 5
_NEARLY_ALL = 0.99
_MAX_NUMBER_CLASSES = 5
"""Numbers with more different values than this are compared as numbers: stars and flags are classes, amounts are not."""


@dataclass(frozen=True, slots=True)
class Guess:
    """How a row becomes an input and a label, and why."""

    inputs: list[str]
    """Columns, in the file's order."""
    label: str
    metric: Literal["choice", "number", "text"]
    why: str
    """Of the metric, in words."""
    choices: str | list[str] | None = None
    """A column that lists them, or those of all rows."""
    rationale: str | None = None
    left_out: tuple[str, ...] = ()
    """Columns that serve nothing."""
    unlabelled: float = 0.0
    """Share of the rows that have no label."""
    input_bytes: int = 0
    """Of nearly all inputs (99 %), in UTF-8."""
    label_bytes: int = 0
    rationale_bytes: int = 0

    @property
    def template(self) -> str:
        """Of the input."""
        if len(self.inputs) == 1:
            return f"{{{self.inputs[0]}}}"
        return "\n".join(f"{name}: {{{name}}}" for name in self.inputs)


def guess(rows: Sequence[Mapping[str, Any]], where: str) -> Guess:
    """Which column is the label, which make the input, and how answers are compared.

    Args:
        rows: the first of a file.
        where: they come from, for messages.

    Raises:
        ValueError: if there are no rows, fewer than two columns that can be used, or no label that differs from row to row.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    named = [name for name in names if field_problem(name) is None]
    # Few rows without a label can be left out; of the other columns only those that nearly every row fills make an input.
    given = _named([name for name in named if _filled(rows, name) > 0.5 and not _is_nested(rows, name)], _LABELS, rows)
    usable = [name for name in named if name == given or _filled(rows, name) >= _NEARLY_ALL]
    if len(usable) < 2:
        unnamed = next((f"; {name!r} cannot be used: {field_problem(name)}" for name in names if name not in named), "")
        raise ValueError(f"{where} has {_told(names)}: an input and a label are needed, two columns with a header that names them{unnamed}")
    identifiers = [name for name in usable if _is_identifier(rows, name)]
    choices = _named(usable, _CHOICES, rows, lists=True)
    free = [name for name in usable if name not in (*identifiers, choices) and not _is_nested(rows, name)]
    label = given or (free[-1] if len(free) > 1 else None)
    if label is None:
        raise ValueError(f"{where} has {_told(names)}, of which none can be the label beside an input: add a column named label")
    rationale = _named([name for name in free if name != label], _RATIONALES, rows)
    inputs = [name for name in free if name not in (label, rationale)] or [name for name in identifiers if name != label]
    metric, why, classes = _metric([row.get(label) for row in rows], choices)
    return Guess(
        inputs=inputs + ([choices] if choices else []),
        label=label,
        metric=metric,
        why=why,
        choices=choices or classes,
        rationale=rationale,
        left_out=tuple(name for name in names if name not in (*inputs, label, rationale, choices)),
        unlabelled=1 - _filled(rows, label),
        input_bytes=sum(_bytes(rows, name) + len(name) for name in [*inputs, *([choices] if choices else [])]),
        label_bytes=_bytes(rows, label),
        rationale_bytes=_bytes(rows, rationale) if rationale else 0,
    )


def _metric(values: Sequence[Any], choices: str | None) -> tuple[Literal["choice", "number", "text"], str, list[str] | None]:
    labels = [str(value).strip() for value in values if value is not None and str(value).strip()]
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise ValueError(f"the label is the same in all rows ({classes[0] if classes else 'empty'}): there is nothing to learn")
    if choices:
        return "choice", f"each row lists its choices in {choices}", None
    are_numbers = all(number_value(label) is not None for label in labels)
    most = _MAX_NUMBER_CLASSES if are_numbers else MAX_CHOICES
    if len(classes) <= most and len(labels) >= _ROWS_A_CLASS * len(classes) and max(map(len, classes)) <= _MAX_CLASS_CHARACTERS:
        return "choice", f"{len(classes)} different labels in {len(labels):,} rows", classes
    if are_numbers:
        return "number", f"every label is a number, {len(classes):,} different ones", None
    return "text", f"{len(classes):,} different labels in {len(labels):,} rows", None


def _named(names: Sequence[str], wanted: str, rows: Sequence[Mapping[str, Any]], *, lists: bool = False) -> str | None:
    """The column whose name is the first wanted one, or ends in it; of lists only, or of none."""
    fitting = [name for name in names if _is_list(rows, name) == lists]
    for word in wanted.split():
        for name in fitting:
            plain = name.lower().replace(" ", "_").replace("-", "_")
            if plain == word or plain.endswith(f"_{word}"):
                return name
    return None


def _is_identifier(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    plain = name.lower()
    return plain in _IDS or plain.endswith(("_id", " id")) or plain.startswith("unnamed")


def _is_list(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [row.get(name) for row in rows[:100] if row.get(name)]
    return bool(values) and all(isinstance(v, list) or (isinstance(v, str) and ("|" in v or v.lstrip().startswith("["))) for v in values)


def _is_nested(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(isinstance(row.get(name), dict | list) for row in rows[:100])


def _filled(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """The share of rows that have a value there; one that misses its input or label is rejected."""
    return sum(row.get(name) not in (None, "") for row in rows) / len(rows)


def _bytes(rows: Sequence[Mapping[str, Any]], name: str) -> int:
    sizes = sorted(len(str(row.get(name, "")).encode(errors="replace")) for row in rows)
    return sizes[min(len(sizes) - 1, math.ceil(0.99 * len(sizes)))]


def _told(names: Sequence[str]) -> str:
    return f"the columns {', '.join(map(str, names))}" if names else "no row that can be read"
