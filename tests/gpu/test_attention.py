"""The Triton kernels against the plain form in torch; on a CPU too, through Triton's interpreter.

python -m pytest tests/gpu/test_attention.py -m gpu                        on a GPU
TRITON_INTERPRET=1 python -m pytest tests/gpu/test_attention.py -m gpu     without one, with the package triton installed
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from train.teacher import attention
from train.teacher.attention import Joined, KeyValueCache, Layer, OneEach
from train.teacher.fusing import fuse

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1", allow_module_level=True)

from train.teacher import kernels, layer_kernels  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter multiplies bf16 as if it were integers
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def room(dtype: torch.dtype, heads: int, width: int, prefix: int, *, slots: int = 5, capacity: int = 150) -> Layer:
    cache = KeyValueCache(slots, capacity, prefix)
    layer = cache.layer(0, torch.zeros(1, heads, 1, width, dtype=dtype, device=DEVICE))
    for tensor in (layer.keys, layer.values, layer.prefix_keys, layer.prefix_values):
        tensor.normal_()
    return layer


def copied(layer: Layer) -> Layer:
    return Layer(layer.keys.clone(), layer.values.clone(), layer.prefix_keys.clone(), layer.prefix_values.clone())


def projections(num: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """As a model gives them: heads beside one another, so that a token's stride is not a head's."""
    return [torch.randn(num, h, width, device=DEVICE, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


def same(found: Tensor, expected: Tensor) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE[found.dtype], float(error)


def compare(kernel: Callable[..., Tensor], plain: Callable[..., Tensor], rows: list[Tensor], layer: Layer, batch: Joined | OneEach) -> None:
    """The kernel's output and what it leaves in the cache, against the plain form's in fp32 on the CPU."""
    here = copied(layer)
    found = kernel(*rows, here, batch, 0.3)
    there = Layer(*(t.float().cpu() for t in (layer.keys, layer.values, layer.prefix_keys, layer.prefix_values)))
    moved = replace(batch, **{name: getattr(batch, name).cpu() for name in batch.__slots__ if isinstance(getattr(batch, name), Tensor)})
    expected = plain(*(t.float().cpu() for t in rows), there, moved, 0.3)
    same(found.cpu(), expected.to(found.dtype))
    same(here.keys.cpu(), there.keys.to(found.dtype))
    same(here.values.cpu(), there.values.to(found.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 1, 64), (9, 3, 64), (4, 4, 80), (8, 2, 128)])
@pytest.mark.parametrize("prefix", [0, 70])
def test_joined_sequences(dtype: torch.dtype, heads: int, kv_heads: int, width: int, prefix: int) -> None:
    torch.manual_seed(0)
    lengths = (70, 1, 33, 8)
    rows = projections(sum(lengths), heads, kv_heads, width, dtype)
    starts = ints(0, *torch.tensor(lengths).cumsum(0).tolist())
    batch = Joined(starts, max(lengths), ints(3, 0, 4, 1), ints(0, 40, 5, 0), ints(1, 0, 1, 1) * int(prefix > 0))
    layer = room(dtype, kv_heads, width, prefix)
    compare(kernels.joined, attention._joined, rows, layer, batch)
    compare(kernels.joined, attention._joined, rows, layer, replace(batch, store=False))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 1, 64), (9, 3, 64), (4, 4, 80), (32, 8, 128)])
@pytest.mark.parametrize("prefix", [0, 70, 300])
def test_one_token_each(dtype: torch.dtype, heads: int, kv_heads: int, width: int, prefix: int) -> None:
    torch.manual_seed(1)
    rows = projections(4, heads, kv_heads, width, dtype)
    batch = OneEach(ints(0, 7, 64, 140), ints(1, 0, 1, 1) * int(prefix > 0))
    compare(kernels.one_each, attention._one_each, rows, room(dtype, kv_heads, width, prefix), batch)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 1, 64), (9, 3, 80), (32, 8, 128)])
def test_rotary_embedding(dtype: torch.dtype, heads: int, kv_heads: int, width: int) -> None:
    torch.manual_seed(2)
    wide = torch.randn(1, 7, (heads + kv_heads) * width, device=DEVICE, dtype=dtype)  # as one joint projection gives them
    query, key = (part.unflatten(-1, (-1, width)).transpose(1, 2) for part in (wide[..., : heads * width], wide[..., heads * width :]))
    cosine, sine = (torch.randn(1, 7, width, device=DEVICE, dtype=dtype) for _ in range(2))
    exact = [tensor.cpu().float() for tensor in (query, key, cosine, sine)]
    for found, expected in zip(layer_kernels.rotate(query, key, cosine, sine), apply_rotary_pos_emb(*exact), strict=True):
        same(found.cpu(), expected.to(found.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_gated_product(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    wide = torch.randn(2, 5, 2600, device=DEVICE, dtype=dtype)
    gate, up = wide[..., :1300], wide[..., 1300:]
    expected = torch.nn.functional.silu(gate.cpu().float()) * up.cpu().float()
    same(layer_kernels.gated(gate, up).cpu(), expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("width", [96, 576, 4096])
def test_norm(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(4)
    layer = LlamaRMSNorm(width, eps=1e-4).to(DEVICE, dtype)
    layer.weight.data.normal_()
    hidden = torch.randn(3, 5, width, device=DEVICE, dtype=dtype)
    same(layer_kernels.norm(hidden, layer.weight, 1e-4).cpu(), layer(hidden).detach().cpu())


@pytest.mark.skipif(INTERPRETED, reason="layers are fused on a GPU only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_llama_rounds_as_the_model_does(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, vocab_size=500
    )
    model = LlamaForCausalLM(config).to(DEVICE, dtype).eval()
    ids = torch.randint(0, 500, (1, 40), device=DEVICE)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert fuse(model) == {"projections": 3, "norms": 7, "feed_forwards": 3, "rotary": 1}
        found = model(input_ids=ids).logits
    same(found.cpu(), expected.cpu())
