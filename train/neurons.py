"""Feed-forward layers made smaller: some of their neurons stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from train.slicing import configs_of, keep_columns, keep_rows, largest

_WIDTH_KEYS = ("intermediate_size", "d_ff")


@dataclass(frozen=True, slots=True)
class FeedForward:
    """The matrices of one layer that share its neurons."""

    inner: list[nn.Linear]
    """Lead in, one or two: a neuron is a row."""
    outer: nn.Linear
    """Leads out: a neuron is a column."""


def feed_forwards(model: PreTrainedModel, layers: Sequence[nn.Module], asked: str) -> list[FeedForward]:
    """That of each layer; all are of one width.

    Args:
        model: holds the layers.
        layers: of all stacks.
        asked: what of a configuration asks for it, with its value, for the message.

    Raises:
        ValueError: if it cannot be told what the neurons are.
    """
    name = _width_key(model)
    total = getattr(model.config, name) if name is not None else 0
    found = [list(_feed_forwards(layer, model.config.hidden_size, total)) for layer in layers]
    if name is None or any(len(parts) != 1 for parts in found):
        raise ValueError(
            f"{asked}, but it cannot be told which weights of a model of type {model.config.model_type} are its neurons, as it can of "
            "t5, llama, qwen2, gemma3 and their like: take out layers or heads instead"
        )
    return [part for (part,) in found]


def keep_neurons(model: PreTrainedModel, parts: Sequence[FeedForward], scores: Sequence[Tensor], count: int) -> None:
    """Keeps in each layer the neurons with the largest scores, in place, and makes the configuration say so.

    Args:
        model: holds the layers.
        parts: what `feed_forwards` found, in all layers.
        scores: [neurons] of each.
        count: neurons to keep of each, at most as many as there are.
    """
    for part, score in zip(parts, scores, strict=True):
        kept = largest(score, count)
        for linear in part.inner:
            keep_rows(linear, kept)
        keep_columns(part.outer, kept)
    name = _width_key(model)
    assert name is not None
    for config in configs_of(model):
        setattr(config, name, count)


def _width_key(model: PreTrainedModel) -> str | None:
    return next((name for name in _WIDTH_KEYS if isinstance(getattr(model.config, name, None), int)), None)


def _feed_forwards(layer: nn.Module, hidden: int, neurons: int) -> Iterator[FeedForward]:
    """Modules of two or three linear layers and no other weights, which lead from the hidden size to the neurons and back."""
    for module in layer.modules():
        linears = [child for child in module.children() if isinstance(child, nn.Linear)]
        own = sum(1 for linear in linears for _ in linear.parameters())
        if len(linears) not in (2, 3) or own != sum(1 for _ in module.parameters()):
            continue
        # The way back is always made last, which tells it apart where the layer is as wide as the hidden size.
        *inner, outer = linears
        if (outer.in_features, outer.out_features) == (neurons, hidden) and all(
            (linear.in_features, linear.out_features) == (hidden, neurons) for linear in inner
        ):
            yield FeedForward(inner, outer)
