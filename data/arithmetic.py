"""The built-in task: word problems of one to three steps, each with a worked solution. Pure Python.

A problem is drawn as a chain of numbers (`3+4-2`), told by an outline (a sentence for each step, with blanks) and a cast (who, what,
where). Outline and numbers decide the split: a test problem is no training problem with other names, under any seed. Its numbers may
have been met in training in other words.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from data.config import ArithmeticConfig

Split = Literal["train", "validation", "test"]
Operation = Literal["+", "-", "*", "/"]

_NAMES = {
    **dict.fromkeys(("Tom", "Ben", "Omar", "Ivan", "Luis", "Sam"), "he"),
    **dict.fromkeys(("Anna", "Mia", "Sara", "Lena", "Zoe", "Mei"), "she"),
}
_THINGS = ("apples", "pens", "books", "coins", "shells", "cards", "stamps", "eggs", "cups", "nuts")
_CONTAINERS = (("box", "boxes"), ("bag", "bags"), ("jar", "jars"), ("case", "cases"), ("tin", "tins"))
_PLACES = ("park", "shop", "school", "beach", "fair")

_STARTS = (
    "{name} has {n} {things}.",
    "{name} has {n} {things} in a {container}.",
    "There are {n} {things} in the {container} of {name}.",
    "{name} takes {n} {things} to the {place}.",
    "At the {place}, {name} gets {n} {things}.",
)
_QUESTIONS = ("How many {things} does {name} have now?", "How many {things} does {he} have?", "Count the {things} of {name}.")

# What the story says of a step, and what the solution says of it. A story that a product or a quotient closes asks its own question.
_GROUPS = (
    ("{name} has {m} {containers} with {n} {things} in each.", "{m} {containers} of {n}"),
    ("{name} buys {m} {containers} of {n} {things}.", "{m} {containers} of {n}"),
    ("{name} fills {m} {containers} with {n} {things} each.", "{m} {containers} of {n}"),
)
_TOLD: dict[Operation, tuple[tuple[str, str], ...]] = {
    "+": (
        ("{he} buys {n} more.", "{he} buys {n}"),
        ("{he} finds {n} more at the {place}.", "{he} finds {n}"),
        ("{friend} gives {him} {n} more.", "{friend} gives {n}"),
        ("{he} gets {n} more from {friend}.", "{he} gets {n}"),
        ("Then {he} makes {n} more.", "{he} makes {n}"),
        ("Then {he} wins {n} more.", "{he} wins {n}"),
    ),
    "-": (
        ("{he} sells {n} of them.", "{he} sells {n}"),
        ("{he} loses {n} at the {place}.", "{he} loses {n}"),
        ("{he} gives {n} to {friend}.", "{he} gives {n}"),
        ("{friend} takes {n} of them.", "{friend} takes {n}"),
        ("Then {he} drops {n}.", "{he} drops {n}"),
        ("{he} leaves {n} at the {place}.", "{he} leaves {n}"),
    ),
    "*": (
        ("{friend} has {n} times as many. How many does {friend} have?", "{n} times as many"),
        ("If {he} had {n} times as many, how many would {he} have?", "{n} times as many"),
    ),
    "/": (
        ("{he} shares them equally among {n} friends. How many does each get?", "{n} equal shares"),
        ("{he} puts them equally into {n} {containers}. How many are in each?", "{n} equal shares"),
    ),
}
_BOUND = 2
"""No value on the way is above this many times `max_number`: what a small model can learn in a minute."""
_PATIENCE = 5000
"""Draws in a row without a new problem after which a split counts as exhausted."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The arithmetic of a problem: a number, then operations on the value so far."""

    start: int
    steps: tuple[tuple[Operation, int], ...]

    def __str__(self) -> str:
        return str(self.start) + "".join(f"{operation}{number}" for operation, number in self.steps)

    def values(self) -> list[int]:
        """The value before the first step and after each one."""
        values = [self.start]
        for operation, number in self.steps:
            values.append(_apply(operation, values[-1], number))
        return values


@dataclass(frozen=True, slots=True)
class Outline:
    """How a chain is told, with blanks for the cast and the numbers."""

    story: tuple[str, ...]
    solution: tuple[str, ...]


def generate(config: ArithmeticConfig, seed: int, split: Split) -> Iterator[dict[str, str]]:
    """The problems of one split, as rows with `input`, `label` and `rationale`.

    The same arguments give the same rows in every process, and fewer rows are the first ones of more. Within a split no two problems
    have the same text; a story with its numbers belongs to one split, whoever it is about, under every seed and every knob. Numbers in
    a problem are `max_number` at most; no value on the way is negative, fractional or above twice `max_number`.

    Raises:
        ValueError: if the split asks for more problems than there are.
    """
    rows = {"train": config.train_rows, "validation": config.validation_rows, "test": config.test_rows}[split]
    # A text as seed is hashed by SHA-512, alike in every process.
    draw = random.Random(f"{seed}/{split}/{config.min_steps}/{config.max_steps}/{config.max_number}")
    seen: set[str] = set()
    misses = 0
    while len(seen) < rows:
        chain = draw_chain(draw, draw.randint(config.min_steps, config.max_steps), config.max_number)
        outline = _outline(draw, chain)
        row = _tell(chain, outline, _cast(draw))
        if row["input"] not in seen and split_of(chain, outline) == split:
            misses = 0
            seen.add(row["input"])
            yield row
        elif (misses := misses + 1) == _PATIENCE:
            raise ValueError(
                f"task.arithmetic.{split}_rows is {rows}, but with max_steps {config.max_steps} and max_number {config.max_number} that "
                f"split has about {len(seen)} distinct problems: lower {split}_rows, or raise max_number or max_steps"
            )


def split_of(chain: Chain, outline: Outline) -> Split:
    """The split a story belongs to: 8 in 10 train, 1 validation, 1 test, by a hash of its blank sentences and its numbers."""
    bucket = int.from_bytes(hashlib.sha256(f"{chain} {outline.story}".encode()).digest()[:8]) % 10
    return "validation" if bucket == 8 else "test" if bucket == 9 else "train"


def draw_chain(draw: random.Random, num_steps: int, max_number: int) -> Chain:
    """A chain of `num_steps` operations, each drawn evenly among those that fit the value so far.

    Multiplying opens a problem (so many boxes of so many) or, like dividing, closes it.
    """
    start = draw.randint(2, max_number)
    value, steps = start, list[tuple[Operation, int]]()
    for position in range(num_steps):
        fitting = _fitting(value, max_number, closing=position == num_steps - 1, opening=position == 0)
        operation = draw.choice(list(fitting))
        number = draw.choice(fitting[operation])
        steps.append((operation, number))
        value = _apply(operation, value, number)
    return Chain(start, tuple(steps))


def _fitting(value: int, max_number: int, *, opening: bool, closing: bool) -> dict[Operation, list[int]]:
    """The operations that may follow on `value`, each with the numbers that keep it a whole one from 0 to the bound."""
    bound = _BOUND * max_number
    fitting: dict[Operation, list[int]] = {
        "+": list(range(1, min(max_number, bound - value) + 1)),
        "-": list(range(1, min(max_number, value) + 1)),
    }
    if opening or closing:
        fitting["*"] = [n for n in range(2, max_number + 1) if 0 < value * n <= bound]
    if closing:
        fitting["/"] = [n for n in range(2, max_number + 1) if value > 0 and value % n == 0]
    return {operation: numbers for operation, numbers in fitting.items() if numbers}


def _apply(operation: Operation, value: int, number: int) -> int:
    match operation:
        case "+":
            return value + number
        case "-":
            return value - number
        case "*":
            return value * number
        case "/":
            return value // number


def _outline(draw: random.Random, chain: Chain) -> Outline:
    """A sentence for each part of the chain, and what the solution says of each step."""
    # A product that opens a longer chain is told as groups, whose sum its owner then adds to or takes from.
    grouped = chain.steps[0][0] == "*" and (len(chain.steps) > 1 or draw.random() < 0.5)
    story = [] if grouped else [draw.choice(_STARTS)]
    solution = list[str]()
    for position, (operation, _) in enumerate(chain.steps):
        sentence, said = draw.choice(_GROUPS if grouped and position == 0 else _TOLD[operation])
        story.append(sentence)
        solution.append(said)
    if chain.steps[-1][0] in "+-" or (grouped and len(chain.steps) == 1):
        story.append(draw.choice(_QUESTIONS))
    return Outline(tuple(story), tuple(solution))


def _tell(chain: Chain, outline: Outline, cast: dict[str, str]) -> dict[str, str]:
    """The outline with its blanks filled: the problem, its answer and the worked solution."""
    values, numbers = chain.values(), [number for _, number in chain.steps]
    # A start that has a sentence of its own is told before the steps; the question, where there is one, has no number.
    told = [chain.start, *numbers] if "{n}" in outline.story[0] and "{m}" not in outline.story[0] else numbers
    told += [0] * (len(outline.story) - len(told))
    story = [sentence.format(m=chain.start, n=number, **cast) for sentence, number in zip(outline.story, told, strict=True)]
    solution = [
        f"{said.format(m=chain.start, n=number, **cast)}, so {before}{operation}{number}={after}."
        for said, (operation, number), before, after in zip(outline.solution, chain.steps, values, values[1:], strict=False)
    ]
    return {"input": _sentences(story), "label": str(values[-1]), "rationale": _sentences(solution)}


def _cast(draw: random.Random) -> dict[str, str]:
    """The people, things and places of one story, by their names in the templates."""
    name, friend = draw.sample(list(_NAMES), 2)
    container, containers = draw.choice(_CONTAINERS)
    he = _NAMES[name]
    people = {"name": name, "friend": friend, "he": he, "him": "him" if he == "he" else "her"}
    return {**people, "container": container, "containers": containers, "things": draw.choice(_THINGS), "place": draw.choice(_PLACES)}


def _sentences(texts: list[str]) -> str:
    """Sentences as one text, each with a capital (`capitalize` would take the capitals of names)."""
    return " ".join(text[0].upper() + text[1:] for text in texts)
