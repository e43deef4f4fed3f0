"""Feed-forward layers made smaller: the neurons that add most to the residual stream stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from train.activity import Activity, column_scores
from train.slicing import configs_of, keep_columns, keep_rows, largest

_WIDTH_KEYS = ("intermediate_size", "d_ff")


def keep_neurons(model: PreTrainedModel, layers: Sequence[nn.Module], activity: Activity, count: int, key: str) -> None:
    """Keeps in each layer the neurons with the largest `column_scores`, in place, and makes the configuration say so.

    Args:
        model: holds the layers.
        layers: of all stacks.
        activity: of the linear layers.
        count: neurons to keep of each.
        key: the configuration key of the student's model, for messages.

    Raises:
        ValueError: if there are fewer, or it cannot be told what the neurons are.
    """
    name = next((name for name in _WIDTH_KEYS if isinstance(getattr(model.config, name, None), int)), None)
    total = getattr(model.config, name) if name is not None else 0
    found = [list(_feed_forwards(layer, model.config.hidden_size, total)) for layer in layers]
    if name is None or any(len(parts) != 1 for parts in found):
        raise ValueError(
            f"{key}.neurons is {count}, but it cannot be told which weights of a teacher of type {model.config.model_type} are its "
            "neurons: remove neurons, and cut layers or heads"
        )
    if not 1 <= count <= total:
        raise ValueError(f"{key}.neurons is {count}, but the teacher's feed-forward layers have {total} neurons: ask for 1 to {total}")
    for (part,) in found:
        kept = largest(column_scores(part.outer, activity), count)
        for linear in part.inner:
            keep_rows(linear, kept)
        keep_columns(part.outer, kept)
    for config in configs_of(model):
        setattr(config, name, count)


@dataclass(frozen=True, slots=True)
class _FeedForward:
    inner: list[nn.Linear]
    outer: nn.Linear


def _feed_forwards(layer: nn.Module, hidden: int, neurons: int) -> Iterator[_FeedForward]:
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
            yield _FeedForward(inner, outer)
