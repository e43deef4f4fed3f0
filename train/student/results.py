"""What a sweep trains and what comes of it: one trial, and the file that says how it went. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.artifacts import write_json

TRIAL_FILE = "trial.json"


@dataclass(frozen=True, slots=True)
class Trial:
    """One training of one arm."""

    key: str
    """Hash of all that it reads; the name of its folder."""
    label: str
    """The arm and whose labels it learns: step_by_step@gold."""
    values: dict[str, str]
    """What the grid sets, as typed."""
    student: dict[str, Any]
    """The student's section of the configuration, with the arm, the grid's values, the seed and the share of the data."""
    seed: int
    fraction: float
    """Share of the training rows."""
    scored: bool
    """Answers the test split; False for a trial that only chooses among the grid's values."""

    def __str__(self) -> str:
        values = " ".join(f"{key.removeprefix('student.')}={value}" for key, value in self.values.items())
        return f"{self.label}{f' {values}' if values else ''}, seed {self.seed}, {100 * self.fraction:g} %"


@dataclass(frozen=True, slots=True)
class TrialResult:
    """How a trial went."""

    trial: Trial
    failed: str | None = None
    """Why it did not come to an end; then nothing below means anything."""
    validation: dict[str, float] = field(default_factory=dict)
    """exact_match and loss of the best step."""
    best_step: int = 0
    steps: int = 0
    seconds: float = 0.0
    """Of the training, validation in it."""
    tokens_per_second: float | None = None
    """Median over the log; None where it holds none."""
    processes: int = 1
    counts: dict[str, int] = field(default_factory=dict)
    """Of the rows it learnt."""
    answers: list[dict[str, Any]] | None = None
    """For each test item id, parsed (None: unusable) and correct; None where the test split was not scored."""

    @property
    def accuracy(self) -> float | None:
        """Share of the test items that it answers right."""
        return None if not self.answers else sum(answer["correct"] for answer in self.answers) / len(self.answers)

    def write(self, folder: Path) -> None:
        """Marks the trial's folder as done, by rename."""
        write_json(folder / TRIAL_FILE, asdict(self))


def read_result(folder: Path) -> TrialResult | None:
    """How the trial of a folder went; None where it has not come to an end.

    Raises:
        RuntimeError: if the file is damaged, or of another version.
    """
    path = folder / TRIAL_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        return TrialResult(**{**values, "trial": Trial(**values["trial"])})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RuntimeError(f"{path} cannot be read ({error}): another version wrote it, or it is damaged; delete {folder}") from error
