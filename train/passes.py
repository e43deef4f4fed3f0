"""Forward and backward passes: as they are, with compiled layers, or recorded as CUDA graphs.

A small model's step costs the host more than the GPU; of a recorded pass the host pays once, not at every step. A batch is filled up to
one of a few sizes (`data.batches.rounded`). The first of a size runs as it is, the second is recorded, and the others are replayed.
Losses and gradients are those of the plain passes.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.batches import StudentBatch, rounded
from train.compiling import compile_layers
from train.config import TrainingConfig
from train.engine import TrainEngine
from train.flat import FlatEngine
from train.learner import Learner, tensors_of


@dataclass(frozen=True, slots=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    batch: StudentBatch
    """What the graph reads."""
    scale: Tensor
    sums: Tensor
    """What it writes, valid until the next replay of any graph."""


@dataclass(slots=True)
class _Recordings:
    """What was recorded of a model; of use in its next training too, while its buffers stay."""

    passes: dict[Hashable, _Recorded | None] = field(default_factory=dict)
    """By size and settings; None: seen once."""
    holding: object | None = None
    """The masks that they apply to gradients (`FlatEngine.holding`)."""


_RECORDED: weakref.WeakKeyDictionary[PreTrainedModel, _Recordings] = weakref.WeakKeyDictionary()


class GraphedPasses:
    """Forward and backward passes of packed batches on one GPU."""

    def __init__(self, learner: Learner, engine: FlatEngine, longest: int) -> None:
        """Goes on with what was recorded of the same model, if its buffers are the same.

        Args:
            learner: in training mode.
            engine: whose module it is.
            longest: tokens of the longest sequence of all batches to come.
        """
        self._learner, self._engine, self._longest = learner, engine, longest
        if not engine.reused or learner.model not in _RECORDED:
            _RECORDED[learner.model] = _Recordings()
        self._recordings = _RECORDED[learner.model]
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, scale: Tensor, batch: StudentBatch, *, last: bool) -> Tensor:
        """Adds the gradient of a batch.

        Args:
            scale: [3] on the device.
            batch: packed, on the CPU.
            last: of its step.

        Returns:
            [3] the sums of the losses, valid until the next call.
        """
        filled = replace(rounded(batch), longest=max(self._longest, batch.longest))
        key, recorded = self._key(filled, last), self._recordings.passes
        if self._recordings.holding is not self._engine.holding:
            recorded.clear()
            self._recordings.holding = self._engine.holding
            self._pool = torch.cuda.graph_pool_handle()  # that of the graphs went with the last of them
        if key not in recorded:
            recorded[key] = None
            return forward_backward(self._engine, scale, filled.to(scale.device), last=last)
        found = recorded[key]
        if found is None:
            found = recorded[key] = self._record(scale, filled.to(scale.device), last)
        for source, target in zip(_tensors(filled), _tensors(found.batch), strict=True):
            target.copy_(source.pin_memory(), non_blocking=True)
        found.scale.copy_(scale)
        found.graph.replay()
        self._engine.replayed(last=last)
        return found.sums

    def _record(self, scale: Tensor, batch: StudentBatch, last: bool) -> _Recorded:
        graph, scale = torch.cuda.CUDAGraph(), scale.clone()
        first = self._engine.is_first
        # As torch.cuda.graph does, but without giving all unused memory back before, which plain passes would have to ask for again.
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                sums = forward_backward(self._engine, scale, batch, last=last)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        # Nothing has run yet: the replay will do what the engine now thinks was done.
        self._engine.is_first = first
        return _Recorded(graph, batch, scale, sums)

    def _key(self, batch: StudentBatch, last: bool) -> Hashable:
        shapes = tuple(tuple(tensor.shape) for tensor in _tensors(batch))
        learner = self._learner
        settings = (learner.divergence, learner.vocabulary, learner.teachers, learner.model.is_gradient_checkpointing)
        return shapes, batch.longest, batch.soft_temperature, last, self._engine.is_first, settings


def forward_backward(engine: TrainEngine, scale: Tensor, batch: StudentBatch, *, last: bool) -> Tensor:
    """Adds the gradient of a batch; gives the sums [3] of its losses.

    Args:
        engine: of a `Learner`.
        scale: [3] on the device.
        batch: on the device.
        last: of its step.
    """
    total, sums = engine.forward(scale, **tensors_of(batch))
    # A loss that is not finite makes the gradient so, which stops the update everywhere.
    engine.backward(total * (1.0 + 0.0 * total.detach()), last=last)
    found: Tensor = sums
    return found


class PlainPasses:
    """Forward and backward passes as they are."""

    def __init__(self, engine: TrainEngine) -> None:
        """Passes of the engine's module."""
        self._engine = engine

    def __call__(self, scale: Tensor, batch: StudentBatch, *, last: bool) -> Tensor:
        """Adds the gradient of a batch on the CPU; gives the sums [3] of its losses."""
        return forward_backward(self._engine, scale, batch.to(scale.device), last=last)


Passes = PlainPasses | GraphedPasses
_WORTH_COMPILING = 300
"""Steps from which on the quarter of a minute that a compiler takes is won back."""


def open_passes(learner: Learner, engine: TrainEngine, config: TrainingConfig, *, packed: bool, num_steps: int, longest: int) -> Passes:
    """The passes that `compile` asks for; auto chooses by the device and the number of steps.

    Args:
        learner: what is trained.
        engine: that trains it.
        config: of the training.
        packed: its batches are.
        num_steps: of the training.
        longest: tokens of the longest sequence.

    Raises:
        ValueError: where `compile` asks for what cannot be done here.
    """
    device = next(learner.parameters()).device
    obstacle = (
        "needs a GPU"
        if device.type != "cuda"
        else "needs zero_stage: 0 (or auto in one process)"
        if not isinstance(engine, FlatEngine)
        else "needs a model whose sequences can be packed: a decoder-only one"
        if not packed
        else None
    )
    wished = config.compile
    if wished == "graphs" and obstacle is not None:
        raise ValueError(f"compile is graphs, which {obstacle}: set it to layers, off or auto")
    if wished == "auto" and (num_steps < _WORTH_COMPILING or device.type != "cuda" or engine.zero_stage == 3):
        wished = "off"
    if wished != "off":
        compile_layers(learner.model)
    if wished in ("graphs", "auto") and obstacle is None:
        assert isinstance(engine, FlatEngine)
        return GraphedPasses(learner, engine, longest)
    return PlainPasses(engine)


def _tensors(batch: StudentBatch) -> list[Tensor]:
    values: list[Any] = [getattr(batch, each.name) for each in fields(batch)]
    return [value for value in values if isinstance(value, Tensor)]
