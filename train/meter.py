"""The numbers of training steps, kept on the device until several are read together: a read waits for all that the device has to do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.batches import read_tokens
from data.rows import TrainSequence
from train.losses import PARTS
from train.serving import peak_resident_bytes
from train.throughput import Arithmetic
from train.world import World

_IDS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class _Step:
    number: int
    sums: Tensor
    """[3] on the device: this process's share of each loss's sum."""
    counts: Tensor
    """[3] on the CPU: target tokens of each loss, over all processes."""
    norm: Tensor
    """A scalar on the device: of the whole gradient."""
    learning_rate: float
    ids: Sequence[str]
    tokens: int
    operations: float


class Meter:
    """Losses, gradient norms and speed of the steps since the last `flush`."""

    def __init__(self, world: World, weights: Tensor, arithmetic: Arithmetic, peak_flops: float | None) -> None:
        """Starts the clock.

        Args:
            world: the processes.
            weights: [3] on the CPU, of the losses in their total; a loss of weight 0 is not reported.
            arithmetic: of the model.
            peak_flops: of one device; None where it is not known.
        """
        self._world, self._arithmetic = world, arithmetic
        self.weights = weights
        self._peak = None if peak_flops is None else peak_flops * world.size
        self._steps: list[_Step] = []
        self.restart()

    def restart(self) -> None:
        """Sets the clock to now: what lay between was no training."""
        self._since = time.perf_counter()

    def add(
        self,
        number: int,
        sums: Tensor,
        counts: Tensor,
        norm: Tensor,
        rate: float,
        sequences: Sequence[TrainSequence],
        ids: Sequence[str],
    ) -> None:
        """Takes a step: its number (from 1), its losses and gradient on the device, its learning rate, sequences and rows."""
        tokens = sum(map(read_tokens, sequences))
        self._steps.append(_Step(number, sums, counts, norm, rate, ids, tokens, self._arithmetic.useful(sequences)))

    def flush(self, asked_to_stop: bool) -> tuple[list[tuple[int, dict[str, float]]], bool]:
        """The numbers of the steps since, in their order, and whether any process was asked to stop. Every process must call it.

        Raises:
            RuntimeError: if a loss or gradient was not finite, for the first such step; the engine has not updated since.
        """
        device = self._world.device
        # Norms are the same everywhere: one process gives them.
        shares = [torch.cat([s.sums, s.norm.reshape(1) if self._world.is_main else s.norm.new_zeros(1)]) for s in self._steps]
        asked = torch.full((1,), float(asked_to_stop), device=device)
        *values, stop = self._world.sum(torch.cat([*shares, asked])).cpu().split([4] * len(shares) + [1])  # type: ignore[no-untyped-call]
        seconds = max(time.perf_counter() - self._since, 1e-9)
        lines = [(s.number, self._line(s, found[:3] / s.counts, float(found[3]))) for s, found in zip(self._steps, values, strict=True)]
        lines[-1][1].update(self._speed(seconds))
        self._steps = []
        self.restart()
        return lines, bool(stop.item())

    def _line(self, step: _Step, losses: Tensor, norm: float) -> dict[str, float]:
        used = self.weights > 0
        parts = {f"loss_{part}": float(losses[i]) for i, part in enumerate(PARTS) if used[i]}
        total = float((self.weights * losses)[used].sum())
        if not torch.tensor([total, norm]).isfinite().all():
            raise RuntimeError(_not_finite(step, parts, norm))
        return {"loss": total, **parts, "learning_rate": step.learning_rate, "gradient_norm": norm}

    def _speed(self, seconds: float) -> dict[str, float]:
        """Of the steps since: tokens that the model reads (no padding) and operations, a second; the most memory of this process so far."""
        speed = {"tokens_per_second": sum(s.tokens for s in self._steps) / seconds}
        if self._peak is not None:
            speed["mfu"] = sum(s.operations for s in self._steps) / seconds / self._peak
        on_gpu = self._world.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._world.device) if on_gpu else peak_resident_bytes()
        return {**speed, "memory_gib": peak / 2**30}


def _not_finite(step: _Step, parts: dict[str, float], norm: float) -> str:
    told = ", ".join(f"{name.removeprefix('loss_')} {value:.4g}" for name, value in parts.items())
    ids = ", ".join(step.ids[:_IDS_SHOWN]) + (", ..." if len(step.ids) > _IDS_SHOWN else "")
    which = "gradient" if all(map(_is_finite, parts.values())) else "loss"
    return (
        f"the {which} is not finite at step {step.number} ({told}; norm of the gradient {norm:.4g}); nothing was updated from there on. "
        f"The batch holds the examples {ids}. Lower the learning rate or lengthen the warm-up, and run again from the last checkpoint"
    )


def _is_finite(value: float) -> bool:
    return value - value == 0.0
