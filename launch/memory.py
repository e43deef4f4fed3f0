"""Memory of one process, by what takes it. Arithmetic only: imports no torch.

What `train/` and DeepSpeed 0.19.8 allocate, counted tensor by tensor at each moment of a step that may be the fullest one;
launch/training_memory.py and launch/inference_memory.py count them. The README compares them with what a GPU says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

CONTEXT_BYTES = 1_000_000_000
"""Of a GPU's memory that torch's allocator never sees: the CUDA context, libraries, NCCL's buffers.

Source: measured by tests/bench/memory.py.
"""
MARGIN = 0.05
"""Share of a GPU's memory left to what lies free in torch's cache in pieces too small for what is asked for next.

Source: most that torch had reserved beyond what was allocated, tests/bench/memory.py.
"""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process's device at the fullest moment."""

    weights: int = 0
    """In the precision of the forward pass."""
    gradients: int = 0
    optimizer: int = 0
    """Master weights in fp32 and AdamW's two moments."""
    masks: int = 0
    activations: int = 0
    """What layers keep for the backward pass, and what they need while they run."""
    head: int = 0
    """Logits in chunks, and the gradients of states and weights that are made with them; of a teacher its logits."""
    cache: int = 0
    """Keys and values."""
    buffers: int = 0
    """What is gathered, flattened or on its way between processes."""
    teacher: int = 0
    """A live teacher's weights, beside the student."""

    @property
    def total(self) -> int:
        """All of it: what `torch.cuda.max_memory_allocated` is to say."""
        return sum(asdict(self).values())

    def __add__(self, other: Memory) -> Memory:
        """Both at once."""
        return Memory(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})


def fullest(moments: Iterable[Memory]) -> Memory:
    """The moment that takes most."""
    return max(moments, key=lambda memory: memory.total)


def usable_bytes(gpu_memory_bytes: int) -> int:
    """Of a GPU, for what `Memory` counts: without the context and the margin for fragmentation."""
    return max(0, int(gpu_memory_bytes * (1 - MARGIN)) - CONTEXT_BYTES)
