"""Linear layers over one input are joined without a change to what they give; the kernels are tested in tests/gpu."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from train.teacher.fusing import _Joint, fuse


@pytest.mark.parametrize("bias", [False, True])
def test_joined_layers_give_what_each_gave_in_any_order(bias: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(8, width, bias=bias) for width in (12, 4, 4)]
    one, other = torch.randn(3, 8), torch.randn(3, 8)
    expected = {(n, x): layer(value) for n, layer in enumerate(layers) for x, value in enumerate((one, other))}
    assert _Joint(layers).install()
    for n, x in ((0, 0), (1, 0), (2, 0), (1, 1), (0, 0), (2, 1), (0, 1)):
        torch.testing.assert_close(layers[n]((one, other)[x]), expected[n, x])
    assert layers[0].weight.untyped_storage().data_ptr() == layers[2].weight.untyped_storage().data_ptr()


def test_layers_of_which_one_has_a_bias_are_not_joined() -> None:
    layers = [nn.Linear(8, 4), nn.Linear(8, 4, bias=False)]
    weight = layers[0].weight.data_ptr()
    assert not _Joint(layers).install()
    assert layers[0].weight.data_ptr() == weight


def test_sharded_weights_are_left_alone() -> None:
    model: Any = nn.Sequential(LlamaRMSNorm(8))
    model[0].weight.ds_id = 0
    assert fuse(model) == {}
