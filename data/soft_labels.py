"""The teacher's distributions as they lie in memory; data/packing.py makes bytes of them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class TopK:
    """The k largest probabilities at each of T target tokens; the rest of the mass is one more bucket.

    The missing mass is 1 - sum(exp(log_probs)): renormalising the k away would bias the student's gradient.
    """

    ids: NDArray[np.int32]
    """Token ids [T, k]."""
    log_probs: NDArray[np.float32]
    """Natural logarithms of their probabilities [T, k], at temperature 1."""
    target_log_probs: NDArray[np.float32]
    """Log-probability of the target token itself [T]; its negative mean is the teacher's cross-entropy (self-check)."""

    def __post_init__(self) -> None:
        assert self.ids.shape == self.log_probs.shape, (self.ids.shape, self.log_probs.shape)
        assert self.target_log_probs.shape == self.ids.shape[:1], (self.target_log_probs.shape, self.ids.shape)

    def __len__(self) -> int:
        return len(self.target_log_probs)

    def cut(self, length: int) -> TopK:
        """The soft labels of the first `length` tokens."""
        return TopK(self.ids[:length], self.log_probs[:length], self.target_log_probs[:length])


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """Tokens drawn with replacement from the teacher's distribution at each of T target tokens (Random Sampling KD, arXiv 2503.16870).

    Distinct ids stand once, with how often each was drawn; the counts of a token add up to `draws`.
    """

    ids: NDArray[np.int32]
    """Distinct token ids of all positions joined [N], ascending within a position."""
    counts: NDArray[np.int32]
    """How often each was drawn [N], at least 1."""
    distinct: NDArray[np.int32]
    """How many of them belong to each position [T]; they add up to N."""
    target_log_probs: NDArray[np.float32]
    """Log-probability of the target token itself [T] at temperature 1; its negative mean is the teacher's cross-entropy (self-check)."""
    draws: int
    temperature: float
    """Of the distribution drawn from."""

    def __post_init__(self) -> None:
        assert self.ids.shape == self.counts.shape == (int(self.distinct.sum()),), (self.ids.shape, self.counts.shape, self.distinct.sum())
        assert self.target_log_probs.shape == self.distinct.shape, (self.target_log_probs.shape, self.distinct.shape)

    def __len__(self) -> int:
        return len(self.target_log_probs)

    def cut(self, length: int) -> Sampled:
        """The soft labels of the first `length` tokens."""
        end = int(self.distinct[:length].sum())
        return Sampled(
            self.ids[:end], self.counts[:end], self.distinct[:length], self.target_log_probs[:length], self.draws, self.temperature
        )


SoftLabels = TopK | Sampled


def sampled_of(draws: NDArray[np.int32], target_log_probs: NDArray[np.float32], temperature: float) -> Sampled:
    """Drawn tokens as distinct ids with counts.

    Args:
        draws: [T, n] token ids, n draws at each position, in any order.
        target_log_probs: [T] log-probability of the target token itself, at temperature 1.
        temperature: of the distribution drawn from.
    """
    ordered = np.sort(draws, axis=1)
    first = np.ones(ordered.shape, np.bool_)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # A run ends where the next one starts, at the latest with its position, as each position starts one.
    counts = np.diff(np.append(np.flatnonzero(first), first.size))
    return Sampled(
        ordered[first].astype(np.int32),
        counts.astype(np.int32),
        first.sum(axis=1, dtype=np.int32),
        target_log_probs,
        draws.shape[1],
        temperature,
    )


@dataclass(frozen=True, slots=True)
class AnswerDistribution:
    """The teacher's probabilities of whole answers: over the choices of the example, or over the distinct answers it gave."""

    answers: tuple[str, ...]
    probabilities: tuple[float, ...]
    """Add up to 1."""
