"""Losses of one chunk of logits with their gradients in closed form, which is written over the logits.

A softmax over the vocabulary is bound by memory, so passes over it are what counts. A cross-entropy, with a stored soft label beside it
or without, takes four of torch's operations: the peak, exp(logit - peak), their sum, and one multiplication that gives the gradient, since
at all ids but the k + 1 of the labels that is one multiple of exp(logit - peak). On a GPU two kernels do it (train/softmax_kernels.py). A
live teacher's divergence has a value of its own at every id.

The plain forms are in train/losses.py; automatic differentiation of those is what the tests compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from train.losses import Divergence, log_mixture, with_missing_mass, without_infinities


@dataclass(frozen=True, slots=True)
class FewIds:
    """Soft labels of k ids at temperature 1: the gradient at all other ids is one multiple of the student's probability."""

    ids: Tensor
    """[n, k]; what only fills up repeats the first id."""
    log_probs: Tensor
    """[n, k]; -inf at what only fills up, or is ruled out."""
    sampled: bool
    """Drawn tokens, not the most probable ones."""
    bucket: bool
    """All other ids together are one more event: the most probable ones, but not of the whole vocabulary."""
    divergence: Divergence
    factor: Tensor
    """[n, 1]: what a nat of each adds to the total."""

    def slopes(self, kept: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The divergence and its gradient to few logits.

        Args:
            kept: [n, k] the student's logits at `ids`.
            others: [n, 1] log-sum-exp of its logits at all other ids with a bucket, at all ids without.

        Returns:
            The divergence [n]; its gradients to `kept` [n, k] and to `others` [n, 1]; the log-sum-exp [n, 1] of all ids.
        """
        log_probs = self.log_probs.to(kept.dtype)
        if self.sampled:
            drawn = log_probs.exp()
            value = (drawn * (without_infinities(log_probs, "forward_kl") - (kept - others))).sum(dim=1)
            repeated = torch.where(drawn > 0, drawn, drawn[:, :1])
            return value, -repeated, drawn.sum(dim=1, keepdim=True), others
        if not self.bucket:
            value, slopes = divergence_slopes(log_probs, kept - others, self.divergence)
            return value, slopes, torch.zeros_like(others), others
        events = torch.cat([kept, others], dim=1)
        normalizer = events.logsumexp(dim=1, keepdim=True)
        value, slopes = divergence_slopes(with_missing_mass(self.log_probs).to(kept.dtype), events - normalizer, self.divergence)
        return value, slopes[:, :-1], slopes[:, -1:], normalizer


@dataclass(frozen=True, slots=True)
class AllIds:
    """Soft labels whose gradient has a value of its own at every id, or that have another temperature than the cross-entropy."""

    slopes: Callable[[Tensor], tuple[Tensor, Tensor]]
    """From the student's log-probabilities [n, vocabulary] at `temperature`: the divergence [n], and its gradient [n, vocabulary] to the
    logits over that temperature, in new memory."""
    temperature: float
    factor: Tensor
    """[n, 1]: what a nat of each adds to the total."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """n rows, of which all have a soft label or none."""

    logits: Tensor
    """[n, V]; the gradient of the total is written over them."""
    ids: Tensor
    """[n] int64 targets."""
    counts: Tensor
    """[n] fp32 or float64, the dtype of all that is computed: what a nat of the row's cross-entropy adds to the total."""
    soft: FewIds | AllIds | None
    vocabulary: int
    """Ids that soft labels compare, the first of V."""
    space: Tensor | None
    """[n, vocabulary] in fp32 or float64, in which losses are computed; its content is lost. None where kernels need none."""
    wanted: bool
    """Write the gradient; else the logits hold nothing of use afterwards."""


def write_gradient(chunk: Chunk) -> tuple[Tensor, Tensor | None]:
    """Cross-entropies [n] in nats, divergences [n] where there are soft labels, and the total's gradient written over the logits."""
    if isinstance(chunk.soft, AllIds):
        return _with_all_ids(chunk, chunk.soft)
    return _with_few_ids(chunk, chunk.soft)


def _with_few_ids(chunk: Chunk, soft: FewIds | None) -> tuple[Tensor, Tensor | None]:
    dtype, counts, target = chunk.counts.dtype, chunk.counts[:, None], chunk.ids[:, None]
    inside, outside = chunk.logits[:, : chunk.vocabulary], chunk.logits[:, chunk.vocabulary :].to(dtype)
    at_target = chunk.logits.gather(1, target).to(dtype)
    kept = chunk.logits.gather(1, soft.ids).to(dtype) if soft is not None else at_target
    if soft is not None and soft.bucket:
        # Summed without them, not subtracted from the sum: a student sure of them leaves the others less than its rounding.
        inside.scatter_(1, soft.ids, -math.inf)
    peak, total = _sum_exponentials(inside, chunk.space)
    others = peak + total.log_()
    value, at_kept, at_others, normalizer = soft.slopes(kept, others) if soft is not None else (None, others, others, others)
    whole = torch.logaddexp(normalizer, outside.logsumexp(dim=1, keepdim=True)) if outside.shape[1] else normalizer
    if chunk.wanted:
        multiple = counts * (peak - whole).exp()
        target_gradient = counts * torch.expm1(at_target - whole)
        if soft is not None:
            multiple += soft.factor * at_others * (peak - others).exp()
            target_gradient += torch.where(target < chunk.vocabulary, soft.factor * at_others * (at_target - others).exp(), 0.0)
        _write_exponentials(inside, peak, multiple, chunk.space)
        chunk.logits[:, chunk.vocabulary :] = counts * (outside - whole).exp()
        chunk.logits.scatter_(1, target, target_gradient.to(chunk.logits.dtype))
        if soft is not None:
            # After the target, which may be among them.
            kept_gradient = counts * ((kept - whole).exp() - (soft.ids == target).to(dtype)) + soft.factor * at_kept
            if not soft.bucket:
                kept_gradient += soft.factor * at_others * (kept - others).exp()
            chunk.logits.scatter_(1, soft.ids, kept_gradient.to(chunk.logits.dtype))
    return (whole - at_target)[:, 0], value


def _sum_exponentials(logits: Tensor, space: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest logit of each row [n, 1], and the sum [n, 1] of exp(logit - largest); leaves these in the space."""
    if space is None:
        from train.softmax_kernels import sum_exponentials

        return sum_exponentials(logits)
    peak = logits.amax(dim=1, keepdim=True).to(space.dtype)
    return peak, torch.sub(logits, peak, out=space).exp_().sum(dim=1, keepdim=True)


def _write_exponentials(logits: Tensor, peak: Tensor, multiple: Tensor, space: Tensor | None) -> None:
    """A multiple of exp(logit - peak), over the logits; the space still holds exp(logit - peak)."""
    if space is None:
        from train.softmax_kernels import write_exponentials

        write_exponentials(logits, peak, multiple)
    else:
        torch.mul(space, multiple, out=logits)


def _with_all_ids(chunk: Chunk, soft: AllIds) -> tuple[Tensor, Tensor]:
    target, counts = chunk.ids[:, None], chunk.counts[:, None]
    logits = chunk.logits.to(chunk.counts.dtype)
    log_probs = torch.log_softmax(logits, dim=1)
    shared = soft.temperature == 1.0 and chunk.vocabulary == logits.shape[1]
    log_q = log_probs if shared else torch.log_softmax(logits[:, : chunk.vocabulary] / soft.temperature, dim=1)
    value, slopes = soft.slopes(log_q)
    entropies = -log_probs.gather(1, target)[:, 0]
    if chunk.wanted:
        gradient = log_probs.exp_().mul_(counts).scatter_add_(1, target, -counts)
        inside = gradient[:, : chunk.vocabulary]
        torch.addcmul(inside, slopes, soft.factor, value=soft.temperature, out=chunk.logits[:, : chunk.vocabulary])
        chunk.logits[:, chunk.vocabulary :] = gradient[:, chunk.vocabulary :]
    return entropies, soft.temperature**2 * value


def drawn_slopes(ids: Tensor, log_probs: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Forward KL [n] from the shares of drawn ids, and its gradient [n, v] to logits.

    Args:
        ids: [n, k].
        log_probs: [n, k], log of the share of the draws; -inf at an id that only fills up.
        log_q: [n, v] of the student.
    """
    drawn = log_probs.exp()
    value = (drawn * (without_infinities(log_probs, "forward_kl") - log_q.gather(1, ids))).sum(dim=1)
    return value, log_q.exp().mul_(drawn.sum(dim=1, keepdim=True)).scatter_add_(1, ids, -drawn)


def divergence_slopes(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """`losses.divergences` with its gradient to the logits that `log_q` is the log-softmax of.

    With h the derivative to log q, that gradient is h - q sum(h); a multiple of q may be left out of h, as it goes away there.

    Args:
        log_p: [n, E] of the teacher, constant.
        log_q: [n, E] of the student.
        divergence: whose temperature is not used.

    Returns:
        Nats [n], and the gradient [n, E] in new memory.
    """
    log_p = without_infinities(log_p, divergence.kind)
    q = log_q.exp()
    match divergence.kind:
        case "forward_kl":
            h = log_p.exp().neg_()
            value = _dot(h, log_q - log_p)
        case "reverse_kl":
            h = (log_q - log_p).mul_(q)
            value = h.sum(dim=1)
        case "jsd":
            log_m = log_mixture(log_p, log_q, divergence.beta)
            h = (log_q - log_m).mul_(q).mul_(1 - divergence.beta)
            value = h.sum(dim=1) + divergence.beta * _dot(log_p.exp(), log_p - log_m)
        case "skew_forward_kl":
            log_m = log_mixture(log_p, log_q, divergence.skew)
            value = _dot(log_p.exp(), log_p - log_m)
            h = log_m.neg_().add_(log_p).add_(log_q).exp_().mul_(divergence.skew - 1)
        case "skew_reverse_kl":
            log_m = log_mixture(log_q, log_p, divergence.skew)
            h = (log_q - log_m).mul_(q)
            value = h.sum(dim=1)
            h -= log_m.neg_().add_(log_q, alpha=2).exp_().mul_(divergence.skew)
    return value, torch.addcmul(h, q, h.sum(dim=1, keepdim=True), value=-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return b.mul_(a).sum(dim=1)
