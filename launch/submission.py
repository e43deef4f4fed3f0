"""Which jobs the last `stepdown submit` of a run put in the queue. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.pipeline import parted
from train.artifacts import write_json

JOBS, LOGS = "jobs", "logs"
_FILE = "submission.json"


@dataclass(frozen=True, slots=True)
class Submitted:
    """One job, or an array of them."""

    name: str
    number: str
    """Slurm's."""
    stages: list[str]
    """What it runs; of an array, what each index runs."""
    indices: list[int] | None
    """Those of an array that were submitted."""
    after: list[str]
    """Names of jobs."""

    def labels_of(self, stage: str) -> list[str]:
        """The labels (12, or 12_3) of what makes a stage."""
        if self.indices is None:
            return [self.number] if stage in self.stages else []
        return [f"{self.number}_{n}" for n in self.indices if parted(self.stages[n])[0] == stage]

    @property
    def labels(self) -> Iterator[str]:
        """All of them."""
        yield from [self.number] if self.indices is None else [f"{self.number}_{n}" for n in self.indices]


def read_submission(run_folder: Path) -> list[Submitted]:
    """The jobs of the last submission, in their order; none where there was none."""
    path = run_folder / JOBS / _FILE
    return [Submitted(**values) for values in json.loads(path.read_text())] if path.is_file() else []


def write_submission(run_folder: Path, jobs: Sequence[Submitted]) -> None:
    """Notes what is in the queue."""
    write_json(run_folder / JOBS / _FILE, [asdict(job) for job in jobs])


def log_of(run_folder: Path, job: Submitted, label: str) -> Path:
    """Where the output of a job, or of one task of an array, goes."""
    return run_folder / LOGS / f"{job.name}-{label}.out"
