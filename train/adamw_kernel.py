"""AdamW over flat buffers as one Triton kernel: gradients of any precision in, fp32 masters, moments and bf16 weights out in one pass.

torch's fused AdamW wants gradients in the masters' fp32 and writes them back where it scales them; with the copies around it that is 50
bytes a weight. Here it is 30, and a step of a small model on few tokens is little else.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _update(
    masters,
    first,
    second,
    gradients,
    weights,
    factor,
    halted,
    size,
    rate,
    decay,
    beta1,
    beta2,
    epsilon,
    root_correction2,
    step_size,
    BLOCK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts = at < tl.where(tl.load(halted) == 0.0, size, 0)
    g = tl.load(gradients + at, mask=counts, other=0.0).to(tl.float32) * tl.load(factor)
    m = tl.load(first + at, mask=counts, other=0.0)
    v = tl.load(second + at, mask=counts, other=0.0)
    p = tl.load(masters + at, mask=counts, other=0.0)
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    p = p * (1.0 - rate * decay) - step_size * m / (tl.sqrt(v) / root_correction2 + epsilon)
    tl.store(first + at, m, mask=counts)
    tl.store(second + at, v, mask=counts)
    tl.store(masters + at, p, mask=counts)
    if HAS_WEIGHTS:
        tl.store(weights + at, p.to(weights.dtype.element_ty), mask=counts)


def update(
    masters: Tensor,
    first: Tensor,
    second: Tensor,
    gradients: Tensor,
    weights: Tensor | None,
    *,
    factor: Tensor,
    halted: Tensor,
    step: int,
    rate: float,
    decay: float,
    betas: tuple[float, float],
    epsilon: float,
) -> None:
    """One step of AdamW in place.

    Args:
        masters: [n] fp32.
        first: [n] fp32, the mean of the gradients.
        second: [n] fp32, that of their squares.
        gradients: [n], any float dtype.
        weights: [n] bf16, set to the new masters; None where the masters are the weights.
        factor: a scalar on the device, times which the gradients are taken (clipping).
        halted: a scalar on the device; where it is not 0 nothing is written.
        step: this step's number, from 1.
        rate: learning rate.
        decay: decoupled weight decay.
        betas: of the means.
        epsilon: added to the root of the second.

    Source: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2.
    """
    correction1, correction2 = 1.0 - betas[0] ** step, 1.0 - betas[1] ** step
    _update[(triton.cdiv(len(masters), _BLOCK),)](
        masters,
        first,
        second,
        gradients,
        masters if weights is None else weights,
        factor,
        halted,
        len(masters),
        rate,
        decay,
        *betas,
        epsilon,
        correction2**0.5,
        rate / correction1,
        BLOCK=_BLOCK,
        HAS_WEIGHTS=weights is not None,
    )
