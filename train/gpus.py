"""What the GPUs that people rent can do. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One model of GPU, as its maker describes it.

    Source: NVIDIA's datasheets of A100 (SXM4), H100 (SXM5), H200 (SXM), L40S, A10, L4 and T4, and the Ada architecture whitepaper for the
    RTX 4090 (tensor cores accumulating in fp32). Where a datasheet gives FLOP/s with sparsity, this is half of it.
    """

    name: str
    memory_bytes: int
    """The datasheet's gigabytes, of 10^9 bytes; what the driver reports differs by a few per cent."""
    bf16_flops: float | None
    """Dense FLOP/s in bfloat16; None where the hardware has no such arithmetic; 0 where it is not known."""
    fp16_flops: float
    """Dense FLOP/s in float16."""
    bandwidth: float
    """Bytes a second between the GPU and its memory."""
    reported: str
    """Regular expression for the name that the driver reports."""


GPUS: tuple[Gpu, ...] = (
    Gpu("A100-40GB", 40_000_000_000, 312e12, 312e12, 1.555e12, r"A100-SXM4-40GB$"),
    Gpu("A100-80GB", 80_000_000_000, 312e12, 312e12, 2.039e12, r"A100-SXM4-80GB$"),
    Gpu("H100-80GB", 80_000_000_000, 989e12, 989e12, 3.35e12, r"H100 80GB HBM3$"),
    Gpu("H200-141GB", 141_000_000_000, 989e12, 989e12, 4.8e12, r"\bH200$"),
    Gpu("L40S", 48_000_000_000, 362e12, 362e12, 0.864e12, r"\bL40S$"),
    Gpu("A10", 24_000_000_000, 125e12, 125e12, 0.6e12, r"\bA10$"),
    Gpu("L4", 24_000_000_000, 121e12, 121e12, 0.3e12, r"\bL4$"),
    Gpu("T4", 16_000_000_000, None, 65e12, 0.32e12, r"\bT4$"),
    Gpu("RTX 4090", 24_000_000_000, 165.2e12, 165.2e12, 1.008e12, r"RTX 4090$"),
)


def known_gpu(name: str) -> Gpu | None:
    """The row of `GPUS` for a name that the driver reports; None for a model (or a variant with other figures) that is not there."""
    return next((gpu for gpu in GPUS if re.search(gpu.reported, name.strip())), None)


def gpu_named(name: str) -> Gpu:
    """A GPU of the table by its name, or one of a user's own as `48GB` or `NAME=48GB`, whose speed is not known.

    Raises:
        ValueError: for a name that is not in the table.
    """
    own = re.fullmatch(r"(?:(.+)=)?\s*(\d+(?:\.\d+)?)\s*GB", name.strip(), re.IGNORECASE)
    if own is not None and float(own[2]) > 0:
        memory = float(own[2])
        return Gpu((own[1] or f"{memory:g} GB").strip(), int(memory * 1e9), 0.0, 0.0, 0.0, r"$^")
    short = name.strip().lower().removesuffix("gb")
    known = [gpu for gpu in GPUS if short in (gpu.name.lower().removesuffix("gb"), gpu.name.lower().partition("-")[0])]
    if not known:
        raise ValueError(
            f"--gpu is {name}, which the table does not have; it has: {', '.join(gpu.name for gpu in GPUS)}. Give the memory of another "
            "one: --gpu 48GB, or --gpu MINE=48GB"
        )
    return known[-1]
