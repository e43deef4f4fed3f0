"""What is stored of a next-token distribution: its largest probabilities, or tokens drawn from it; and the target's log-probability.

All take logits [n, V] in fp32 of as few rows as the caller holds at once: each makes one or two more tensors of that size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.teacher.draws import uniform

MAX_BLOCK = 64
"""Tokens whose maximum stands for all of them in the first stage of `largest`."""
SUM_BLOCK = 64
"""Tokens that `draw` adds up in its first stage; near sqrt(V / draws), where its two stages cost the same."""


def target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Natural log-probability of one token at each position [n], at temperature 1.

    Args:
        logits: [n, V] fp32.
        targets: [n] int64.
    """
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=-1)


def top_log_probs(logits: Tensor, targets: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k most probable tokens of each position at temperature 1.

    Args:
        logits: [n, V] fp32.
        targets: [n] int64, the tokens that stand there.
        k: at most V.

    Returns:
        (ids [n, k] int32, natural log-probabilities [n, k], the target's log-probability [n]).
    """
    total = logits.logsumexp(dim=-1)
    values, ids = largest(logits, k)
    return ids.int(), values - total[:, None], logits.gather(1, targets[:, None])[:, 0] - total


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row [n, V], descending, and where they are: `torch.topk`, exact, in one pass over the row.

    None of the k largest lies outside the k blocks with the largest maxima, so the search goes on among those blocks only: torch's own
    radix selection reads a row of 128,000 several times.
    """
    whole = values.shape[1] // MAX_BLOCK * MAX_BLOCK
    if whole // MAX_BLOCK <= k:
        found = values.topk(k)
        return found.values, found.indices
    maxima = values[:, :whole].view(len(values), whole // MAX_BLOCK, MAX_BLOCK).amax(dim=-1)
    blocks = maxima.topk(k, sorted=False).indices
    ids = (blocks[:, :, None] * MAX_BLOCK + torch.arange(MAX_BLOCK, device=values.device)).flatten(1)
    tail = torch.arange(whole, values.shape[1], device=values.device)
    ids = torch.cat([ids, tail.expand(len(values), -1)], dim=1)
    best, at = values.gather(1, ids).topk(k)
    return best, ids.gather(1, at)


def draw(logits: Tensor, keys: Tensor, positions: Tensor, draws: int, temperature: float) -> Tensor:
    """Token ids [n, draws] drawn with replacement from softmax(logits / temperature), by inverting its cumulated distribution.

    A cumulated sum over 128,000 fp32 numbers would be off by 1e-5, more than most tokens weigh. Here blocks of tokens are summed first,
    then the block of each draw is searched; both sums are cumulated in fp64.

    Args:
        logits: [n, V] fp32.
        keys: [n] int64, of the records (`draws.record_key`).
        positions: [n] int64, which token of its record a row is.
        draws: tokens drawn at each position.
        temperature: of the distribution drawn from.
    """
    weights = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature).exp_()
    if short := -logits.shape[1] % SUM_BLOCK:
        weights = nn.functional.pad(weights, (0, short))
    blocks = weights.view(len(weights), weights.shape[1] // SUM_BLOCK, SUM_BLOCK)
    masses = blocks.sum(dim=-1, dtype=torch.float64)
    ends = masses.cumsum(dim=-1)
    numbers = uniform(keys[:, None], positions[:, None], torch.arange(draws, device=logits.device)).double() * ends[:, -1:]
    chosen = torch.searchsorted(ends, numbers, right=True).clamp_(max=ends.shape[1] - 1)
    inside = blocks[torch.arange(len(logits), device=logits.device)[:, None], chosen].double().cumsum(dim=-1)
    rest = numbers - (ends.gather(1, chosen) - masses.gather(1, chosen))
    # Rounding must not push a draw onto a token that weighs nothing, before the block's first or after its last.
    rest = torch.minimum(rest.clamp_(min=0.0), inside[..., -1] * (1 - 1e-15))
    within = torch.searchsorted(inside, rest[..., None], right=True)[..., 0]
    return (chosen * SUM_BLOCK + within).int()
