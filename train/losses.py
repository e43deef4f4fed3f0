"""Losses: pure functions of tensors. Each gives a SUM over its own target tokens; the caller divides by the global count.

Source: Hsieh et al. 2023, "Distilling Step-by-Step!", arXiv 2305.02301, section 3.2 (L_label + lambda L_rationale).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy_sum(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the masked positions; computed in fp32.

    Args:
        logits: [N, L, V], any float dtype.
        targets: [N, L] int64.
        mask: [N, L] bool, true where a target counts.

    Returns:
        A scalar in fp32; 0 with a gradient path where nothing counts.
    """
    return F.cross_entropy(logits[mask].float(), targets[mask], reduction="sum")


def weighted_cross_entropy_sum(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy in nats of each target times its weight, summed; computed in fp32.

    With the weights p(a) of a teacher's answers a at each of their tokens this is the cross-entropy between the teacher's distribution
    over answers and the student's over texts, as the log-probability of a text is the sum of its tokens'. It lies above the divergence
    by the entropy of p, which no student can change.

    Args:
        logits: [N, L, V], any float dtype.
        targets: [N, L] int64.
        weights: [N, L] float32, at least 0.

    Returns:
        A scalar in fp32; 0 with a gradient path where every weight is 0.
    """
    counted = weights > 0
    return (weights[counted] * F.cross_entropy(logits[counted].float(), targets[counted], reduction="none")).sum()


def top_k_forward_kl_sum(logits: Tensor, positions: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """KL(teacher || student) in nats over k tokens and one bucket for all others, summed over M positions; in fp32.

    The bucket keeps the gradient honest: without it a student that gives the teacher's k tokens the right RATIOS but little mass would
    have no loss. It is a lower bound of the full divergence (data processing), and equal to it where k is the whole vocabulary.

    Args:
        logits: [N, L, V] of the student.
        positions: [M] int64, positions in the flattened [N * L].
        ids: [M, k] int64, the teacher's k most probable tokens, distinct within a row.
        log_probs: [M, k] float32, their log-probabilities under the teacher.

    Returns:
        A scalar in fp32, at least 0 up to rounding; 0 with a gradient path where M is 0.
    """
    student = F.log_softmax(logits.flatten(0, 1)[positions].float(), dim=-1)
    teacher = log_probs.exp()
    # A token that the teacher rules out has -inf, which would make 0 x inf.
    kl = torch.where(teacher > 0, teacher * (log_probs - student.gather(1, ids)), 0.0).sum()
    if ids.shape[1] == logits.shape[-1] or not len(positions):
        return kl
    missing = (1.0 - teacher.sum(dim=1)).clamp(min=0.0)
    student_missing = torch.scatter(student, 1, ids, float("-inf")).logsumexp(dim=1)
    return kl + (torch.xlogy(missing, missing) - missing * student_missing).sum()


def sampled_forward_kl_sum(logits: Tensor, positions: Tensor, ids: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """temperature^2 x KL(drawn || student) in nats, summed over M positions; in fp32.

    `drawn` is how often each token came up among the teacher's draws. Its expectation is the teacher's distribution, so the gradient is
    that of the full forward KL in expectation; no other divergence has an unbiased one. The value is larger than the full KL in
    expectation, by what the entropy of the draws lacks, which no student can change. There is no missing mass: tokens that were not
    drawn have probability 0.

    Args:
        logits: [N, L, V] of the student.
        positions: [M] int64, positions in the flattened [N * L].
        ids: [M, k] int64.
        log_probs: [M, k] float32, log of the share of the draws; -inf at an id that only fills up.
        temperature: of the distribution drawn from. The student's logits are divided by it, and the sum is multiplied by its square, so
            that the gradient is as large as at temperature 1.

    Returns:
        A scalar in fp32, at least 0 up to rounding; 0 with a gradient path where M is 0.

    Source:
        Random Sampling KD, arXiv 2503.16870; Hinton et al. 2015, arXiv 1503.02531, section 2 (the square of the temperature).
    """
    student = F.log_softmax(logits.flatten(0, 1)[positions].float() / temperature, dim=-1)
    drawn = log_probs.exp()
    # xlogy, because 0 x -inf at an id that only fills up would be no number.
    return temperature**2 * (torch.xlogy(drawn, drawn) - drawn * student.gather(1, ids)).sum()


def exact_matches(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Which sequences greedy decoding would write exactly, found without decoding.

    If every argmax under the gold prefix is the gold token, greedy decoding follows the gold sequence, and the other way round.

    Args:
        logits: [N, L, V].
        targets: [N, L] int64.
        mask: [N, L] bool; a row without a true is no match.

    Returns:
        [N] bool.
    """
    right = (logits.argmax(dim=-1) == targets) | ~mask
    return right.all(dim=1) & mask.any(dim=1)
