"""The memory of a teacher that writes and scores, by process. Arithmetic only: imports no torch.

Sources: train/teacher/slots.py and decode.py (the decoding loop), train/teacher/score.py, train/engine.py (how it lies on the devices).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from launch.architecture import Architecture
from launch.memory import WORKSPACE_BYTES, Memory, fullest

Precision = Literal["fp32", "bf16", "fp16", "int8", "int4"]
_BITS: dict[Precision, int] = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4}

MOST_SLOTS = 256
"""Requests that the decoding loop takes at once where `teacher.batch_size` is auto (`train.teacher.decode`)."""
FEWEST_SLOTS = 32
"""Below this many a step reads little else than the weights (`train.teacher.slots`): a layout with room for fewer is passed over."""
_ROUND = 64
"""Capacities of a slot are multiples of this."""
_PREFILL_TOKENS = 16_384
SCORED_TOKENS = 8192
_HEAD_BYTES = 2**30
_SLICE = 2**25
"""All of `train.teacher`: tokens of prompts, and of sequences to score, in one forward; the most that logits take; numbers in fp32."""
_WORKSPACES = 3
"""Streams that multiply matrices: plain passes, the recording of a step, and its replay (as measured: 100.7 MB); counted on CPUs, too."""
_SLICES = 2
"""Slices in fp32 beside each other while logits become soft labels."""
_FREE_SHARE = 0.85
_KEPT_FREE = 4 * 2**30
"""Of free memory the cache may take a share, but leaves so much to scoring (`train.teacher.decode`)."""


def weight_bytes(num_parameters: int, precision: Precision) -> int:
    """Bytes of the weights alone: 2 GB a billion parameters in 16 bits. Scales and zero points of int8 and int4 are not counted."""
    return (num_parameters * _BITS[precision] + 7) // 8


def activation_bytes(precision: Precision) -> int:
    """Of a number that is computed with: weights of few bits are multiplied in 16."""
    return max(2, _BITS[precision] // 8)


@dataclass(frozen=True, slots=True)
class Inference:
    """How a teacher lies on the devices, and what it is given."""

    sharding: Literal["replica", "tensor", "zero3"] = "replica"
    degree: int = 1
    """Processes that hold one copy between them: of a tensor group, or all under ZeRO-3."""
    precision: Precision = "bf16"
    prompt: int = 2048
    """Tokens of a prompt."""
    new: int = 128
    """Tokens written after it."""
    slots: int = FEWEST_SLOTS
    """Requests at once."""
    scored: int = SCORED_TOKENS
    """Tokens of one forward that scores; 0 where nothing is."""
    rows: int = SCORED_TOKENS
    """Of these, tokens that get a soft label."""


def slot_capacity(prompt: int, new: int) -> int:
    """Tokens that a slot has room for."""
    return -(-(prompt + new) // _ROUND) * _ROUND


def cache_token_bytes(model: Architecture, how: Inference) -> int:
    """Keys and values of one token in all layers, on one process."""
    parts = how.degree if how.sharding == "tensor" else 1
    return 2 * model.layers * -(-model.key_value_heads // parts) * model.head_width * activation_bytes(how.precision)


def teacher_weights(model: Architecture, how: Inference) -> int:
    """On one process: AutoTP leaves the embedding whole, and splits the head, of which a tied one becomes a copy; ZeRO-3 shares all out."""
    if how.sharding == "tensor":
        return weight_bytes(model.embedding + -(-(model.embedding + model.body) // how.degree), how.precision)
    return weight_bytes(-(-model.parameters // how.degree) if how.sharding == "zero3" else model.parameters, how.precision)


def decoding_memory(model: Architecture, how: Inference) -> Memory:
    """The fullest moment of writing: a forward over prompts, beside a cache for all slots."""
    capacity = slot_capacity(how.prompt, how.new)
    weights = _held(model, how)
    cache = Memory(cache=how.slots * capacity * cache_token_bytes(model, how))
    tokens = max(how.prompt, min(_PREFILL_TOKENS, how.slots * how.prompt))
    logits = 2 * activation_bytes(how.precision) * how.slots * model.vocabulary
    return weights + cache + Memory(activations=_layer(model, how, tokens), head=logits)


def scoring_memory(model: Architecture, how: Inference) -> Memory:
    """The fullest moment of scoring: a layer over all tokens of a forward, or the logits of those that get soft labels."""
    size = activation_bytes(how.precision)
    rows = min(how.rows, how.scored, max(1, _HEAD_BYTES // (size * model.vocabulary)))
    logits = Memory(head=size * rows * model.vocabulary + 4 * _SLICES * _SLICE, activations=2 * size * model.width * how.scored)
    layer = Memory(activations=_layer(model, how, how.scored))
    return _lasting(model, how) + fullest([_gathered(model, how, 2 * model.layer) + layer, _gathered(model, how, model.embedding) + logits])


def _lasting(model: Architecture, how: Inference) -> Memory:
    return Memory(weights=teacher_weights(model, how), buffers=_WORKSPACES * WORKSPACE_BYTES)


def _gathered(model: Architecture, how: Inference, parameters: int) -> Memory:
    """What ZeRO-3 holds whole of so many parameters at once: of a layer, and the next one while it runs, or of the head."""
    return Memory(buffers=weight_bytes(min(model.parameters, parameters), how.precision) if how.sharding == "zero3" else 0)


def _held(model: Architecture, how: Inference) -> Memory:
    """While it writes, where the next layer may be the head."""
    return _lasting(model, how) + _gathered(model, how, 2 * max(model.layer, model.embedding))


def _layer(model: Architecture, how: Inference, tokens: int) -> int:
    """What a layer needs while it runs without a gradient: the residual stream, its norm, and the inside of the feed-forward layer."""
    inner = (3 if model.gated else 2) * model.experts_a_token * model.neurons
    parts = how.degree if how.sharding == "tensor" else 1
    return activation_bytes(how.precision) * tokens * (3 * model.width + -(-inner // parts))


def most_slots(model: Architecture, how: Inference, usable: int) -> int:
    """Requests that find room at once, at most `MOST_SLOTS`; 0 where not one does beside what else is needed.

    Args:
        model: the teacher.
        how: whose slots do not count.
        usable: bytes of a GPU.
    """
    if teacher_memory(model, with_slots(how, 1)).total > usable:
        return 0
    free = usable - _held(model, how).total
    # Plain `generate`, as under ZeRO-3, copies its cache when that grows.
    looped = how.sharding != "zero3" and model.family == "decoder_only"
    room = min(int(free * _FREE_SHARE), max(free - _KEPT_FREE, free // 2)) if looped else free // 2
    each = slot_capacity(how.prompt, how.new) * cache_token_bytes(model, how)
    full = teacher_memory(model, with_slots(how, MOST_SLOTS))
    return max(1, min(MOST_SLOTS, room // each, (usable - full.total + full.cache) // each))


def teacher_memory(model: Architecture, how: Inference) -> Memory:
    """Writing and scoring follow each other in one process: the larger of both; the cache stays while it scores."""
    writing = decoding_memory(model, how)
    if not how.scored:
        return writing
    return fullest([writing, scoring_memory(model, how) + Memory(cache=writing.cache)])


def with_slots(how: Inference, slots: int) -> Inference:
    """The same with another number of requests at once."""
    return replace(how, slots=slots)
