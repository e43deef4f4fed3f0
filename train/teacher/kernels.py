# fmt: off
"""Triton kernels of `attention.py`: attention of joined sequences, and of one new token for each sequence.

Both read a key-value head once for all query heads of its group that a program holds, keep sums in fp32, and run on any GPU that Triton
serves (written for Ampere and Hopper; no instruction of one chip). Softmax by the running maximum (Milakov and Gimelshein 2018, arXiv
1805.02867); a shared prefix is read by blocks of all queries and folded in (Juravsky et al. 2024, Hydragen, arXiv 2402.05099).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from train.teacher.attention import Joined, Layer, OneEach

_LOG2E = 1.4426950408889634
_SPLIT = 256
"""Keys of the shared prefix that one program of a decoding step reads."""


@triton.jit
def _visit(sums, top, total, query, limits, keys, values, key_stride, value_stride, first, last, scale,
           WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Takes keys [first, last) into a running softmax in base 2; a row sees key n where n < its limit."""
    at = tl.arange(0, BLOCK)
    along = tl.arange(0, TILE)
    inside = along < WIDTH
    for start in range(first, last, BLOCK):
        n = start + at
        there = n < last
        far = n.to(tl.int64)
        key = tl.load(keys + far[None, :] * key_stride + along[:, None], mask=there[None, :] & inside[:, None], other=0.0)
        scores = tl.dot(query, key, input_precision="ieee") * scale
        scores = tl.where(there[None, :] & (n[None, :] < limits[:, None]), scores, float("-inf"))
        newer = tl.maximum(top, tl.max(scores, 1))
        anchor = tl.where(newer == float("-inf"), 0.0, newer)  # a row that has seen nothing yet
        shares = tl.exp2(scores - anchor[:, None])
        shrink = tl.exp2(top - anchor)
        value = tl.load(values + far[:, None] * value_stride + along[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        sums = sums * shrink[:, None] + tl.dot(shares.to(value.dtype), value, input_precision="ieee")
        total = total * shrink + tl.sum(shares, 1)
        top = newer
    return sums, top, total


@triton.jit
def _joined_kernel(out, query, key, value, keys, values, prefix_keys, prefix_values, starts, slots, cached, prefixed,
                   query_stride, query_head, key_stride, key_head, value_stride, value_head, slot_stride, head_stride, prefix_head,
                   prefix, scale, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """One program: ROWS queries of one sequence, for one query head. Own keys come from the row, earlier ones from slot and prefix."""
    sequence, head = tl.program_id(2), tl.program_id(1)
    begin = tl.load(starts + sequence)
    length = tl.load(starts + sequence + 1) - begin
    first = tl.program_id(0) * ROWS
    if first >= length:
        return
    kv = head // GROUP
    row = first + tl.arange(0, ROWS)
    along = tl.arange(0, TILE)
    inside = (row < length)[:, None] & (along < WIDTH)[None, :]
    place = (begin + row).to(tl.int64)
    q = tl.load(query + place[:, None] * query_stride + head * query_head + along[None, :], mask=inside, other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, TILE], tl.float32)
    all_keys = tl.full([ROWS], 2147483647, tl.int32)
    shared = prefix * tl.load(prefixed + sequence)
    sums, top, total = _visit(sums, top, total, q, all_keys, prefix_keys + kv * prefix_head, prefix_values + kv * prefix_head,
                              WIDTH, WIDTH, 0, shared, scale, WIDTH, BLOCK, TILE)
    base = tl.load(slots + sequence).to(tl.int64) * slot_stride + kv * head_stride
    sums, top, total = _visit(sums, top, total, q, all_keys, keys + base, values + base,
                              WIDTH, WIDTH, 0, tl.load(cached + sequence), scale, WIDTH, BLOCK, TILE)
    own = begin.to(tl.int64)
    sums, top, total = _visit(sums, top, total, q, row + 1, key + own * key_stride + kv * key_head,
                              value + own * value_stride + kv * value_head, key_stride, value_stride, 0,
                              tl.minimum(length, first + ROWS), scale, WIDTH, BLOCK, TILE)
    target = out + (place * tl.num_programs(1) + head)[:, None] * WIDTH + along[None, :]
    tl.store(target, (sums / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _prefix_kernel(sums_out, tops_out, totals_out, query, prefix_keys, prefix_values, query_stride, query_head, prefix_head,
                   num, prefix, scale, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
                   BLOCK: tl.constexpr, TILE: tl.constexpr):
    """One program: ROWS of all slots' queries of one key-value head, over one part of the shared prefix."""
    kv, part = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot, head = row // GROUP, kv * GROUP + row % GROUP
    along = tl.arange(0, TILE)
    there = slot < num
    inside = there[:, None] & (along < WIDTH)[None, :]
    q = tl.load(query + slot.to(tl.int64)[:, None] * query_stride + head[:, None] * query_head + along[None, :], mask=inside, other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, TILE], tl.float32)
    all_keys = tl.full([ROWS], 2147483647, tl.int32)
    sums, top, total = _visit(sums, top, total, q, all_keys, prefix_keys + kv * prefix_head, prefix_values + kv * prefix_head,
                              WIDTH, WIDTH, part * SPLIT, tl.minimum(prefix, (part + 1) * SPLIT), scale, WIDTH, BLOCK, TILE)
    heads = tl.num_programs(1) * GROUP
    place = (part * num + slot) * heads + head
    tl.store(sums_out + place.to(tl.int64)[:, None] * TILE + along[None, :], sums, mask=there[:, None])
    tl.store(tops_out + place, top, mask=there)
    tl.store(totals_out + place, total, mask=there)


@triton.jit
def _one_each_kernel(out, query, key, value, keys, values, sums_in, tops_in, totals_in, lengths, prefixed,
                     query_stride, query_head, key_stride, key_head, value_stride, value_head, slot_stride, head_stride, num, parts, scale,
                     GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """One program: one slot and one key-value head, all its query heads. Stores the new key and value, folds in the prefix's parts."""
    slot, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.arange(0, ROWS)
    along = tl.arange(0, TILE)
    wide = along < WIDTH
    inside = (row < GROUP)[:, None] & wide[None, :]
    head = kv * GROUP + row
    q = tl.load(query + slot * query_stride + head[:, None] * query_head + along[None, :], mask=inside, other=0.0)
    new_key = tl.load(key + slot * key_stride + kv * key_head + along, mask=wide, other=0.0)
    new_value = tl.load(value + slot * value_stride + kv * value_head + along, mask=wide, other=0.0)
    length = tl.load(lengths + slot)
    base = slot * slot_stride + kv * head_stride
    tl.store(keys + base + length.to(tl.int64) * WIDTH + along, new_key, mask=wide)
    tl.store(values + base + length.to(tl.int64) * WIDTH + along, new_value, mask=wide)
    top = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
    total = tl.full([ROWS], 1.0, tl.float32)
    sums = tl.zeros([ROWS, TILE], tl.float32) + new_value.to(tl.float32)[None, :]
    heads = tl.num_programs(1) * GROUP
    for part in range(parts * tl.load(prefixed + slot)):
        place = (part * num + slot) * heads + head
        other = tl.load(tops_in + place, mask=row < GROUP, other=0.0)
        newer = tl.maximum(top, other)
        shrink, grow = tl.exp2(top - newer), tl.exp2(other - newer)
        shared = tl.load(sums_in + place[:, None] * TILE + along[None, :], mask=inside, other=0.0)
        sums = sums * shrink[:, None] + shared * grow[:, None]
        total = total * shrink + tl.load(totals_in + place, mask=row < GROUP, other=0.0) * grow
        top = newer
    all_keys = tl.full([ROWS], 2147483647, tl.int32)
    sums, top, total = _visit(sums, top, total, q, all_keys, keys + base, values + base, WIDTH, WIDTH, 0, length, scale,
                              WIDTH, BLOCK, TILE)
    target = out + (slot * heads + head)[:, None] * WIDTH + along[None, :]
    tl.store(target, (sums / total[:, None]).to(out.dtype.element_ty), mask=inside)


def joined(query: Tensor, key: Tensor, value: Tensor, layer: Layer, batch: Joined, scale: float) -> Tensor:
    """`attention._joined` on a GPU: query [N, Hq, D], key and value [N, H, D] -> [N, Hq, D]; keeps keys and values where asked to."""
    query, key, value = (dense(t) for t in (query, key, value))
    num, heads, width = query.shape
    kv_heads = key.shape[1]
    out = torch.empty(num, heads, width, dtype=query.dtype, device=query.device)
    if batch.store and not batch.as_prefix:
        _store(key, value, layer, batch)
    wide = query.element_size() > 2
    rows = 32 if wide else 128 if batch.longest > 64 else 64
    grid = (triton.cdiv(batch.longest, rows), heads, len(batch.slots))
    _joined_kernel[grid](
        out, query, key, value, layer.keys, layer.values, layer.prefix_keys, layer.prefix_values,
        batch.starts, batch.slots, batch.cached, batch.prefixed,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        layer.keys.stride(0), layer.keys.stride(1), layer.prefix_keys.stride(0), layer.prefix_keys.shape[1],
        scale * _LOG2E, GROUP=heads // kv_heads, WIDTH=width, ROWS=rows, BLOCK=32 if wide else 64, TILE=_tile(width),
        num_warps=8 if rows == 128 else 4, num_stages=2,
    )
    return out


def one_each(query: Tensor, key: Tensor, value: Tensor, layer: Layer, batch: OneEach, scale: float) -> Tensor:
    """`attention._one_each` on a GPU: query [B, Hq, D], key and value [B, H, D] -> [B, Hq, D]; stores the new keys and values."""
    query, key, value = (dense(t) for t in (query, key, value))
    num, heads, width = query.shape
    kv_heads, prefix = key.shape[1], layer.prefix_keys.shape[1]
    group, tile, parts = heads // kv_heads, _tile(width), triton.cdiv(prefix, _SPLIT)
    wide = query.element_size() > 2
    out = torch.empty(num, heads, width, dtype=query.dtype, device=query.device)
    sums, tops, totals = _room(query, max(parts, 1), num, heads, tile)
    shape: dict[str, Any] = {"GROUP": group, "WIDTH": width, "TILE": tile}
    if parts:
        rows = 32 if wide else 64
        _prefix_kernel[triton.cdiv(num * group, rows), kv_heads, parts](
            sums, tops, totals, query, layer.prefix_keys, layer.prefix_values, query.stride(0), query.stride(1),
            layer.prefix_keys.stride(0), num, prefix, scale * _LOG2E, ROWS=rows, SPLIT=_SPLIT, BLOCK=32 if wide else 64, **shape,
            num_warps=4, num_stages=2,
        )
    _one_each_kernel[num, kv_heads](
        out, query, key, value, layer.keys, layer.values, sums, tops, totals, batch.lengths, batch.prefixed,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        layer.keys.stride(0), layer.keys.stride(1), num, parts, scale * _LOG2E, ROWS=max(16, triton.next_power_of_2(group)),
        BLOCK=32, **shape, num_warps=1, num_stages=3,
    )
    return out


def _store(key: Tensor, value: Tensor, layer: Layer, batch: Joined) -> None:
    lengths = (batch.starts[1:] - batch.starts[:-1]).long()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=key.device), lengths, output_size=key.shape[0])
    place = torch.arange(key.shape[0], device=key.device) - batch.starts[sequence] + batch.cached[sequence]
    layer.keys[batch.slots[sequence].long(), :, place] = key
    layer.values[batch.slots[sequence].long(), :, place] = value


def _room(query: Tensor, parts: int, num: int, heads: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    made: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    return torch.empty(parts, num, heads, tile, **made), torch.empty(parts, num, heads, **made), torch.empty(parts, num, heads, **made)


def dense(tensor: Tensor) -> Tensor:
    """The tensor, with its last dimension side by side in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _tile(width: int) -> int:
    return max(16, int(triton.next_power_of_2(width)))
