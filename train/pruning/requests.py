"""What `stepdown prune` asks a process for, and what that found. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from train.artifacts import Request

MEASURED = "pruned.json"
"""The file of a `Pruned`, or of a `Scan`."""


@dataclass(frozen=True, slots=True)
class PruneRequest(Request):
    """One pruning, or one scan."""

    model: str
    """Hub id, folder, .gguf file or package:NAME/FILE."""
    out: str
    prune: dict[str, Any]
    """A `PruneConfig`."""
    texts: str | None
    """File of texts to measure on."""
    fractions: list[float]
    """To scan; none where the model is to be pruned."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, slots=True)
class Pruned:
    """A model before and after."""

    parameters_before: int
    parameters: int
    loss_before: float | None
    """Nats a token of the texts; None where there are none."""
    loss: float | None
    file_bytes: int
    compressed_bytes: int
    """By zlib."""
    kinds: dict[str, tuple[int, int]]
    """By kind of matrix: weights, and zeros among them."""


@dataclass(frozen=True, slots=True)
class Scan:
    """How much each kind of matrix can lose."""

    method: str
    fractions: list[float]
    dense: float
    """Loss of the whole model, nats a token."""
    losses: dict[str, list[float]]
    """By kind of matrix, one a fraction."""
    tokens: int
    """That the losses are means over."""
