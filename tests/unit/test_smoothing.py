"""Channels of like sizes: by hand, the same function afterwards, and less lost where inputs are rounded to 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from train.grids import matrices
from train.smoothing import smooth

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
ROWS = [(list(range(n, n + 20)), list(range(n + 30, n + 40))) for n in range(0, 20, 4)]


def model_of(kind: str) -> PreTrainedModel:
    """With channels of very unlike sizes wherever a norm or a matrix makes them."""
    config, model_class = MODELS[kind]
    torch.manual_seed(0)
    model = model_class(config(vocab_size=80, num_key_value_heads=2, head_dim=8, **SIZES)).eval()
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[::7] = 40.0
        layer.mlp.up_proj.weight.data[::5] *= 60.0
        layer.self_attn.v_proj.weight.data[::6] *= 60.0
        if layer.self_attn.v_proj.bias is not None:
            nn.init.normal_(layer.self_attn.v_proj.bias, std=0.5)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([[*prompt, *target]])).logits[0] for prompt, target in ROWS])


@contextmanager
def inputs_in_8_bits(model: PreTrainedModel) -> Iterator[None]:
    """As an engine of int8 computes: what a matrix reads has one scale a token, its weights one a row."""

    def rounded(values: Tensor) -> Tensor:
        scale = values.abs().amax(-1, keepdim=True) / 127
        return torch.round(values / scale) * scale

    hooks = [layer.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),)) for layer in matrices(model).values()]
    for layer in matrices(model).values():
        layer.weight.data = rounded(layer.weight.data)
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_model_computes_the_same_and_loses_less_in_8_bits(kind: str) -> None:
    plain, smoothed = model_of(kind), model_of(kind)
    whole = logits(plain)
    assert smooth(ROWS, smoothed)
    torch.testing.assert_close(logits(smoothed), whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
    lost = []
    for model in (plain, smoothed):
        with inputs_in_8_bits(model):
            lost.append(float((logits(model) - whole).norm() / whole.norm()))
    assert lost[1] < 0.75 * lost[0]


def test_scales_are_those_worked_out_by_hand() -> None:
    """Between up and down: the root of the mean of squares of channel 3, each a share of its token's, and that of column 3."""
    model = model_of("llama")
    mlp = model.model.layers[0].mlp
    norm = model.model.layers[0].post_attention_layernorm.weight
    up, down, before = mlp.up_proj.weight.clone(), mlp.down_proj.weight.clone(), norm.clone()
    shares: list[float] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found = [float(token[3] ** 2 / (token @ token / 48)) for token in inputs[0][0]]
        shares.append(sum(found) / len(found))

    hook = mlp.down_proj.register_forward_pre_hook(look)
    logits(model)
    hook.remove()
    smooth(ROWS, model, strength=0.25)
    fed = (sum(shares) / len(shares)) ** 0.5
    scale = fed**0.25 / down[:, 3].square().mean().sqrt() ** 0.75
    torch.testing.assert_close(mlp.up_proj.weight[3], up[3] / scale * before / norm)  # what the norm lost, its columns got
    torch.testing.assert_close(mlp.down_proj.weight[:, 3], down[:, 3] * scale)


def test_weights_that_pruning_took_out_stay_zero() -> None:
    model = model_of("llama")
    with torch.no_grad():
        for layer in matrices(model).values():
            layer.weight[:, ::2] = 0.0
    smooth(ROWS, model)
    assert all(not layer.weight[:, ::2].any() and layer.weight[:, 1::2].isfinite().all() for layer in matrices(model).values())


def test_a_model_of_other_parts_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not smooth(ROWS, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
