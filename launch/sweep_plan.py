"""What a sweep compares: arms of one student, values to choose among for each, seeds, and shares of the data. Imports no torch.

An arm is a student's section of the configuration with another loss. Every arm tries each point of the grid with the first seed on all
rows; the trials that are scored use the point that validation chose.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from train.artifacts import write_json
from train.student.results import Trial

PLAN = "plan.json"
Targets = Literal["gold", "teacher"]


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of the grid, for one arm."""

    values: dict[str, str]
    """By key, as typed; empty where there is no grid."""
    student: dict[str, Any]
    """The arm's section of the configuration with these values."""
    key: str
    """Hash of what a training of it reads, apart from its seed and its share of the data."""


@dataclass(frozen=True, slots=True)
class PlannedArm:
    """One arm, and the settings it may choose among: those that differ for it."""

    label: str
    arm: str
    targets: Targets
    points: list[Point]

    @property
    def is_tuned(self) -> bool:
        """It has a choice."""
        return len(self.points) > 1


@dataclass(frozen=True, slots=True)
class Share:
    """A share of the training rows, and how many seeds learn it."""

    fraction: float
    seeds: int


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """Everything a sweep trains."""

    name: str
    metric: str
    first_seed: int
    arms: list[PlannedArm]
    shares: list[Share]
    """The largest first."""
    command: str

    def tuning(self, arm: PlannedArm) -> list[Trial]:
        """The trials that choose an arm's values; none where there is no choice."""
        return [self._trial(arm, point, self.first_seed, 1.0, scored=False) for point in arm.points] if arm.is_tuned else []

    def scored(self, arm: PlannedArm, point: Point, share: Share) -> list[Trial]:
        """The trials of a cell of the table, one a seed."""
        return [self._trial(arm, point, self.first_seed + n, share.fraction, scored=True) for n in range(share.seeds)]

    @property
    def num_trials(self) -> int:
        """All of them."""
        return sum(len(self.tuning(arm)) for arm in self.arms) + len(self.arms) * sum(share.seeds for share in self.shares)

    def _trial(self, arm: PlannedArm, point: Point, seed: int, fraction: float, *, scored: bool) -> Trial:
        inputs = {"point": point.key, "seed": seed, "fraction": fraction, "scored": self.metric if scored else None}
        student = {**point.student, "seed": seed, "data_fraction": fraction}
        return Trial(_hash(inputs), arm.label, point.values, student, seed, fraction, scored)

    def write(self, folder: Path) -> None:
        """Writes `plan.json`."""
        write_json(folder / PLAN, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> SweepPlan:
        """The plan in a sweep's folder.

        Raises:
            RuntimeError: if the file is damaged, or of another version.
        """
        path = folder / PLAN
        try:
            values = json.loads(path.read_text())
            arms = [PlannedArm(**{**arm, "points": [Point(**point) for point in arm["points"]]}) for arm in values["arms"]]
            return cls(**{**values, "arms": arms, "shares": [Share(**share) for share in values["shares"]]})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise RuntimeError(f"{path} cannot be read ({error}): another version wrote it; start the sweep again") from error


def _hash(inputs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
