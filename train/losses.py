"""Losses: pure functions of logits at target positions. Each gives a SUM over its tokens; the caller divides by the global count.

These are the plain forms, with all logits at once: what train/head_loss.py computes in chunks is tested against them. All is computed in
fp32 (float64 stays float64).

Sources: Hsieh et al. 2023, arXiv 2305.02301, section 3.2 (L_label + lambda L_rationale); Hinton et al. 2015, arXiv 1503.02531, section 2
(temperature, and its square in front); Agarwal et al. 2024, arXiv 2306.13649, equation 1 (generalised Jensen-Shannon divergence); Ko et al.
2024, arXiv 2402.03898, section 3.1 (skew divergences); Anshumann et al. 2025, arXiv 2503.16870 (soft labels that were drawn).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from train.config import DivergenceKind

PARTS = ("label", "rationale", "soft")

Codec = Literal["top_k", "sampled", "choices", "answers", "live"]
"""Where a soft label comes from: a format of `teacher.soft_labels`, or the teacher's own logits."""

LEAST_LOG_PROB = math.log(2.0**-24)
"""What reverse KL takes for a teacher's probability of 0, where it would be infinite: less than this fp32 cannot tell from 0 beside 1."""


@dataclass(frozen=True, slots=True)
class Targets:
    """M target tokens of a batch, all on one device."""

    ids: Tensor
    """[M] int64."""
    part: Tensor
    """[M] int64: 0 a label's, 1 a rationale's, 2 one of the teacher's answers'."""
    weights: Tensor
    """[M] float32: how much each token's cross-entropy counts: 1; the probability of the teacher's answer; 0 only fills the batch."""
    soft_rows: Tensor
    """[S] int64, distinct: rows of M that have a soft label."""
    soft_ids: Tensor
    """[S, k] int64. Of top-k ones distinct within a row; of sampled ones those that only fill up come last."""
    soft_log_probs: Tensor
    """[S, k] float32; -inf at an id that the teacher rules out (top-k) or that only fills up (sampled)."""
    soft_temperature: float | None
    """Of sampled soft labels, whose probabilities add up to 1; None of top-k ones, which miss the mass of all other ids. A live teacher's
    rows need no soft_ids, soft_log_probs and soft_temperature."""
    soft_weights: Tensor | None = None
    """[S] float32: 1, or 0 where a soft label only fills the batch; None where each counts."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a student's q is from its teacher's p: at least 0, and 0 only where they are the same.

    forward_kl KL(p|q); reverse_kl KL(q|p); jsd beta KL(p|m) + (1-beta) KL(q|m) with m = beta p + (1-beta) q; skew_forward_kl
    KL(p | skew p + (1-skew) q); skew_reverse_kl KL(q | skew q + (1-skew) p).
    """

    kind: DivergenceKind = "forward_kl"
    temperature: float = 1.0
    """Divides a live teacher's logits and the student's; the divergence counts its square times, so that its gradient stays as large."""
    beta: float = 0.5
    skew: float = 0.1


def check_divergence(kind: DivergenceKind, temperature: float | None, codec: Codec) -> None:
    """Refuses what cannot be computed from such soft labels.

    Args:
        kind: `student.loss.divergence`.
        temperature: `student.loss.temperature`; None where left out.
        codec: where the soft labels come from.

    Raises:
        ValueError: another divergence than forward KL from draws or from whole answers; a temperature with stored soft labels.
    """
    reasons = {
        "sampled": f"only forward KL has an unbiased gradient from draws, and {kind} has none with any number of them",
        "choices": "whole answers with a probability each are learned by their cross-entropy, which is forward KL up to a constant",
    }
    reasons["answers"] = reasons["choices"]
    if codec in reasons and kind != "forward_kl":
        raise ValueError(
            f"student.loss.divergence is {kind}, but with teacher.soft_labels.format: {codec} it must be forward_kl: {reasons[codec]}. "
            "Set it to forward_kl, or set teacher.soft_labels.format to top_k, or student.loss.teacher to live"
        )
    if codec != "live" and temperature not in (None, 1.0):
        stored = {
            "top_k": "at temperature 1, and another one would need the probabilities that are not stored",
            "sampled": "at the temperature they were drawn with, teacher.soft_labels.temperature",
        }.get(codec, "probabilities of whole answers, which have no temperature")
        raise ValueError(
            f"student.loss.temperature is {temperature:g}, but the soft labels of teacher.soft_labels.format: {codec} are {stored}. "
            "Leave it out, or set student.loss.teacher to live"
        )


def loss_sums(
    logits: Tensor,
    targets: Targets,
    divergence: Divergence,
    *,
    vocabulary: int | None = None,
    teacher_logits: Tensor | None = None,
) -> Tensor:
    """Losses of label, rationale and soft labels in nats, each summed over its own tokens.

    Args:
        logits: [M, V] of the student, any float dtype.
        targets: what they should predict.
        divergence: at the rows with a soft label.
        vocabulary: ids that the tokenizer knows; soft labels compare the first of them only, as rows beyond are trained by nobody. The
            cross-entropies take all rows of logits, as a model does that writes.
        teacher_logits: [S, V'] of a live teacher at `targets.soft_rows`; in place of stored soft labels.

    Returns:
        [3] fp32 in the order of `PARTS`, with a gradient path to `logits` also where M is 0. The soft part is the divergence at soft labels
        plus the weighted cross-entropy of the teacher's answers.

    Raises:
        ValueError: see `check_divergence`.
    """
    sums = cross_entropy_sums(logits, targets.ids, targets.part, targets.weights)
    if not len(targets.soft_rows):
        return sums
    check_divergence(divergence.kind, divergence.temperature, codec_of(targets, is_live=teacher_logits is not None))
    if targets.soft_weights is not None:
        counted = targets.soft_weights > 0
        few = replace(targets, soft_rows=targets.soft_rows[counted], soft_weights=None)
        few = replace(few, soft_ids=targets.soft_ids[counted], soft_log_probs=targets.soft_log_probs[counted])
        teacher_logits = None if teacher_logits is None else teacher_logits[counted]
        return loss_sums(logits, few, divergence, vocabulary=vocabulary, teacher_logits=teacher_logits)
    student = logits[targets.soft_rows][:, :vocabulary]
    if teacher_logits is not None:
        soft = live_divergence_sum(student, teacher_logits[:, :vocabulary], divergence)
    elif targets.soft_temperature is None:
        soft = top_k_divergence_sum(student, targets.soft_ids, targets.soft_log_probs, divergence)
    else:
        soft = sampled_forward_kl_sum(student, targets.soft_ids, targets.soft_log_probs, targets.soft_temperature)
    return torch.stack([sums[0], sums[1], sums[2] + soft])


def codec_of(targets: Targets, *, is_live: bool) -> Codec:
    """Where the soft labels of a batch come from."""
    return "live" if is_live else "top_k" if targets.soft_temperature is None else "sampled"


def cross_entropy_sums(logits: Tensor, ids: Tensor, part: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy in nats of each target times its weight, summed over each part.

    With the weights p(a) of a teacher's answers a at each of their tokens this is the cross-entropy between the teacher's distribution
    over answers and the student's over texts, as the log-probability of a text is the sum of its tokens'. It lies above the divergence
    by the entropy of p, which no student can change.

    Args:
        logits: [M, V].
        ids: [M] int64.
        part: [M] int64, 0 to 2.
        weights: [M], at least 0.

    Returns:
        [3] fp32.
    """
    return sums_by_part(F.cross_entropy(exact(logits), ids, reduction="none"), part, weights)


def sums_by_part(entropies: Tensor, part: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums [3] of [M] cross-entropies; without atomic additions, so that they are the same bits each time."""
    weighted = weights.to(entropies.dtype) * entropies
    return torch.stack([torch.where(part == number, weighted, 0.0).sum() for number in range(len(PARTS))])


def top_k_divergence_sum(logits: Tensor, ids: Tensor, log_probs: Tensor, divergence: Divergence) -> Tensor:
    """A divergence in nats over k tokens and one bucket for all others, summed over S positions; at temperature 1.

    The bucket keeps the gradient honest: without it a student that gives the teacher's k tokens the right RATIOS but little mass would
    have no loss. It is a lower bound of the full divergence (data processing), and equal to it where k is the whole vocabulary.

    Args:
        logits: [S, V] of the student.
        ids: [S, k] int64, the teacher's k most probable tokens, distinct within a row.
        log_probs: [S, k], their log-probabilities under the teacher; -inf where it rules a token out.
        divergence: whose temperature is not used.

    Returns:
        A scalar in fp32, at least 0 up to rounding; 0 with a gradient path where S is 0.
    """
    log_q = torch.log_softmax(exact(logits), dim=-1)
    kept = log_q.gather(1, ids)
    if ids.shape[1] == logits.shape[1] or not len(ids):
        return divergences(log_probs.to(log_q.dtype), kept, divergence).sum()
    others = torch.scatter(log_q, 1, ids, float("-inf")).logsumexp(dim=1, keepdim=True)
    return divergences(with_missing_mass(log_probs).to(log_q.dtype), torch.cat([kept, others], dim=1), divergence).sum()


def with_missing_mass(log_probs: Tensor) -> Tensor:
    """[S, k + 1]: the log of what [S, k] probabilities lack of 1 comes last; -inf where that is nothing, or rounding made it negative.

    In float64, as little of a sum near 1 is missing; there are few of these numbers.
    """
    missing = (1.0 - log_probs.double().exp().sum(dim=1, keepdim=True)).clamp(min=0.0).log()
    return torch.cat([log_probs, missing.to(log_probs.dtype)], dim=1)


def sampled_forward_kl_sum(logits: Tensor, ids: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """temperature^2 x KL(drawn || student) in nats, summed over S positions.

    `drawn` is how often each token came up among the teacher's draws. Its expectation is the teacher's distribution, so the gradient is
    that of the full forward KL in expectation; no other divergence has an unbiased one. The value is larger than the full KL in
    expectation, by what the entropy of the draws lacks, which no student can change. There is no missing mass: tokens that were not
    drawn have probability 0.

    Args:
        logits: [S, V] of the student.
        ids: [S, k] int64.
        log_probs: [S, k], log of the share of the draws; -inf at an id that only fills up.
        temperature: of the distribution drawn from. The student's logits are divided by it, and the sum is multiplied by its square, so
            that the gradient is as large as at temperature 1.

    Returns:
        A scalar in fp32, at least 0 up to rounding; 0 with a gradient path where S is 0.
    """
    log_q = torch.log_softmax(exact(logits) / temperature, dim=-1)
    return temperature**2 * divergences(log_probs.to(log_q.dtype), log_q.gather(1, ids), Divergence("forward_kl")).sum()


def live_divergence_sum(logits: Tensor, teacher_logits: Tensor, divergence: Divergence) -> Tensor:
    """temperature^2 x a divergence in nats between whole distributions, both at that temperature, summed over S positions.

    Args:
        logits: [S, V] of the student.
        teacher_logits: [S, V], of the same ids.
        divergence: and its temperature.

    Returns:
        A scalar in fp32, at least 0 up to rounding; 0 with a gradient path where S is 0.
    """
    log_q = torch.log_softmax(exact(logits) / divergence.temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits.to(log_q.dtype) / divergence.temperature, dim=-1)
    return divergence.temperature**2 * divergences(log_p, log_q, divergence).sum()


def divergences(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """[S] nats between distributions over E events, given as logarithms [S, E] of the teacher's p and the student's q."""
    log_p = without_infinities(log_p, divergence.kind)
    match divergence.kind:
        case "forward_kl":
            return _kl(log_p, log_q)
        case "reverse_kl":
            return _kl(log_q, log_p)
        case "jsd":
            log_m = log_mixture(log_p, log_q, divergence.beta)
            return divergence.beta * _kl(log_p, log_m) + (1 - divergence.beta) * _kl(log_q, log_m)
        case "skew_forward_kl":
            return _kl(log_p, log_mixture(log_p, log_q, divergence.skew))
        case "skew_reverse_kl":
            return _kl(log_q, log_mixture(log_q, log_p, divergence.skew))


def without_infinities(log_p: Tensor, kind: DivergenceKind) -> Tensor:
    """The teacher's log-probabilities with a number for -inf, as 0 x -inf is none: for reverse KL a small one, else one whose exp is 0."""
    return log_p.nan_to_num(nan=math.nan, posinf=math.inf, neginf=LEAST_LOG_PROB if kind == "reverse_kl" else -1e4)


def log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """Log of share x a + (1 - share) x b."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def exact(values: Tensor) -> Tensor:
    """In fp32; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(dim=-1)
