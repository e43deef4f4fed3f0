"""The two passes of a cross-entropy over rows of logits as Triton kernels: the sum of the exponentials, and the gradient over the logits.

Each reads a row once, and nothing in fp32 is as large as the logits: 6 bytes a bf16 logit for both, where torch's operations take 26.
Written for any GPU that Triton serves.

Source of the running maximum: Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _sum(logits, peaks, totals, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(logits + row * stride + at, mask=at < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, values)
        anchor = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but -inf so far
        total = total * tl.exp(peak - anchor) + tl.exp(values - anchor)
        peak = higher
    top = tl.max(peak, 0)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    tl.store(peaks + row, top)
    tl.store(totals + row, tl.sum(total * tl.exp(peak - anchor), 0))


@triton.jit
def _write(logits, peaks, multiples, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * stride + at
    values = tl.load(place, mask=at < width, other=0.0).to(tl.float32)
    shares = tl.exp(values - tl.load(peaks + row)) * tl.load(multiples + row)
    tl.store(place, shares.to(logits.dtype.element_ty), mask=at < width)


def sum_exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, and the sum of exp(logit - largest).

    Args:
        logits: [n, V] of any float dtype but float64, ids side by side; -inf counts as nothing.

    Returns:
        Two tensors [n, 1] in fp32. A NaN makes its row's sum NaN.
    """
    assert logits.stride(1) == 1, logits.stride()
    peaks, totals = (logits.new_empty(len(logits), 1, dtype=torch.float32) for _ in range(2))
    if len(logits):
        _sum[(len(logits),)](logits, peaks, totals, logits.stride(0), logits.shape[1], BLOCK=_BLOCK, num_warps=8)
    return peaks, totals


def write_exponentials(logits: Tensor, peaks: Tensor, multiples: Tensor) -> None:
    """A multiple of exp(logit - peak), of each row another, over the logits.

    Args:
        logits: [n, V], as above.
        peaks: [n, 1] fp32.
        multiples: [n, 1] fp32.
    """
    assert logits.stride(1) == 1, logits.stride()
    if len(logits):
        grid = (len(logits), triton.cdiv(logits.shape[1], _BLOCK))
        _write[grid](logits, peaks, multiples, logits.stride(0), logits.shape[1], BLOCK=_BLOCK, num_warps=8)
