"""What the deploy stage is asked to make. Imports no torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from train.artifacts import Request


@dataclass(frozen=True, slots=True)
class DeployRequest(Request):
    """One file to make; paths are text, so that the request is plain JSON."""

    target: str
    """One of `train.deploy.targets.TARGETS`."""
    checkpoint_folder: str
    """Of the stage whose model is shipped."""
    task_folder: str
    records_folder: str
    """The teacher's, whose rationales are calibrated on."""
    out_folder: str
    vocabulary: str | int = "whole"
    """`deploy.vocabulary`."""


@dataclass(frozen=True, slots=True)
class QuantizeRequest(Request):
    """Files of a model without a task."""

    model: str
    """Hub id, folder, .gguf file or package:NAME/FILE."""
    targets: list[str]
    """Some of `train.deploy.targets.TARGETS`."""
    texts: str
    """File of texts to calibrate and verify on."""
    out_folder: str
    """Holds a folder for each target."""


def command(path: Path) -> list[str]:
    """The command line of a process that makes the file of the request in `path`."""
    return [sys.executable, "-m", "train.deploy.stage", str(path)]
