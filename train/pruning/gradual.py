"""Masks that tighten while a model is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.config import StudentPruneConfig
from train.engine import TrainEngine
from train.pruning.masks import cubic
from train.pruning.once import choose_weights, kept_neurons
from train.pruning.scores import neuron_norm
from train.slicing import largest
from train.world import World

Chooser = Callable[[Mapping[str, Tensor], float, torch.device], dict[str, Tensor]]
"""From whole weights on the CPU, by parameter, and a fraction to masks, by parameter; the device is there to compute on. What is 0 already
stays out."""


@dataclass(frozen=True, slots=True)
class MaskSchedule:
    """Which steps of a training prune, and how much is out after each."""

    choose: Chooser
    parameters: Sequence[str]
    """That are pruned."""
    fraction: float
    """In the end."""
    end: int
    """The step after which all of it is out; 0 prunes before the first step, and never again."""
    every: int

    def is_due(self, step: int) -> bool:
        """Masks change after this step (from 1; 0 is before the first)."""
        return step == self.end or (step < self.end and step > 0 and step % self.every == 0)

    def fraction_after(self, step: int) -> float:
        """How much is out after this step."""
        due = self.end if step >= self.end else step // self.every * self.every
        return cubic(due, begin=0, end=self.end, fraction=self.fraction)

    def tighten(self, engine: TrainEngine, world: World, step: int, prefix: str) -> None:
        """Chooses masks by the weights as they are and has the engine hold them. Every process must call it.

        Args:
            engine: whose parameters have these names behind `prefix`.
            world: its processes; rank 0 chooses.
            step: just taken.
            prefix: of the model within the engine's module.
        """
        gathered = engine.gather_weights()
        masks: dict[str, Tensor] = {}
        if world.is_main:
            weights = {name: gathered[prefix + name] for name in self.parameters}
            masks = self.choose(weights, cubic(step, begin=0, end=self.end, fraction=self.fraction), world.device)
        engine.hold({prefix + name: mask for name, mask in _shared(masks, self.parameters, world).items()})


def weight_schedule(
    config: StudentPruneConfig, parameters: Sequence[str], mean_squares: Mapping[str, Tensor], num_steps: int
) -> MaskSchedule:
    """Of single weights: magnitude or Wanda.

    Args:
        config: of the pruning.
        parameters: matrices to prune.
        mean_squares: of their inputs, measured before the training; for Wanda.
        num_steps: of the training.
    """

    def choose(weights: Mapping[str, Tensor], fraction: float, device: torch.device) -> dict[str, Tensor]:
        before = {name: weight != 0 for name, weight in weights.items()}
        return choose_weights(weights, config, fraction, mean_squares, before, device)

    return _schedule(config, choose, parameters, num_steps)


@dataclass(frozen=True, slots=True)
class NeuronNames:
    """The parameters of one feed-forward layer that have its neurons in common."""

    inner: Sequence[str]
    """Matrices that lead in: a neuron is a row."""
    biases: Sequence[str]
    """Of these: a neuron is a number."""
    outer: str
    """The matrix that leads out: a neuron is a column."""


def neuron_schedule(config: StudentPruneConfig, layers: Sequence[NeuronNames], num_steps: int) -> MaskSchedule:
    """Of whole neurons, by the norm of their weights.

    Args:
        config: of the pruning.
        layers: all feed-forward layers.
        num_steps: of the training.
    """

    def choose(weights: Mapping[str, Tensor], fraction: float, device: torch.device) -> dict[str, Tensor]:
        del device  # the norms of neurons take less time than their way there
        masks: dict[str, Tensor] = {}
        for layer in layers:
            total = weights[layer.outer].shape[1]
            final = kept_neurons(total, config.fraction or 0.0, config.round_to)
            # Those that are out have the norm 0, so that they come last.
            count = final if fraction == config.fraction else max(final, kept_neurons(total, fraction, 1))
            kept = torch.zeros(total, dtype=torch.bool)
            kept[largest(neuron_norm([weights[name] for name in layer.inner], weights[layer.outer]), count)] = True
            masks |= dict.fromkeys(layer.inner, kept[:, None]) | {layer.outer: kept[None]} | dict.fromkeys(layer.biases, kept)
        return masks

    return _schedule(config, choose, [name for layer in layers for name in (*layer.inner, *layer.biases, layer.outer)], num_steps)


def _schedule(config: StudentPruneConfig, choose: Chooser, parameters: Sequence[str], num_steps: int) -> MaskSchedule:
    end = max(1, round(config.until * num_steps)) if config.schedule == "cubic" else 0
    fraction = 1 - config.n_of_m[0] / config.n_of_m[1] if config.n_of_m is not None else config.fraction or 0.0
    return MaskSchedule(choose, parameters, fraction, end, config.every)


def _shared(masks: Mapping[str, Tensor], names: Sequence[str], world: World) -> dict[str, Tensor]:
    """Rank 0's masks on every process; their shapes travel first."""
    if world.size == 1:
        return dict(masks)
    found = {}
    for name in names:
        shape = torch.zeros(2, dtype=torch.int64)
        if world.is_main:
            mask = masks[name]
            shape = torch.tensor([*mask.shape] if mask.dim() == 2 else [mask.shape[0], -1])
        rows, columns = world.sum(shape).tolist()
        size = (rows, columns) if columns >= 0 else (rows,)
        mine = masks[name].to(torch.uint8) if world.is_main else torch.zeros(size, dtype=torch.uint8)
        found[name] = world.sum(mine).bool()
    return found
