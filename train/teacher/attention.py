"""Attention over sequences joined in one row: no padding, grouped heads read once, a prefix that all share kept once.

Registered with transformers under `NAME`; a model runs through it inside `attending`, where every forward takes input ids [1, N] - the
tokens of several sequences, one after another - and its own position ids. Keys and values live in a `KeyValueCache` of this module and
not in one of transformers. What a token may see: the shared prefix (where its sequence has it), the tokens of its sequence that are in
the cache, and its own sequence in the row up to itself.

On a GPU the work is done by the Triton kernels of `kernels.py`, elsewhere by a plain form in torch, which is also their oracle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from train.varlen import refuse

NAME = "stepdown_joined"


@dataclass(slots=True)
class Layer:
    """Keys and values of one layer; H counts key-value heads, of this process's share under tensor parallelism."""

    keys: Tensor
    """[slots, H, capacity, D]."""
    values: Tensor
    prefix_keys: Tensor
    """[H, P, D]."""
    prefix_values: Tensor


@dataclass(slots=True)
class KeyValueCache:
    """Room for `slots` sequences of `capacity` tokens each, after a prefix of `prefix` tokens that is kept once.

    A layer's tensors are made when its attention runs first, as only then its heads are known.
    """

    slots: int
    capacity: int
    prefix: int = 0
    layers: dict[int, Layer] = field(default_factory=dict)

    def layer(self, number: int, key: Tensor) -> Layer:
        """The layer's tensors, like `key` [1, H, N, D] in heads, type and device."""
        if number not in self.layers:
            _, heads, _, width = key.shape
            own, shared = (self.slots, heads, self.capacity, width), (heads, self.prefix, width)
            self.layers[number] = Layer(key.new_zeros(own), key.new_zeros(own), key.new_zeros(shared), key.new_zeros(shared))
        return self.layers[number]

    @property
    def bytes_per_token(self) -> int:
        """Of one token of one sequence in all layers that have run."""
        return sum(2 * layer.keys[0, :, 0].numel() * layer.keys.element_size() for layer in self.layers.values())


@dataclass(frozen=True, slots=True)
class Joined:
    """n sequences joined in a row of N tokens."""

    starts: Tensor
    """[n + 1] int32: where each begins; the last is N."""
    longest: int
    """Tokens of the longest."""
    slots: Tensor
    """[n] int32: the slot of the cache that each goes on from."""
    cached: Tensor
    """[n] int32: tokens of it in that slot already."""
    prefixed: Tensor
    """[n] int32: 1 where it begins with the shared prefix."""
    store: bool = True
    """Keep the row's keys and values: in the slots after the cached ones, or as the prefix (`as_prefix`)."""
    as_prefix: bool = False
    """The row is the shared prefix itself."""


@dataclass(frozen=True, slots=True)
class OneEach:
    """One new token for each of the first B slots."""

    lengths: Tensor
    """[B] int32: tokens in each slot; the new one is stored after them."""
    prefixed: Tensor
    """[B] int32."""


@dataclass(slots=True)
class _Active:
    cache: KeyValueCache
    batch: Joined | OneEach


_active: _Active | None = None


@contextlib.contextmanager
def attending(model: Any, cache: KeyValueCache, batch: Joined | OneEach) -> Iterator[None]:
    """Forwards of `model` inside go through this attention, over `cache`, for `batch`."""
    global _active
    before, outer = model.config._attn_implementation, _active
    model.config._attn_implementation, _active = NAME, _Active(cache, batch)
    try:
        yield
    finally:
        model.config._attn_implementation, _active = before, outer


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function that transformers' attention layers call.

    Args:
        module: the layer; tells its number.
        query: [1, Hq, N, D].
        key: [1, H, N, D]; Hq is a multiple of H.
        value: [1, H, N, D].
        attention_mask: None; what a token sees follows from the batch.
        scaling: of the scores; D ** -0.5 where None.
        options: what else a layer asks for; only what changes nothing is accepted.

    Returns:
        ([1, N, Hq, D], None).

    Raises:
        UnsupportedAttention: for a window, a soft cap, sinks, or an attention that is not causal.
    """
    assert _active is not None, "attention outside of attending()"
    refuse(module, key, value, options, _sees(_active))
    layer = _active.cache.layer(int(module.layer_idx), key)  # type: ignore[arg-type]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [N, heads, D]
    batch = _active.batch
    output = _one_each(q, k, v, layer, batch, scale) if isinstance(batch, OneEach) else _joined(q, k, v, layer, batch, scale)
    return output[None], None


def _sees(active: _Active) -> int:
    longest = active.batch.longest if isinstance(active.batch, Joined) else 1
    return active.cache.prefix + max(active.cache.capacity, longest)


def _one_each(query: Tensor, key: Tensor, value: Tensor, layer: Layer, batch: OneEach, scale: float) -> Tensor:
    if query.is_cuda:
        from train.teacher import kernels

        return kernels.one_each(query, key, value, layer, batch, scale)
    num = len(batch.lengths)
    starts = torch.arange(num + 1, dtype=torch.int32)
    return _joined(query, key, value, layer, Joined(starts, 1, starts[:num], batch.lengths, batch.prefixed), scale)


def _joined(query: Tensor, key: Tensor, value: Tensor, layer: Layer, batch: Joined, scale: float) -> Tensor:
    if batch.as_prefix and batch.store:
        layer.prefix_keys.copy_(key.transpose(0, 1))
        layer.prefix_values.copy_(value.transpose(0, 1))
    if query.is_cuda:
        from train.teacher import kernels

        return kernels.joined(query, key, value, layer, batch, scale)
    output = torch.empty_like(query)
    bounds = batch.starts.tolist()
    for n, (slot, cached, prefixed) in enumerate(zip(batch.slots.tolist(), batch.cached.tolist(), batch.prefixed.tolist(), strict=True)):
        span = slice(bounds[n], bounds[n + 1])
        seen = _seen(key[span], value[span], layer, slot, cached, bool(prefixed))
        output[span] = _plain(query[span], *seen, scale)
        if batch.store and not batch.as_prefix:
            end = cached + span.stop - span.start
            layer.keys[slot, :, cached:end] = key[span].transpose(0, 1)
            layer.values[slot, :, cached:end] = value[span].transpose(0, 1)
    return output


def _seen(key: Tensor, value: Tensor, layer: Layer, slot: int, cached: int, prefixed: bool) -> tuple[Tensor, Tensor]:
    """All keys and values of one sequence [H, T, D]: prefix, cached, own."""
    parts = [(layer.prefix_keys, layer.prefix_values)] if prefixed else []
    parts += [(layer.keys[slot, :, :cached], layer.values[slot, :, :cached]), (key.transpose(0, 1), value.transpose(0, 1))]
    return torch.cat([k for k, _ in parts], dim=1), torch.cat([v for _, v in parts], dim=1)


def _plain(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """[L, Hq, D] from one sequence's queries [L, Hq, D] over keys and values [H, T, D], of which the last L are the queries' own."""
    length, total = query.shape[0], keys.shape[1]
    mask = torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)
    found = nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, scale=scale, enable_gqa=True
    )
    return found[0].transpose(0, 1)


AttentionInterface.register(NAME, attend)
