"""What public estimators of memory say, as they count. Arithmetic only.

simple        the bytes of the weights, spread over GPUs of so many gigabytes (10^9)
accelerate    `accelerate estimate-memory` 1.15: weights and non-trained buffers; for training the largest of weights, gradients and what
              an optimizer's step needs, which are not added up; spread over GPUs of as many GiB as their name has gigabytes
deepspeed     `estimate_zero2_model_states_mem_needs` and the one of ZeRO-3, 0.19.8, without offload: weights, gradients and states of
              AdamW, nothing else; the same GiB

None counts activations, caches, contexts or what fragmentation loses: `launch.memory` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from launch.inference_memory import Precision, weight_bytes

Rule = Literal["simple", "accelerate", "deepspeed"]
RULES: tuple[Rule, ...] = get_args(Rule)
_GB, _GIB = 10**9, 2**30
_MOST_GPUS = 100_000


@dataclass(frozen=True, slots=True)
class Size:
    """A model as the estimators see it."""

    parameters: int
    largest_module: int
    """Parameters that one module holds by itself, not in its children; 0 where it is not known."""
    buffer_bytes: int
    """Of what is not trained, such as rotary frequencies."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One figure of a rule."""

    what: str
    total_bytes: int
    """On one GPU."""
    bytes_a_gpu: Callable[[int], float]
    """Of so many GPUs."""
    unit: int
    """Bytes of a GPU's gigabyte, as this rule takes it."""

    def fewest_gpus(self, gigabytes: float) -> int | None:
        """How many GPUs of so many gigabytes it takes; None where no number is enough."""
        capacity = gigabytes * self.unit
        if self.bytes_a_gpu(_MOST_GPUS) > capacity:
            return None
        low, high = 1, _MOST_GPUS
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.bytes_a_gpu(middle) <= capacity else (middle + 1, high)
        return low


def estimates(rule: Rule, size: Size) -> list[Estimate]:
    """All figures of a rule for a model."""
    return {"simple": _simple, "accelerate": _accelerate, "deepspeed": _deepspeed}[rule](size)


def _simple(size: Size) -> list[Estimate]:
    precisions: tuple[Precision, ...] = ("fp32", "bf16", "int8", "int4")
    return [_spread(f"inference, {name}", weight_bytes(size.parameters, name), _GB) for name in precisions]


def accelerate_training(total_bytes: int, *, mixed: bool) -> dict[str, int]:
    """What `estimate_training_usage` gives of a model's bytes in fp32; of these four the largest is taken.

    Source: accelerate/commands/estimate.py.
    """
    if mixed:
        return {"model": total_bytes, "gradients": total_bytes + total_bytes // 2, "optimizer": 2 * total_bytes, "step": 2 * total_bytes}
    return {"model": total_bytes, "gradients": total_bytes, "optimizer": 2 * total_bytes, "step": 4 * total_bytes}


def _accelerate(size: Size) -> list[Estimate]:
    total = 4 * size.parameters + size.buffer_bytes
    inference = [_spread(f"inference, {name}", total // by, _GIB) for name, by in (("fp32", 1), ("bf16", 2), ("int8", 4), ("int4", 8))]
    training = [
        _spread(f"training, {name}", max(accelerate_training(total, mixed=mixed).values()), _GIB)
        for name, mixed in (("fp32", False), ("bf16", True))
    ]
    return [*inference, *training, _added_up(size)]


def zero2_bytes(size: Size, gpus: int) -> int:
    """Bytes a GPU under ZeRO-2 without offload: 16-bit weights on each; gradients in 16 and 32 bits, master weights and moments shared."""
    return 2 * size.parameters + int(18 * size.parameters / gpus)


def zero3_bytes(size: Size, gpus: int) -> int:
    """Bytes a GPU under ZeRO-3 without offload: the largest module whole, in 32 bits; everything else shared."""
    return 4 * size.largest_module + int(18 * size.parameters / gpus)


def _deepspeed(size: Size) -> list[Estimate]:
    return [
        Estimate("training, ZeRO-2", zero2_bytes(size, 1), lambda gpus: zero2_bytes(size, gpus), _GIB),
        Estimate("training, ZeRO-3", zero3_bytes(size, 1), lambda gpus: zero3_bytes(size, gpus), _GIB),
        _added_up(size),
    ]


def _added_up(size: Size) -> Estimate:
    """What all of DeepSpeed's processes hold between them: weights, gradients and states, nothing left out and nothing twice."""
    return _spread("training, all added up", 18 * size.parameters, _GIB)


def _spread(what: str, total: int, unit: int) -> Estimate:
    return Estimate(what, total, lambda gpus: total / gpus, unit)
