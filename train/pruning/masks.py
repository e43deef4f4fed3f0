"""Which weights stay: pure functions from scores to masks, True where a weight is kept.

A mask only ever loses weights: `before` is the mask so far, and what it leaves out stays out. Of equal scores the first stays.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def cubic(step: int, *, begin: int, end: int, fraction: float) -> float:
    """The share of weights that are out after `step`: none before `begin`, `fraction` from `end` on, most of it early.

    Source: Zhu and Gupta, To prune, or not to prune, arXiv 1710.01878, equation 1.
    """
    if step < begin:
        return 0.0
    if step >= end:
        return fraction
    return fraction * (1.0 - (1.0 - (step - begin) / (end - begin)) ** 3)


def keep_in_matrix(scores: Tensor, fraction: float, before: Tensor | None = None) -> Tensor:
    """Leaves out the weights of a matrix that score least: `fraction` of them, to the nearest whole number, but never all.

    Args:
        scores: any shape, at least one weight.
        fraction: to leave out, in [0, 1).
        before: the mask so far, of the same shape.
    """
    ranked = _ranked(scores, before)
    return _largest(ranked.flatten(), _num_kept(scores.numel(), fraction)).view(scores.shape)


def keep_in_rows(scores: Tensor, fraction: float, before: Tensor | None = None) -> Tensor:
    """The same with as many weights out of each row, to one: Wanda's choice, which compares weights of one output only.

    The first rows lose one more than the others, as many of them as it takes for the whole matrix to lose `fraction` of its weights, to the
    nearest whole number.

    Args:
        scores: [out, in].
        fraction: to leave out, in [0, 1).
        before: the mask so far, made by this function.
    """
    rows, columns = scores.shape
    total = rows * columns - _num_kept(rows * columns, fraction)
    # The first rows lose the one more, always in this order, so that a larger total takes no fewer from any row.
    out = total // rows + (torch.arange(rows, device=scores.device) < total % rows).long()
    order = _ranked(scores, before).sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(columns, device=scores.device).expand(rows, columns)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, places < columns - out[:, None])


def keep_globally(scores: Mapping[str, Tensor], fraction: float, before: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Leaves out the weights that score least over several matrices together, to the nearest whole number.

    The best weight of each matrix stays, whatever the others score: a matrix of zeros would cut the model in two.

    Args:
        scores: by name, any shapes.
        fraction: to leave out of all together, in [0, 1).
        before: the masks so far, by name.
    """
    ranked = {name: _ranked(values, before[name] if before else None).flatten() for name, values in scores.items()}
    for values in ranked.values():
        values[values.argmax()] = torch.inf
    joined = torch.cat(list(ranked.values()))
    kept = _largest(joined, max(len(ranked), _num_kept(len(joined), fraction)))
    parts = torch.split(kept, [len(values) for values in ranked.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(ranked, parts, strict=True)}


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Keeps the n weights that score most of every m that stand side by side in a row (2:4, 4:8).

    Args:
        scores: [out, in]; m divides `in`.
        n: to keep.
        m: of so many.
    """
    assert 1 <= n < m, (n, m)
    assert scores.shape[1] % m == 0, (m, scores.shape)
    groups = scores.reshape(-1, m)
    best = groups.sort(dim=1, descending=True, stable=True).indices[:, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True).view(scores.shape)


def _num_kept(total: int, fraction: float) -> int:
    assert 0.0 <= fraction < 1.0, fraction
    return max(1, total - round(fraction * total))


def _ranked(scores: Tensor, before: Tensor | None) -> Tensor:
    """Scores of 0 and above as they are, and below them those that are out."""
    assert not (scores < 0).any(), "scores are not negative"
    return scores.clone() if before is None else scores.masked_fill(~before, -1.0)


def _largest(values: Tensor, count: int) -> Tensor:
    """[n] bool: the `count` largest, of equal ones the first."""
    threshold = values.kthvalue(len(values) - count + 1).values
    above = values > threshold
    level = values == threshold
    return above | (level & (level.cumsum(0) <= count - above.sum()))
