"""Inputs whose channels are of more equal size, so that 8 bits a token lose less of them: the model computes what it did before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from train.calibration import Rows, inputs_of

_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Whose layers are built of parts of these names, and whose norms multiply by their weight alone."""
_SMALLEST = 1e-5
_STRENGTH = 0.5
"""Where the squares of inputs, added up, times those of weights are least."""


@torch.no_grad()
def smooth(rows: Rows, model: PreTrainedModel, strength: float = _STRENGTH) -> bool:
    """Divides the channels of what matrices read by their size, where they are made, and multiplies the matrices' columns by it, in place.

    Args:
        rows: training rows; at least one.
        model: in fp32; computed with on the accelerator, where there is one, and given back on the CPU.
        strength: share of the difference between channels that goes from the inputs to the weights.

    Returns:
        Whether the model is of a type whose parts are known; else it is as it was.

    Source: Xiao et al., SmoothQuant (arXiv 2211.10438), equation 4, here also for what the last matrix of attention and of the feed-forward
        layer reads. Sizes are root mean squares, of inputs each divided by its token's, not the largest: a token has a scale of its own, so
        that the few with huge channels do not decide for all. A tuned SmolLM2-135M in int8_float16 has 602 of 1,221 answers right, as in
        fp32, by the largest sizes 584 (tests/bench/deploy_quality.py).
    """
    if model.config.model_type not in _TYPES:
        return False
    model.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    pairs = [pair for layer in model.get_decoder().layers for pair in _pairs(layer)]
    with _mean_squares([readers[0] for _, readers, _ in pairs]) as inputs:
        for prompt, target in rows:
            model(**inputs_of(prompt, target, False, model.device))
    for maker, readers, head in pairs:
        _move(maker, readers, head, inputs[readers[0]] / len(rows), strength)
    model.to("cpu")
    return True


def _pairs(layer: Any) -> Iterator[tuple[Any, list[nn.Linear], int]]:
    """What makes an input, channel by channel, the matrices that read it, and how many channels stand side by side in a head."""
    attention: Any = layer.self_attn
    forward: Any = layer.mlp
    yield layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], 1
    yield attention.v_proj, [attention.o_proj], attention.head_dim
    yield layer.post_attention_layernorm, [forward.gate_proj, forward.up_proj], 1
    yield forward.up_proj, [forward.down_proj], 1


def _move(maker: Any, readers: Sequence[nn.Linear], head: int, inputs: Tensor, strength: float) -> None:
    columns = torch.cat([reader.weight for reader in readers]).square().mean(0)
    # Heads that share values read the same channel: [groups, heads of a group, channels of a head].
    shape = (maker.weight.shape[0] // head, -1, head)
    inputs, columns = (squares.view(shape).mean(1, keepdim=True).sqrt().clamp(min=_SMALLEST) for squares in (inputs, columns))
    scale = inputs**strength / columns ** (1 - strength)
    for values in (maker.weight, getattr(maker, "bias", None)):
        if values is not None:
            values.div_(scale.view(-1, *[1] * (values.dim() - 1)))
    for reader in readers:
        reader.weight.mul_(scale.expand(-1, reader.in_features // maker.weight.shape[0], -1).reshape(-1))


@contextmanager
def _mean_squares(layers: Sequence[nn.Linear]) -> Iterator[dict[nn.Module, Tensor]]:
    """Inside, the sum over rows of the mean over tokens of each channel's square, as a share of the token's, of what each layer is fed."""
    found: dict[nn.Module, Tensor] = {layer: torch.zeros(layer.in_features, device=layer.weight.device) for layer in layers}

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares = inputs[0].flatten(0, -2).square()
        found[layer] += (squares / squares.mean(1, keepdim=True).clamp(min=torch.finfo(squares.dtype).tiny)).mean(0)

    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
