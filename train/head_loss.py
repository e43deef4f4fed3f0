"""Output layer and loss in chunks: neither logits nor their gradient are ever in memory for all M target tokens at once.

    logits of a few chunks = hidden W^T          one product, in the model's dtype
    for each chunk of them: losses, and the gradient written over the logits          train/loss_gradients.py, in fp32
    gradient of hidden and of W from these       two products; that of W is summed in fp32

The gradient is computed in the forward pass, where the logits are at hand; the backward pass multiplies it by the incoming one. So nothing
is computed twice, and the weight is read in the forward pass only: ZeRO-3 may take it away afterwards. The plain form is
`losses.loss_sums`.

Source: Liger Kernel, Hsu et al. 2024, arXiv 2410.10989, section 3.2 (the fused linear cross-entropy).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.loss_gradients import AllIds, Chunk, FewIds, divergence_slopes, drawn_slopes, write_gradient
from train.losses import Divergence, Targets, check_divergence, codec_of, exact, sums_by_part

KERNELS = find_spec("triton") is not None
"""Triton, which comes with torch for CUDA."""
CHUNK_BYTES = 256 * 2**20
"""Of a chunk's logits in fp32."""
CHUNKS_A_PRODUCT = 4
"""Chunks that share the products with the weight: each product reads and writes the weight's gradient, [V, H] in fp32, which takes as
long as multiplying 500 rows on an H100."""


@dataclass(frozen=True, slots=True)
class Head:
    """The output layer: scale x hidden W^T + bias, and softcap x tanh(that / softcap) where there is a softcap."""

    weight: Tensor
    """[V, H]."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0
    """1 / sqrt(H) of a T5 whose embeddings are tied; 1 / logits_scaling of a Granite."""
    softcap: float | None = None
    """Bound of a logit (Gemma 2)."""


@dataclass(frozen=True, slots=True)
class LiveRows:
    """A teacher that runs beside the student, at the rows with a soft label."""

    hidden: Tensor
    """[S, H'], the teacher's last states at `Targets.soft_rows`."""
    head: Head


def head_losses(
    hidden: Tensor,
    head: Head,
    targets: Targets,
    scale: Tensor,
    divergence: Divergence,
    *,
    vocabulary: int | None = None,
    chunk_tokens: int | None = None,
    live: LiveRows | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses of the states at the target tokens, and their weighted sum to differentiate.

    Args:
        hidden: [M, H], the student's last states. Products are in its dtype, softmax and losses in fp32 (float64 stays).
        head: the student's output layer; a weight or bias that needs no gradient gets none (LoRA).
        targets: what to predict.
        scale: [3] fp32, what a nat of each part adds to the total: its weight over its global token count.
        divergence: at the rows with a soft label.
        vocabulary: ids that soft labels compare (see `losses.loss_sums`); all V where left out.
        chunk_tokens: rows whose logits are in fp32 at once; `chunk_rows(V)` where left out.
        live: the teacher itself, in place of stored soft labels.

    Returns:
        The total, sum(scale x sums), with a gradient to hidden, weight and bias (also where M is 0), but not to scale; and the sums [3] of
        label, rationale and soft labels in nats, detached.

    Raises:
        ValueError: see `losses.check_divergence`.
    """
    if len(targets.soft_rows):
        check_divergence(divergence.kind, divergence.temperature, codec_of(targets, is_live=live is not None))
    num_ids = head.weight.shape[0]
    task = _Task(head, targets, scale, divergence, vocabulary or num_ids, chunk_tokens or chunk_rows(num_ids), live)
    # Autocast would choose a dtype for each operation.
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled():
            total, sums = _HeadLosses.apply(hidden, head.weight, head.bias, task)  # type: ignore[no-untyped-call]
            return total, sums
        return _computed(hidden, head.weight, head.bias, task, None)


@torch.no_grad()
def head_matches(hidden: Tensor, head: Head, targets: Targets, *, chunk_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropies, and where the most probable token is the target, without a gradient.

    Where that is so at every token of a text, greedy decoding writes this text, and the other way round.

    Args:
        hidden: [M, H].
        head: the output layer.
        targets: ids, parts and weights; soft labels are not looked at.
        chunk_tokens: rows of a chunk; `chunk_rows(V)` where left out.

    Returns:
        Cross-entropies [3] of label, rationale and the teacher's answers in nats, summed with their weights; and [M] bool.
    """
    entropies = hidden.new_empty(len(hidden), dtype=_exact_dtype(hidden))
    right = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for start, end in _spans(0, len(hidden), chunk_tokens or chunk_rows(head.weight.shape[0])):
            logits, ids = _logits(hidden[start:end], head), targets.ids[start:end]
            right[start:end] = logits.argmax(dim=1) == ids
            entropies[start:end] = -torch.log_softmax(exact(logits), dim=1).gather(1, ids[:, None])[:, 0]
    return sums_by_part(entropies, targets.part, targets.weights), right


def chunk_rows(num_ids: int) -> int:
    """Rows of a chunk: a multiple of 128 whose logits in fp32 take at most `CHUNK_BYTES`, but at least 256."""
    return max(256, CHUNK_BYTES // (4 * num_ids) // 128 * 128)


@dataclass(frozen=True, slots=True)
class _Task:
    """What the autograd function needs besides the tensors it differentiates."""

    head: Head
    targets: Targets
    scale: Tensor
    divergence: Divergence
    vocabulary: int
    chunk_tokens: int
    live: LiveRows | None

    @property
    def at_all_ids(self) -> bool:
        """Some soft labels have a gradient of their own at every id (`_soft`), for which a chunk in fp32 is needed."""
        return self.live is not None or self.targets.soft_temperature not in (None, 1.0)


class _HeadLosses(torch.autograd.Function):
    """The gradient of the total is made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task) -> tuple[Tensor, Tensor]:
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        total, sums = _computed(hidden, weight, bias, task, gradients)
        ctx.save_for_backward(*gradients.whole())
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: who keeps the graph may run through it again.
        return (*(None if gradient is None else gradient * grad_total for gradient in ctx.saved_tensors), None)


class _Gradients:
    """Of hidden, weight and bias, as far as they are wanted; filled a few chunks at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> None:
        self._num_rows = len(hidden)
        self._weight = weight if wanted[1] else None
        self._bias = bias if wanted[2] else None
        self._of_hidden = torch.empty_like(hidden) if wanted[0] else None
        self._of_weight: Tensor | None = None
        self._of_bias: Tensor | None = None

    def add(self, logits: Tensor, states: Tensor, weight: Tensor, rows: Tensor, scale: float) -> None:
        """Takes the gradient of some logits.

        Args:
            logits: [n, V], the total's gradient to the product of `states` and `weight`.
            states: [n, H], already scaled.
            weight: [V, H], in the states' dtype.
            rows: [n] int64, rows of hidden that the states are.
            scale: of the states.
        """
        if self._of_hidden is not None:
            self._of_hidden[rows] = _scaled(torch.mm(logits, weight), scale)
        if self._bias is not None:
            summed = logits.sum(dim=0, dtype=_exact_dtype(logits))
            self._of_bias = summed if self._of_bias is None else self._of_bias.add_(summed)
        if self._weight is not None:
            # A product sums in fp32 inside, and so are several summed; one alone may be rounded at once.
            rounded = len(rows) == self._num_rows and self._weight.dtype == logits.dtype
            dtype = logits.dtype if rounded else _exact_dtype(logits)
            self._of_weight = _added_product(self._of_weight, logits.T, states, dtype)

    def whole(self) -> tuple[Tensor | None, ...]:
        """The sums, in the dtypes of what they are gradients of."""
        return self._of_hidden, _whole(self._of_weight, self._weight), _whole(self._of_bias, self._bias)


def _whole(total: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    if parameter is None:
        return None
    return torch.zeros_like(parameter) if total is None else total.to(parameter.dtype)


def _added_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """A b in `dtype`, added to the total in place."""
    if a.is_cuda and a.dtype != dtype:
        # Half precisions multiply into fp32 without a tensor in between. CUDA only: on a CPU the factors are converted.
        return torch.mm(a, b, out_dtype=dtype) if total is None else torch.addmm(total, a, b, out_dtype=dtype, out=total)
    a, b = a.to(dtype), b.to(dtype)
    return torch.mm(a, b) if total is None else total.addmm_(a, b)


def _computed(hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task, gradients: _Gradients | None) -> tuple[Tensor, Tensor]:
    """Total and sums; fills `gradients` with those of the total."""
    targets, dtype = task.targets, _exact_dtype(hidden)
    num_rows, num_soft = len(hidden), len(targets.soft_rows)
    order = _soft_first(targets.soft_rows, num_rows)
    scale, part, weights = task.scale.to(dtype), targets.part[order], targets.weights[order]
    ids, counts = targets.ids[order], scale[part] * weights
    entropies, values = hidden.new_empty(num_rows, dtype=dtype), hidden.new_empty(num_soft, dtype=dtype)
    soft_weights = hidden.new_ones(num_soft, dtype=dtype) if targets.soft_weights is None else targets.soft_weights.to(dtype)
    factors = (scale[2] * soft_weights)[:, None]
    head = Head(weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    # Both are filled over and over: the logits of a few chunks, and one chunk in fp32, which kernels do without.
    rows = max(1, min(num_rows, CHUNKS_A_PRODUCT * task.chunk_tokens))
    logits = hidden.new_empty(rows, len(weight))
    spare = KERNELS and hidden.is_cuda and dtype == torch.float32
    size = rows if spare and not task.at_all_ids else min(rows, task.chunk_tokens)
    space = None if spare else hidden.new_empty(size, task.vocabulary, dtype=dtype)
    for start, end in _spans(0, num_rows, rows):
        states = _scaled(hidden[order[start:end]], task.head.scale)
        block = _logits(states, head, out=logits[: end - start])
        teacher = _teacher_logits(task, start, min(end, num_soft))
        for a, b in _chunks(start, end, num_soft, size):
            soft = _soft(task, a, b, factors, None if teacher is None else teacher[a - start : b - start]) if a < num_soft else None
            part_of_block = block[a - start : b - start]
            part_of_space = None if space is None else space[: b - a]
            chunk = Chunk(part_of_block, ids[a:b], counts[a:b], soft, task.vocabulary, part_of_space, gradients is not None)
            entropies[a:b], found = _through_softcap(chunk, task.head.softcap)
            if found is not None:
                values[a:b] = found
        if gradients is not None:
            gradients.add(block, states, head.weight, order[start:end], task.head.scale)
    sums = sums_by_part(entropies, part, weights)
    sums[2] += (soft_weights * values).sum()
    return (scale * sums).sum(), sums


def _soft_first(soft_rows: Tensor, num_rows: int) -> Tensor:
    """[M] int64: rows with a soft label in the order of the soft labels, then the others in theirs.

    So a chunk knows its soft labels by its place, and the host need not wait for the device to say where they are.
    """
    num_soft = len(soft_rows)
    places = torch.arange(num_soft, num_soft + num_rows, device=soft_rows.device)
    places[soft_rows] = torch.arange(num_soft, device=soft_rows.device)
    return places.argsort()


def _spans(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(start, end, size):
        yield first, min(first + size, end)


def _chunks(start: int, end: int, num_soft: int, size: int) -> Iterator[tuple[int, int]]:
    """Spans of at most `size`, all of whose rows have a soft label, or none."""
    border = min(max(start, num_soft), end)
    yield from _spans(start, border, size)
    yield from _spans(border, end, size)


def _logits(states: Tensor, head: Head, out: Tensor | None = None) -> Tensor:
    """[n, V] in the states' dtype. The scale goes to the states, which are fewer than the logits."""
    states, weight = _scaled(states, head.scale), head.weight.to(states.dtype).T
    product = torch.mm(states, weight, out=out) if head.bias is None else torch.addmm(head.bias.to(states.dtype), states, weight, out=out)
    return product if head.softcap is None else product.div_(head.softcap).tanh_().mul_(head.softcap)


def _teacher_logits(task: _Task, start: int, end: int) -> Tensor | None:
    """[n, vocabulary] at soft labels `start` to `end`, of a live teacher."""
    if task.live is None or start >= end:
        return None
    logits = _logits(task.live.hidden[start:end].detach(), task.live.head)[:, : task.vocabulary]
    assert logits.shape[1] == task.vocabulary, f"the teacher has {logits.shape[1]} ids, but {task.vocabulary} are compared: give vocabulary"
    return logits


def _soft(task: _Task, a: int, b: int, factors: Tensor, teacher: Tensor | None) -> FewIds | AllIds:
    """Soft labels a to b; `teacher` holds a live teacher's logits there."""
    targets, temperature, factor = task.targets, task.divergence.temperature, factors[a:b]
    if teacher is not None:
        values = teacher.to(factor.dtype)
        log_p = torch.log_softmax(values if temperature == 1.0 else values / temperature, dim=1)
        return AllIds(lambda log_q: divergence_slopes(log_p, log_q, task.divergence), temperature, factor)
    ids, log_probs = targets.soft_ids[a:b], targets.soft_log_probs[a:b]
    if targets.soft_temperature is None:
        return FewIds(ids, log_probs, False, ids.shape[1] < task.vocabulary, task.divergence, factor)
    if targets.soft_temperature == 1.0:
        return FewIds(torch.where(log_probs.isneginf(), ids[:, :1], ids), log_probs, True, False, task.divergence, factor)
    return AllIds(lambda log_q: drawn_slopes(ids, log_probs.to(log_q.dtype), log_q), targets.soft_temperature, factor)


def _through_softcap(chunk: Chunk, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """`write_gradient` for logits that still want their softcap."""
    if softcap is None:
        return write_gradient(chunk)
    tanh = chunk.logits.div_(softcap).tanh_().clone()
    chunk.logits.mul_(softcap)
    found = write_gradient(chunk)
    chunk.logits.mul_(tanh.square_().neg_().add_(1))
    return found


def _scaled(values: Tensor, scale: float) -> Tensor:
    return values if scale == 1.0 else values * scale


def _exact_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32
