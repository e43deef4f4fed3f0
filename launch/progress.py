"""How far a stage has come, by the files in its folder. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from train.artifacts import ARTIFACT
from train.checkpoints import read_resume
from train.tracking import LOG_FILE, read_log

_STATE = "state"


@dataclass(frozen=True, slots=True)
class Reached:
    """What a stage's folder shows."""

    is_done: bool
    saved_step: int = 0
    """Of the state that a training goes on from; 0 where there is none."""
    shards: int = 0
    """Of the teacher's records."""
    step: int | None = None
    """The last one in the log."""
    loss: float | None = None
    """The last training loss in the log."""

    @property
    def kept(self) -> list[int]:
        """What a restart goes on from; the same twice in a row is no progress."""
        return [int(self.is_done), self.saved_step, self.shards]

    def told(self) -> str:
        """In a few words; empty where there is nothing to tell."""
        parts = [f"{self.shards} shards"] if self.shards else []
        parts += [f"step {self.step}"] if self.step is not None else []
        parts += [f"loss {self.loss:.3f}"] if self.loss is not None else []
        parts += [f"saved at step {self.saved_step}"] if self.saved_step and not self.is_done else []
        return ", ".join(parts)


def reached(folder: Path) -> Reached:
    """How far the stage in a folder has come."""
    resumed = read_resume(folder / _STATE)
    losses = [line for line in read_log(folder / LOG_FILE) if "loss" in line]
    return Reached(
        is_done=(folder / ARTIFACT).is_file(),
        saved_step=resumed.step if resumed is not None else 0,
        shards=sum(1 for _ in folder.glob("*.parquet")),
        step=int(losses[-1]["step"]) if losses else None,
        loss=float(losses[-1]["loss"]) if losses else None,
    )
