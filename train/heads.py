"""Attention layers made smaller: the heads that add most to the residual stream stay."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from train.activity import Activity, column_scores
from train.slicing import configs_of, keep_columns, keep_rows, largest, part

_NAMES = (("q_proj", "k_proj", "v_proj", "o_proj"), ("q", "k", "v", "o"))


def keep_heads(model: PreTrainedModel, stacks: Sequence[Sequence[nn.Module]], activity: Activity, count: int, asked: str) -> None:
    """Keeps in each layer the heads with the largest `group_scores`, in place, and makes the configuration say so.

    A T5's layers share one relative position bias, which has a column for each head: there the self-attention of all layers of a stack
    keeps the same heads, those with the largest sum of scores, each layer's taken as shares of its own sum.

    Args:
        model: holds the layers.
        stacks: its layers: one sequence of them, or those of an encoder and of a decoder.
        activity: of the linear layers.
        count: query heads to keep of each attention layer. Heads that share keys and values are kept or dropped together.
        asked: what of a configuration asks for it, with its value, for messages.

    Raises:
        ValueError: if there are fewer, if `count` would part such a group, or if it cannot be told what the heads are.
    """
    heads = _heads_of(model.config)
    found = [[_attentions(layer) for layer in stack] for stack in stacks]
    layers = [layer for stack in found for layer in stack]
    if heads is None or not all(layers) or not all(heads.fits(attention) for layer in layers for attention in layer.values()):
        raise ValueError(
            f"{asked}, but it cannot be told which weights of a model of type {model.config.model_type} are its heads, as it can of t5, "
            "llama, qwen2, gemma3 and their like: take out layers or neurons instead"
        )
    _check_count(model.config, heads, count, asked)
    for stack in found:
        for name in stack[0]:
            _keep_groups([layer[name] for layer in stack], activity, heads, count // heads.a_group)
    for config in configs_of(model):
        _set_heads(config, heads, count)


def group_scores(output: nn.Linear, activity: Activity, groups: int) -> Tensor:
    """What the heads of each group add to the residual stream: the root of the sum of the squares of their `column_scores`.

    Args:
        output: its inputs are the heads, those of a group in a row.
        activity: what went into it.
        groups: their number.

    Returns:
        One score a group, float32.
    """
    scores: Tensor = column_scores(output, activity).reshape(groups, -1).norm(dim=1)
    return scores


@dataclass(frozen=True, slots=True)
class _Attention:
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    position_bias: nn.Embedding | None
    """Of a T5: one column a head, which later layers add to their scores too."""


def _attentions(layer: nn.Module) -> dict[str, _Attention]:
    """The attention modules of a layer, under their names in it."""
    found = {}
    for name, module in layer.named_modules():
        for names in _NAMES:
            query, key, value, output = linears = [getattr(module, role, None) for role in names]
            if all(isinstance(linear, nn.Linear) for linear in linears):
                found[name] = _Attention(query, key, value, output, getattr(module, "relative_attention_bias", None))  # type: ignore[arg-type]
    return found


@dataclass(frozen=True, slots=True)
class _Heads:
    """What a configuration says of its attention layers."""

    queries: int
    groups: int
    width: int

    @property
    def a_group(self) -> int:
        return self.queries // self.groups

    def fits(self, attention: _Attention) -> bool:
        sizes = [linear.out_features for linear in (attention.query, attention.key, attention.value)] + [attention.output.in_features]
        return sizes == [number * self.width for number in (self.queries, self.groups, self.groups, self.queries)]


def _heads_of(config: PreTrainedConfig) -> _Heads | None:
    queries = getattr(config, "num_attention_heads", None)
    if not isinstance(queries, int):
        return None
    groups = getattr(config, "num_key_value_heads", None) or queries
    return _Heads(queries, groups, getattr(config, "head_dim", None) or config.hidden_size // queries)


def _set_heads(config: PreTrainedConfig, heads: _Heads, count: int) -> None:
    # Where left out the width would be the quotient of the hidden size and the number of heads, which changes.
    config.head_dim = heads.width
    config.num_attention_heads = count
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = count // heads.a_group


def possible_counts(config: PreTrainedConfig) -> list[int]:
    """Numbers of query heads that a model like this may have: whole groups, and what transformers takes; none where it says nothing."""
    heads = _heads_of(config)
    steps = range(heads.a_group, heads.queries + 1, heads.a_group) if heads is not None else ()
    return [number for number in steps if heads is not None and _is_valid(config, heads, number)]


def _check_count(config: PreTrainedConfig, heads: _Heads, count: int, asked: str) -> None:
    if not 1 <= count <= heads.queries:
        raise ValueError(f"{asked}, but the model's attention layers have {heads.queries} query heads: ask for 1 to {heads.queries}")
    possible = possible_counts(config)
    if count in possible:
        return
    why = (
        f"but the model's {heads.queries} query heads share keys and values in groups of {heads.a_group}, which go whole"
        if count % heads.a_group
        # Llama: the number must divide the hidden size, though with a width of their own nothing depends on it.
        else f"which transformers does not take in a configuration of type {config.model_type} with hidden_size {config.hidden_size}"
    )
    raise ValueError(f"{asked}, {why}: ask for one of {', '.join(str(number) for number in possible)}")


def _is_valid(config: PreTrainedConfig, heads: _Heads, count: int) -> bool:
    trial = copy.deepcopy(config)
    _set_heads(trial, heads, count)
    try:
        trial.validate()
    except StrictDataclassError:
        return False
    return True


def _keep_groups(attentions: Sequence[_Attention], activity: Activity, heads: _Heads, count: int) -> None:
    """Of one attention module in every layer of a stack."""
    scores = [group_scores(attention.output, activity, heads.groups) for attention in attentions]
    bias = attentions[0].position_bias
    if bias is not None:
        scores = [_joint(scores)] * len(scores)
        bias.weight = part(bias.weight, 1, _rows(largest(scores[0], count), heads.a_group))
    for attention, score in zip(attentions, scores, strict=True):
        groups = largest(score, count)
        shared, own = _rows(groups, heads.width), _rows(groups, heads.width * heads.a_group)
        keep_rows(attention.query, own)
        keep_rows(attention.key, shared)
        keep_rows(attention.value, shared)
        keep_columns(attention.output, own)


def _joint(scores: Sequence[Tensor]) -> Tensor:
    # Shares, so that no layer of large numbers decides for all.
    return torch.stack([score / score.sum().clamp(min=torch.finfo(score.dtype).tiny) for score in scores]).sum(dim=0)


def _rows(groups: Tensor, width: int) -> Tensor:
    return (groups[:, None] * width + torch.arange(width, device=groups.device)).flatten()
