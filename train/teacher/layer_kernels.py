# fmt: off
"""Triton kernels of `fusing.py`: parts of a layer done in one step each, rounded where the model's own operations round."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.teacher.kernels import dense


@triton.jit
def _rounded(value, kind: tl.constexpr):
    """`value` as a tensor of that type would hold it: the model's layers round between their operations, and so do these kernels."""
    return value.to(kind).to(tl.float32)


@triton.jit
def _rotate_kernel(query_out, key_out, query, key, cosine, sine, query_stride, query_head, key_stride, key_head, angle_stride,
                   QUERIES: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """One program: one token and one head, of queries first and keys after them; the two halves of a head turn against one another."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    along = tl.arange(0, HALF)
    inside = along < WIDTH // 2
    angles = cosine + token * angle_stride + along, sine + token * angle_stride + along
    low_cos = tl.load(angles[0], mask=inside, other=0.0).to(tl.float32)
    high_cos = tl.load(angles[0] + WIDTH // 2, mask=inside, other=0.0).to(tl.float32)
    low_sin = tl.load(angles[1], mask=inside, other=0.0).to(tl.float32)
    high_sin = tl.load(angles[1] + WIDTH // 2, mask=inside, other=0.0).to(tl.float32)
    if head < QUERIES:
        source = query + token * query_stride + head * query_head
        target = query_out + (token * QUERIES + head) * WIDTH
    else:
        source = key + token * key_stride + (head - QUERIES) * key_head
        target = key_out + (token * HEADS + head - QUERIES) * WIDTH
    low = tl.load(source + along, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + WIDTH // 2 + along, mask=inside, other=0.0).to(tl.float32)
    kind = query_out.dtype.element_ty
    tl.store(target + along, _rounded(low * low_cos, kind) - _rounded(high * low_sin, kind), mask=inside)
    tl.store(target + WIDTH // 2 + along, _rounded(high * high_cos, kind) + _rounded(low * high_sin, kind), mask=inside)


@triton.jit
def _gate_kernel(out, gate, up, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    """One program: BLOCK neurons of one token."""
    token = tl.program_id(0).to(tl.int64)
    along = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = along < width
    g = tl.load(gate + token * gate_stride + along, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + token * up_stride + along, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + along, _rounded(g / (1.0 + tl.exp(-g)), out.dtype.element_ty) * u, mask=inside)


@triton.jit
def _norm_kernel(out, hidden, weight, hidden_stride, epsilon, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """One program: one token."""
    token = tl.program_id(0).to(tl.int64)
    along = tl.arange(0, TILE)
    inside = along < WIDTH
    x = tl.load(hidden + token * hidden_stride + along, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + along, mask=inside, other=0.0).to(tl.float32)
    scaled = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + epsilon)
    tl.store(out + token * WIDTH + along, w * _rounded(scaled, out.dtype.element_ty), mask=inside)


def rotate(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), the halves of a head as pairs.

    Args:
        query: [1, Hq, N, D].
        key: [1, H, N, D].
        cosine: [1, N, D], the same in both halves or not.
        sine: as `cosine`.

    Returns:
        Query and key, turned; of the same shapes, heads of a token side by side in memory.
    """
    rows, others = dense(query[0].transpose(0, 1)), dense(key[0].transpose(0, 1))
    num, heads, width = rows.shape
    turned = torch.empty(num, heads, width, dtype=query.dtype, device=query.device)
    keys = torch.empty(num, others.shape[1], width, dtype=query.dtype, device=query.device)
    cosine, sine = cosine[0].contiguous(), sine[0].contiguous()
    _rotate_kernel[num, heads + others.shape[1]](
        turned, keys, rows, others, cosine, sine, rows.stride(0), rows.stride(1), others.stride(0), others.stride(1), cosine.stride(0),
        QUERIES=heads, HEADS=others.shape[1], WIDTH=width, HALF=triton.next_power_of_2(width // 2), num_warps=1,
    )
    return turned.transpose(0, 1)[None], keys.transpose(0, 1)[None]


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [..., I]."""
    width = gate.shape[-1]
    rows, others = dense(gate.flatten(0, -2)), dense(up.flatten(0, -2))
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grid = rows.shape[0], triton.cdiv(width, 1024)
    _gate_kernel[grid](out, rows, others, rows.stride(0), others.stride(0), width, BLOCK=1024, num_warps=4)
    return out


def norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm of [..., D] (Zhang and Sennrich 2019, arXiv 1910.07467), as Llama's layers do it: scaled, then weighted."""
    width = hidden.shape[-1]
    rows = dense(hidden.flatten(0, -2))
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    _norm_kernel[(rows.shape[0],)](
        out, rows, weight, rows.stride(0), epsilon, WIDTH=width, TILE=triton.next_power_of_2(width), num_warps=8 if width > 1024 else 2
    )
    return out
