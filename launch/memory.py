"""Memory of one process, by what takes it. Arithmetic only: imports no torch.

What `train/` and DeepSpeed 0.19.8 allocate, counted tensor by tensor at each moment of a step that may be the fullest one;
launch/training_memory.py and launch/inference_memory.py count them. README, Memory, compares them with what a GPU says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

CONTEXT_BYTES = 900_000_000
"""Of a GPU's memory that torch's allocator never sees: the CUDA context and libraries.

Source: 0.79 to 0.88 GB on an H200, torch 2.11 (tests/bench/memory.py).
"""
WORKSPACE_BYTES = 2**25
"""Of a GPU's memory that torch allocates for each handle of cuBLAS: 32 MiB on an H100 or H200, which all are taken for, 8 on an A100.
Threads and streams that multiply matrices have one each.

Source: torch 2.11, aten/src/ATen/cuda/CublasHandlePool.cpp; what stays allocated after a case of tests/bench/memory.py.
"""
NCCL_BYTES = 1_300_000_000
"""What it does not see besides where processes talk to each other: NCCL's buffers.

Source: 2.18 to 2.21 GB with the context, on two H200 (tests/bench/memory.py).
"""
MARGIN = 0.05
"""Share of a GPU's memory left to what lies free in torch's cache in pieces too small for what is asked for next.

Source: torch had reserved a median of 5 % more than was allocated (tests/bench/memory.py). Up to 6 GB more under ZeRO 2 and 3, but whole
pieces among it are given back where memory runs short.
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

    recorded: int = 0
    """The pool of recorded passes (CUDA graphs); torch reserves it, and counts nothing in it as allocated between passes."""

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` is to say."""
        return self.total - self.recorded

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    def __add__(self, other: Memory) -> Memory:
        """Both at once."""
        return Memory(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})


def fullest(moments: Iterable[Memory]) -> Memory:
    """The moment that takes most."""
    return max(moments, key=lambda memory: memory.total)


def outside_bytes(processes: int) -> int:
    """What torch's allocator never sees, of a GPU that one of so many processes has to itself."""
    return CONTEXT_BYTES + (NCCL_BYTES if processes > 1 else 0)


def usable_bytes(gpu_memory_bytes: int, processes: int) -> int:
    """Of a GPU, for what `Memory` counts: without context, NCCL and the margin for fragmentation."""
    return max(0, int(gpu_memory_bytes * (1 - MARGIN)) - outside_bytes(processes))
