"""Grids against the packers whose files they stand for, and the training that goes through them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from train.deploy.onnx_graph import quantize
from train.grids import Grid, RoundedLinear, matrices, put_on_grids, read_scales, rounding, write_scales

TERNARY, SIGNED = Grid("ternary", 2, 256), Grid("signed", 4, 32)
GRIDS = {
    "ternary": TERNARY,
    "signed": SIGNED,
    "symmetric 4": Grid("symmetric", 4, 64, torch.bfloat16),
    "asymmetric 3": Grid("asymmetric", 3, 32, torch.bfloat16),
    "asymmetric 2": Grid("asymmetric", 2, 32, torch.bfloat16),
}
EACH = pytest.mark.parametrize("name", GRIDS)
BINARY = Grid("binary", 1, 128)


def drawn(rows: int = 6, columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize(("type", "grid"), [("Q5_0", Grid("signed", 5, 32)), ("Q4_0", SIGNED), ("TQ2_0", TERNARY), ("TQ1_0", TERNARY)])
def test_what_gguf_packs_of_rounded_values_is_these_values(type: str, grid: Grid) -> None:
    kind = gguf.GGMLQuantizationType[type]
    values = grid.rounded(drawn()).numpy()
    read = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    assert np.array_equal(read, values)
    assert not np.array_equal(read, drawn().numpy())


@pytest.mark.parametrize("columns", [512, 48])
def test_what_onnx_packs_of_rounded_values_is_these_values(columns: int) -> None:
    values = SIGNED.rounded(drawn(columns=columns)).numpy()
    codes, scales = quantize(values, 4)
    halves = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], 32).astype(np.float32)
    read = ((halves - 8) * scales[..., None].astype(np.float32)).reshape(len(values), -1)[:, :columns]
    assert np.array_equal(read, values)


@EACH
def test_a_group_has_few_values_and_zero_is_one_of_them(name: str) -> None:
    grid = GRIDS[name]
    weight = drawn()
    weight[:, ::3] = 0.0
    weight[1] = 0.0
    weight[2] = weight[2].abs()
    rounded = grid.rounded(weight)
    assert not rounded[weight == 0].any()
    found = [len(set(group.tolist())) for group in rounded.reshape(-1, grid.group)]
    assert max(found) <= (3 if grid.kind == "ternary" else 2**grid.bits)
    assert max(found) > 2
    assert torch.isfinite(rounded).all()


def test_one_bit_is_plus_or_minus_the_mean_size_of_what_is_not_zero() -> None:
    weight = drawn()
    weight[:, ::2] = 0.0
    weight[1] = 0.0
    rounded = BINARY.rounded(weight)
    assert not rounded[1].any()
    kept = weight[2, :128][weight[2, :128] != 0]
    assert rounded[2, :128].abs().unique().tolist() == pytest.approx([float(kept.abs().mean())], rel=1e-3)
    assert torch.equal(torch.where(weight[2] < 0, -1.0, 1.0), rounded[2].sign())


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:bf16 and fp16 are mixed")
@pytest.mark.parametrize(("grid", "columns"), [(GRIDS["symmetric 4"], 512), (SIGNED, 48)], ids=["scales in bf16", "rows filled up"])
def test_a_compiled_layer_rounds_to_the_same_codes(grid: Grid, columns: int) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    layer, inputs = torch.nn.Linear(columns, 6), torch.randn(3, columns)
    layer.__class__, layer.grid = RoundedLinear, grid
    outputs = layer(inputs)
    outputs.square().sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    compiled = torch.compile(layer, fullgraph=True)(inputs)
    compiled.square().sum().backward()
    torch.testing.assert_close(compiled, outputs)
    torch.testing.assert_close(layer.weight.grad, expected)


@EACH
def test_codes_and_scales_restore_the_values_and_fit_what_stores_them(name: str) -> None:
    grid = GRIDS[name]
    weight = drawn()
    found = grid.codes(weight)
    values = ((found.codes - found.zero) * found.scale).flatten(1)
    assert torch.equal(values, grid.rounded(weight))
    assert torch.equal(found.scale, found.scale.to(grid.scale_type).float())
    for whole in (found.codes, found.zero):
        assert torch.equal(whole, whole.round())
        assert whole.min() >= -(2 ** (grid.bits - 1))
        assert whole.max() <= 2 ** (grid.bits - 1) - 1


def by_extremes(weight: Tensor, bits: int, group: int) -> Tensor:
    """Round to nearest, from the least weight of a group to the largest."""
    grouped = weight.reshape(len(weight), -1, group)
    least, most = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = (most - least) / (2**bits - 1)
    return (torch.round((grouped - least) / step) * step + least).reshape(weight.shape)


@pytest.mark.parametrize("bits", [2, 3])
def test_cutting_the_extremes_loses_less_than_keeping_them(bits: int) -> None:
    weight = drawn(64)
    ours, theirs = GRIDS[f"asymmetric {bits}"].rounded(weight), by_extremes(weight, bits, 32)
    assert F.mse_loss(ours, weight) < F.mse_loss(theirs, weight)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes, tie_word_embeddings=True))


def test_a_model_computes_with_rounded_weights_and_learns_the_others() -> None:
    model, ids = llama(), torch.arange(20)[None]
    plain = model(ids).logits
    grids = dict.fromkeys(matrices(model), SIGNED)
    names = [name for name, _ in model.named_parameters()]
    with rounding(model, grids):
        assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), RoundedLinear)
        assert [name for name, _ in model.named_parameters()] == names
        rounded = model(ids).logits
        rounded.square().sum().backward()
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is torch.nn.Linear
    assert torch.equal(model(ids).logits, plain), "the weights themselves were not touched"
    other = llama()
    put_on_grids(other, grids)
    logits = other(ids).logits
    assert torch.equal(logits, rounded)
    assert not torch.allclose(plain, rounded, rtol=1e-3)
    logits.square().sum().backward()
    # Straight through: the gradient is that at the rounded weights.
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_a_model_is_given_back_after_a_failure() -> None:
    model = llama()
    with pytest.raises(KeyError, match="interrupted"), rounding(model, dict.fromkeys(matrices(model), SIGNED)):
        raise KeyError("interrupted")
    assert all(type(module) is torch.nn.Linear for module in matrices(model).values())


def test_the_output_matrix_is_none_of_the_matrices() -> None:
    model = llama()
    assert "lm_head" not in matrices(model)
    assert len(matrices(model)) == 2 * 7


def test_scales_are_read_back(tmp_path: Path) -> None:
    model = llama()
    scales = put_on_grids(model, dict.fromkeys(matrices(model), GRIDS["asymmetric 2"]))
    assert read_scales(tmp_path / "model") == {}
    write_scales(scales, tmp_path)
    found = read_scales(tmp_path / "model")
    assert found.keys() == scales.keys()
    assert all(torch.equal(found[name], scales[name]) for name in scales)
    assert found["model.layers.0.mlp.up_proj.scale"].shape == (96, 2)
