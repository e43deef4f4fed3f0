"""How long a teacher writes and a student trains, and how much the records take. Arithmetic only: imports no torch.

Upper bounds in tokens: every prompt, answer and target is as long as the configuration lets it be.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.architecture import Architecture
from launch.inference_memory import Inference, cache_token_bytes
from launch.plan import TeacherPlan
from launch.training_memory import Step

MFU = 0.31
"""Share of a GPU's peak that training reaches (1.24B weights, H100; tests/bench/README.md, Training)."""
COMPILED_MFU = 0.43
"""The same with compiled layers."""
DECODING_SHARE = {"replica": 0.65, "tensor": 0.45}
"""Of the memory's bandwidth that a decoding step reaches (8B weights, H200: 4.03 of 5.84 ms, 2.10 of 4.76; tests/bench/README.md)."""
PREFILL_MFU = 0.5
"""Of the peak that a forward over prompts, or one that scores, reaches (8B weights, H200)."""
TOP_K_BYTES = 85.8 / 32
"""On disk, for each of the k ids of a token (train/teacher/README.md, Soft labels)."""
SAMPLED_BYTES = 22.7 / 50
"""Likewise for each draw."""
TEXT_BYTES = 4.0
"""A token's text in a record, uncompressed."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What a GPU does in a second."""

    flops: float
    bandwidth: float
    """Bytes between the GPU and its memory."""


def training_hours(model: Architecture, step: Step, tokens: int, gpus: int, speed: Speed) -> float:
    """Of one pass over so many tokens, times six operations for each weight that a token meets; four where it is frozen.

    Args:
        model: the student.
        step: how it is trained; its targets' share of its tokens meets the head.
        tokens: in all.
        gpus: that share the work.
        speed: of one.
    """
    head = model.embedding * step.targets / step.tokens
    operations = (6 if step.adapters is None else 4) * (model.active - model.embeddings + head)
    again = 4 / 3 if step.checkpointing else 1.0  # a forward more to two operations of three
    return tokens * operations * again / (gpus * speed.flops * (COMPILED_MFU if step.compiled else MFU)) / 3600


def writing_hours(model: Architecture, plan: TeacherPlan, how: Inference, answers: int, speed: Speed) -> float | None:
    """Of so many answers: prompts by arithmetic, new tokens by the weights and the cache that each step reads.

    Returns:
        Hours; None under ZeRO-3, where the links between the GPUs decide.
    """
    share = DECODING_SHARE.get(plan.sharding)
    if share is None or not plan.slots:
        return None
    read = plan.weight_bytes_per_gpu + plan.slots * (how.prompt + how.new / 2) * cache_token_bytes(model, how)
    steps = answers / plan.slots * how.new / plan.replicas
    prompts = (
        answers * how.prompt * 2 * (model.active - model.embeddings) / (plan.replicas * plan.tensor_degree * speed.flops * PREFILL_MFU)
    )
    return (steps * read / (speed.bandwidth * share) + prompts) / 3600


def record_bytes(rows: int, tokens: int, scored: int, a_scored_token: float) -> int:
    """Records on disk: their texts, and what is stored for each scored token."""
    return int(rows * (tokens * TEXT_BYTES + scored * a_scored_token))
