"""One example of a task, and the canonical JSON lines it is kept in. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class TaskExample:
    """A row that fits: what the model reads, and what it should answer."""

    id: str
    """Hash of input, label and choices (16 hex digits); `-2`, `-3`... for a row that repeats an earlier one."""
    input: str
    label: str
    choices: tuple[str, ...] = ()
    """The answer choices (metric `choice`), else empty."""
    rationale: str | None = None
    """A human rationale, where the task gives one."""
    fields: dict[str, Any] = field(default_factory=dict)
    """The row as it was read; a recorded teacher's templates read it."""


def write_examples(path: Path, examples: Iterable[TaskExample]) -> None:
    """Writes one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples)


def read_examples(path: Path) -> Iterator[TaskExample]:
    """The examples that `write_examples` wrote, in order."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            values = json.loads(line)
            yield TaskExample(**{**values, "choices": tuple(values["choices"])})
