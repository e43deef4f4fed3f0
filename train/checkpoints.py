"""Where a training's resumable state lies, and which of its versions counts. Imports no deepspeed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.artifacts import write_json

if TYPE_CHECKING:
    from train.world import World

_RESUME = "resume.json"


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """What a resumed training starts from."""

    step: int
    state: dict[str, Any]
    tag: str
    """The folder of the state, within the training's."""
    processes: int
    """That wrote it."""
    zero_stage: int


def read_resume(folder: Path) -> ResumePoint | None:
    """The state that counts, or None where there is none."""
    path = folder / _RESUME
    return ResumePoint(**json.loads(path.read_text())) if path.is_file() else None


def replace_state(folder: Path, step: int, state: dict[str, Any], world: World, zero_stage: int, write: Callable[[str], None]) -> None:
    """Writes a new state by `write(tag)`, makes it the one that counts, and removes the one before. Every process must call it."""
    tag = f"step-{step}"
    write(tag)
    world.barrier()
    if world.is_main:
        write_json(folder / _RESUME, {"step": step, "state": state, "tag": tag, "processes": world.size, "zero_stage": zero_stage})
        for old in folder.glob("step-*"):
            if old.name != tag:
                shutil.rmtree(old)
    world.barrier()
