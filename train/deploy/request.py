"""What the deploy stage is asked to make. Imports no torch."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from train.artifacts import write_json


@dataclass(frozen=True, slots=True)
class DeployRequest:
    """One file to make; paths are text, so that the request is plain JSON."""

    target: str
    """One of `train.deploy.targets.TARGETS`."""
    checkpoint_folder: str
    """Of the stage whose model is shipped."""
    task_folder: str
    records_folder: str
    """The teacher's, whose rationales are calibrated on."""
    out_folder: str

    def write(self, path: Path) -> None:
        """Writes it as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True)
class QuantizeRequest:
    """Files of a model without a task."""

    model: str
    """Hub id, folder, .gguf file or package:NAME/FILE."""
    targets: list[str]
    """Some of `train.deploy.targets.TARGETS`."""
    texts: str
    """File of texts to calibrate and verify on."""
    out_folder: str
    """Holds a folder for each target."""

    def write(self, path: Path) -> None:
        """Writes it as JSON."""
        write_json(path, asdict(self))


def command(path: Path) -> list[str]:
    """The command line of a process that makes the file of the request in `path`."""
    return [sys.executable, "-m", "train.deploy.stage", str(path)]
