"""The starts of a job: when, where, from how far, and how each ended; a file for each job in the run folder. Imports no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from train.artifacts import write_json

_SHOWN = ("SLURM_JOB_", "SLURM_ARRAY_", "SLURM_RESTART_COUNT", "SLURM_CPUS_PER_TASK", "NCCL_", "GLOO_", "CUDA_VISIBLE_DEVICES")
"""How the variables begin that are noted; the others may hold secrets."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start."""

    started: str
    restart: int
    """How often Slurm had put the job back in the queue."""
    kept: list[list[int]]
    """Of each stage, what it went on from (`launch.progress.Reached.kept`)."""
    about: dict[str, Any]
    """Commit, versions, nodes, and the variables of Slurm and NCCL."""
    ended: str | None = None
    """finished, failed, requeued, or ended by Slurm; None while it runs, or where it was killed."""
    status: int | None = None


class Attempts:
    """Those of one job, in their file."""

    def __init__(self, path: Path) -> None:
        """Reads what there is."""
        self.path = path
        self.all: list[Attempt] = [Attempt(**values) for values in json.loads(path.read_text())] if path.is_file() else []

    def begin(self, attempt: Attempt) -> int:
        """Notes a start.

        Returns:
            How many starts in a row, right before this one, kept nothing more than this one goes on from.
        """
        self.all.append(attempt)
        self._write()
        return self.idle

    @property
    def idle(self) -> int:
        """Restarts in a row up to the last, without progress."""
        kept = [attempt.kept for attempt in self.all]
        return next((n for n, earlier in enumerate(reversed(kept[:-1])) if earlier != kept[-1]), max(0, len(kept) - 1))

    def end(self, ended: str, status: int) -> None:
        """Notes how the last start ended."""
        self.all[-1] = replace(self.all[-1], ended=ended, status=status)
        self._write()

    def _write(self) -> None:
        write_json(self.path, [asdict(attempt) for attempt in self.all])


def attempt(kept: Sequence[list[int]], about: Mapping[str, Any], environment: Mapping[str, str]) -> Attempt:
    """A start that begins now.

    Args:
        kept: of each stage.
        about: how it came about (`launch.rundir.provenance`).
        environment: of the job, of which no more is noted than what is known to hold no secret.
    """
    shown = {name: value for name, value in sorted(environment.items()) if name.startswith(_SHOWN)}
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return Attempt(now, int(environment.get("SLURM_RESTART_COUNT", "0")), list(kept), {**about, "environment": shown})


def attempts_file(jobs_folder: Path, name: str, label: str) -> Path:
    """Where the starts of a job are noted.

    Args:
        jobs_folder: of the run.
        name: of the job.
        label: its number, with the index of an array's task: 12 or 12_3.
    """
    return jobs_folder / "attempts" / f"{name}-{label}.json"
