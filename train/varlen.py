"""Attention of a student over sequences joined in one row: each token sees its own sequence up to itself, and no padding is computed.

Registered with transformers under `NAME`; inside `attending` a model runs through it, on input ids [1, T] with position ids that begin
anew with each sequence. On a GPU, in bf16 or fp16, this is torch's own flash attention for sequences of various lengths; elsewhere the
sequences are laid side by side for torch's attention alone, and joined again after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

NAME = "stepdown_varlen"
_OLDEST_WITH_FLASH = 8
"""Compute capability of Ampere."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the sequences lie in the row of T tokens; passed to every attention layer as keyword arguments."""

    starts: Tensor
    """[n + 1] int32."""
    longest: int
    """At least the tokens of the longest sequence."""
    side_by_side: Tensor | None
    """[n, longest] int64: which token of the row stands where when the sequences lie side by side; past a sequence's end, its last."""
    joined: Tensor | None
    """[T] int64: where each token of the row stands in the flattened `side_by_side`."""

    @classmethod
    def of(cls, starts: Tensor, longest: int, position_ids: Tensor, *, flash: bool) -> Layout:
        """The layout of sequences.

        Args:
            starts: [n + 1] int32.
            longest: tokens of the longest sequence.
            position_ids: [1, T] int64.
            flash: torch's flash attention does the work, which needs no indices.
        """
        if flash:
            # A few lengths only: each new one is a new graph of a compiled layer.
            return cls(starts, -(-longest // 128) * 128, None, None)
        firsts, lengths = starts[:-1].long(), starts.diff().long()
        columns = torch.arange(longest, device=starts.device)
        side_by_side = firsts[:, None] + torch.minimum(columns[None], lengths[:, None] - 1)
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=starts.device), lengths, output_size=position_ids.shape[1])
        return cls(starts, longest, side_by_side, rows * longest + position_ids[0])

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of a model's forward."""
        return {
            "varlen_starts": self.starts,
            "varlen_longest": self.longest,
            "varlen_side_by_side": self.side_by_side,
            "varlen_joined": self.joined,
        }


class UnsupportedAttention(Exception):
    """A layer asks for something that this attention does not do."""


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's flash attention takes tensors of this type there."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device)[0] >= _OLDEST_WITH_FLASH and torch.version.hip is None


@contextlib.contextmanager
def attending(model: Any) -> Iterator[None]:
    """Forwards of `model` inside go through this attention; they must be given a layout's arguments."""
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    varlen_starts: Tensor | None = None,
    varlen_longest: int = 0,
    varlen_side_by_side: Tensor | None = None,
    varlen_joined: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function that transformers' attention layers call.

    Args:
        module: the layer.
        query: [1, Hq, T, D].
        key: [1, H, T, D]; Hq is a multiple of H.
        value: [1, H, T, D].
        attention_mask: None; what a token sees follows from the layout.
        scaling: of the scores; D ** -0.5 where None.
        dropout: of the attention's probabilities.
        varlen_starts: see `Layout`, as for the other keys of this name.
        varlen_longest: see there.
        varlen_side_by_side: see there.
        varlen_joined: see there.
        options: what else a layer asks for; only what changes nothing is accepted.

    Returns:
        ([1, T, Hq, D], None).

    Raises:
        UnsupportedAttention: for a window, a soft cap, sinks, an attention that is not causal, or a model that hands no layout on.
    """
    if varlen_starts is None:
        raise UnsupportedAttention("the model does not hand keyword arguments on to its attention")
    refuse(module, key, value, options, varlen_longest)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, heads, D]
    if varlen_side_by_side is None or varlen_joined is None:
        found = torch.ops.aten._flash_attention_forward(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            varlen_starts,
            varlen_starts,
            varlen_longest,
            varlen_longest,
            dropout,
            True,
            False,
            scale=scaling,
        )[0]
        return found[None], None
    return _plain(q, k, v, varlen_side_by_side, varlen_joined, dropout, scaling)[None], None


def _plain(q: Tensor, k: Tensor, v: Tensor, side_by_side: Tensor, joined: Tensor, dropout: float, scale: float | None) -> Tensor:
    """[T, Hq, D]: past a sequence's end stand copies of its last token, which come after all that any other token sees."""
    q, k, v = (t[side_by_side].transpose(1, 2) for t in (q, k, v))  # [n, heads, longest, D]
    found = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return found.transpose(1, 2).flatten(0, 1)[joined]


def refuse(module: nn.Module, key: Tensor, value: Tensor, options: dict[str, Any], longest: int) -> None:
    """Refuses a layer whose tokens do not each see all of their sequence up to themselves, or that changes scores in another way.

    Args:
        module: the layer.
        key: of any shape.
        value: of the same shape.
        options: what the layer asks for by keyword.
        longest: tokens that one may have to see.

    Raises:
        UnsupportedAttention: for a window, a soft cap, sinks, or an attention that is not causal.
    """
    window = options.get("sliding_window")
    if window is not None and window < longest:
        raise UnsupportedAttention(f"a layer sees a window of {window} tokens only")
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise UnsupportedAttention(f"a layer asks for {name}")
    if not getattr(module, "is_causal", True) or key.shape != value.shape:
        raise UnsupportedAttention("a layer's attention is not causal, or its keys and values differ in width")


AttentionInterface.register(NAME, attend)
