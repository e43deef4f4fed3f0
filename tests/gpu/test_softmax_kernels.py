"""The Triton kernels of the student's losses against torch's own operations; on a CPU too, through Triton's interpreter.

python -m pytest tests/gpu/test_softmax_kernels.py -m gpu                        on a GPU
TRITON_INTERPRET=1 python -m pytest tests/gpu/test_softmax_kernels.py -m gpu     without one, with the package triton installed
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from train import head_loss
from train.head_loss import Head, head_losses
from train.loss_gradients import Chunk, FewIds, write_gradient
from train.losses import Divergence, Targets

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1", allow_module_level=True)

from train.softmax_kernels import sum_exponentials, write_exponentials  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, HALF])
WIDTHS = pytest.mark.parametrize("width", [3, 4096, 9001])


def logits(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    return (4 * torch.randn(rows, width, device=DEVICE)).to(dtype)


@DTYPES
@WIDTHS
def test_sums_are_those_of_a_log_sum_exp(width: int, dtype: torch.dtype) -> None:
    values = logits(5, width, dtype)
    values[0, : width - 1] = -math.inf
    values[1] += 60  # exp of it alone would be past fp16
    peaks, totals = sum_exponentials(values)
    assert torch.equal(peaks, values.float().amax(dim=1, keepdim=True))
    torch.testing.assert_close(peaks + totals.log(), values.double().logsumexp(dim=1, keepdim=True).float(), rtol=2e-6, atol=2e-6)


@DTYPES
@WIDTHS
def test_exponentials_are_written_over_the_logits(width: int, dtype: torch.dtype) -> None:
    whole = logits(5, width + 7, dtype)
    rest = whole[:, width:].clone()
    values, multiples = whole[:, :width], torch.linspace(-2, 2, 5, device=DEVICE)[:, None]
    values[2, 0] = -math.inf
    peaks = values.float().amax(dim=1, keepdim=True)
    expected = (multiples.double() * (values.double() - peaks.double()).exp()).to(dtype)
    write_exponentials(values, peaks, multiples)
    torch.testing.assert_close(values, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert torch.equal(whole[:, width:], rest)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of the interpreter, which is numpy
def test_a_logit_that_is_no_number_is_not_lost() -> None:
    values = logits(3, 5000, torch.float32)
    values[1, 4321], values[2, 17] = math.nan, math.inf
    assert sum_exponentials(values)[1].isfinite().flatten().tolist() == [True, False, False]


def test_no_rows_are_fine() -> None:
    empty = logits(0, 10, torch.float32)
    assert [tuple(found.shape) for found in sum_exponentials(empty)] == [(0, 1), (0, 1)]
    write_exponentials(empty, empty[:, :1], empty[:, :1])


def few_ids(kind: str, rows: int, known: int) -> FewIds | None:
    if kind == "none":
        return None
    ids = torch.stack([torch.randperm(known, device=DEVICE)[:4] for _ in range(rows)])
    shares = torch.rand(rows, 4, device=DEVICE)
    log_probs = (shares / shares.sum(dim=1, keepdim=True) * (0.8 if kind == "top_k" else 1.0)).log()
    factor = torch.full((rows, 1), 0.3, device=DEVICE)
    return FewIds(ids, log_probs, kind == "sampled", kind == "top_k", Divergence(), factor)


@DTYPES
@pytest.mark.parametrize("kind", ["none", "top_k", "sampled"])
@pytest.mark.parametrize("known", [5000, 4500])
def test_a_chunk_has_the_losses_and_gradient_that_torch_gives_it(kind: str, known: int, dtype: torch.dtype) -> None:
    rows, width = 6, 5000
    values, counts = logits(rows, width, dtype), torch.rand(rows, device=DEVICE)
    ids, space = torch.randint(width, (rows,), device=DEVICE), torch.empty(rows, known, device=DEVICE)
    plain = Chunk(values.clone(), ids, counts, few_ids(kind, rows, known), known, space, True)
    spare = replace(plain, logits=values.clone(), space=None)
    expected, found = write_gradient(plain), write_gradient(spare)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spare.logits, plain.logits, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="the losses take the kernels on a GPU only")
@pytest.mark.parametrize("num_soft", [0, 900, 3000])
def test_losses_are_the_same_with_and_without_kernels(num_soft: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows, width, num_ids = 3000, 64, 30_000
    hidden = torch.randn(rows, width, device=DEVICE, dtype=HALF)
    weight = torch.randn(num_ids, width, device=DEVICE, dtype=HALF) / 8
    soft = few_ids("top_k", num_soft, num_ids) if num_soft else None
    targets = Targets(
        torch.randint(num_ids, (rows,), device=DEVICE),
        torch.randint(2, (rows,), device=DEVICE),
        torch.ones(rows, device=DEVICE),
        torch.randperm(rows, device=DEVICE)[:num_soft],
        soft.ids if soft is not None else torch.zeros(0, 1, dtype=torch.int64, device=DEVICE),
        soft.log_probs if soft is not None else torch.zeros(0, 1, device=DEVICE),
        None,
    )
    results = []
    for kernels in (True, False):
        monkeypatch.setattr(head_loss, "KERNELS", kernels)
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        total, sums = head_losses(inputs[0], Head(inputs[1]), targets, torch.full((3,), 1e-3, device=DEVICE), Divergence())
        results.append([sums, *torch.autograd.grad(total, inputs)])
    for found, expected in zip(*results, strict=True):
        assert (found.double() - expected.double()).norm() / expected.double().norm() < 2e-3
