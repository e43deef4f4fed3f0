"""Codes of llama.cpp's blocks against what its own quantizer packs, and rounding to the levels of their headers."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.calibration import rounded_by
from train.deploy.blocks import Blocks
from train.deploy.ggml import CODED, block_of, coded, highest_code, levels_of, quantize, with_codes

EACH = pytest.mark.parametrize("type", CODED)


def drawn(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0.01, 0.05, size=shape).astype(np.float32)


def read(blocks: NDArray[np.uint8], type: str) -> NDArray[np.float32]:
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type])


@EACH
def test_any_codes_are_read_back_as_offset_and_scale_say(type: str) -> None:
    blocks, high = quantize(drawn(5, 768), type), highest_code(type)
    assert high == 2 ** int(type[1]) - 1
    scale, offset = levels_of(blocks, type)
    assert len(np.unique(scale[0])) > 8, "each group has its own"
    codes = np.random.default_rng(1).integers(0, high + 1, size=(5, 768), dtype=np.uint8)
    packed = with_codes(blocks, codes, type)
    found = np.rint((read(packed, type) - offset) / scale)
    assert np.array_equal(found, codes)
    np.testing.assert_allclose(read(packed, type), offset + scale * codes, rtol=1e-5, atol=1e-7)
    for group, other in zip(levels_of(packed, type), (scale, offset), strict=True):
        assert np.array_equal(group, other), "the header is left alone"


@EACH
def test_the_quantizers_own_codes_make_its_own_bytes(type: str) -> None:
    values = drawn(3, 512)
    values[1, 256:] = 0.0
    blocks = quantize(values, type)
    codes = with_codes(blocks, np.full(values.shape, highest_code(type), np.uint8), type)
    assert not np.array_equal(codes, blocks)
    again = coded(read(blocks, type), codes, type)
    # Where a scale is 0 any code is as good.
    assert np.array_equal(again[[0, 2]], blocks[[0, 2]])
    assert np.array_equal(read(again, type), read(blocks, type))


def torch_of(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(drawn(*shape, seed=seed))


def correlated(columns: int, rows: int = 900) -> Tensor:
    """Inputs [rows, columns] of few directions, and some noise."""
    return torch_of(rows, columns // 8, seed=1) @ torch_of(columns // 8, columns, seed=2) + 0.02 * torch_of(rows, columns, seed=3)


def nearest(weight: Tensor, header: Tensor, type: str) -> Tensor:
    return torch.from_numpy(read(coded(weight.numpy(), header.numpy(), type), type))


@EACH
def test_inputs_without_correlation_round_to_the_nearest_level(type: str) -> None:
    weight = torch_of(7, 512, seed=0)
    found, header = rounded_by(3.0 * torch.eye(512), weight, Blocks(type))
    assert header is not None and header.dtype == torch.uint8
    assert torch.allclose(found, nearest(weight, header, type), rtol=1e-5, atol=1e-7)
    for level, other in zip(levels_of(header.numpy(), type), levels_of(quantize(weight.numpy(), type), type), strict=True):
        assert np.array_equal(level, other), "the levels are those of llama.cpp's own search"


@EACH
def test_outputs_change_less_than_by_rounding_to_nearest(type: str) -> None:
    fed, weight = correlated(512), torch_of(64, 512, seed=0)
    found, header = rounded_by(fed.T @ fed, weight, Blocks(type))
    assert header is not None
    written = coded(found.numpy(), header.numpy(), type)
    np.testing.assert_allclose(read(written, type), found, rtol=1e-5, atol=1e-7, err_msg="the file holds what was chosen")
    lost, before = (float((fed @ (weight - torch.from_numpy(read(of, type))).T).norm()) for of in (written, quantize(weight.numpy(), type)))
    assert lost < 0.6 * before


@EACH
def test_what_was_zero_and_is_never_fed_stays_next_to_zero(type: str) -> None:
    fed, weight = correlated(512), torch_of(6, 512, seed=0)
    weight[:, 320:], weight[4], weight[:, ::5] = 0.0, 0.0, 0.0
    fed[:, 320:] = 0.0
    found, header = rounded_by(fed.T @ fed, weight, Blocks(type))
    assert header is not None and found.isfinite().all()
    assert not found[4].any() and not found[:, 512 - 512 % block_of(type) :].any()
    scale = torch.from_numpy(levels_of(header.numpy(), type)[0])
    assert (found[weight == 0].abs() <= 0.501 * scale[weight == 0].abs()).all()
    if type in ("Q3_K", "Q6_K"):
        assert not found[weight == 0].any()
    assert found[:4, :320].count_nonzero() > 0.5 * found[:4, :320].numel()
