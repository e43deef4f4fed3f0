"""Random numbers that depend on a record's key alone: not on the batch, the process or what was drawn before.

A counter-based generator: every number is a hash of the words that name it. So a killed teacher that starts again, on any number of
processes, draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = 23
"""Of a uniform number: with half a step added, its largest value is still below 1 in fp32."""


def record_key(seed: int, *words: str | int) -> int:
    """The key of a record's draws: 64 bits, signed, of the run's seed and what names the record (id, purpose, sample)."""
    digest = hashlib.sha256("\x1f".join(map(str, (seed, *words))).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def uniform(keys: Tensor, *counters: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), fp32, on the keys' device; the same on every device.

    Args:
        keys: int64, any shape.
        counters: int64, broadcast with the keys: which number of the key.

    Source:
        splitmix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195) over each word in turn.
    """
    state = _mix(keys)
    for counter in counters:
        state = _mix(state ^ (counter * _signed(_GOLDEN)))
    return ((_shift(state, 64 - _BITS)).to(torch.float32) + 0.5) * 2.0**-_BITS


def gumbel(keys: Tensor, steps: Tensor, vocabulary: int) -> Tensor:
    """Gumbel noise [B, V] in fp32: argmax(logits + noise) is a draw from softmax(logits).

    Args:
        keys: [B] int64, of the records.
        steps: [B] int64, which token of the record is drawn.
        vocabulary: V.

    Source:
        Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030.
    """
    tokens = torch.arange(vocabulary, device=keys.device)
    return -(-uniform(keys[:, None], steps[:, None], tokens).log()).log()


def draw_keys(keys: Sequence[int], device: torch.device | str) -> Tensor:
    """Keys as an int64 tensor."""
    return torch.tensor(list(keys), dtype=torch.int64, device=device)


def _mix(word: Tensor) -> Tensor:
    word = word + _signed(_GOLDEN)
    word = (word ^ _shift(word, 30)) * _signed(_FIRST)
    word = (word ^ _shift(word, 27)) * _signed(_SECOND)
    return word ^ _shift(word, 31)


def _shift(word: Tensor, bits: int) -> Tensor:
    # int64 shifts keep the sign; a logical shift does not.
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
