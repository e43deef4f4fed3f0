"""What this machine has, and what the GPUs that people rent can do. Imports no torch.

python -m launch.hardware        prints the devices, cores and memory found here
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,uuid", "--format=csv,noheader,nounits")
_MEMINFO = Path("/proc/meminfo")


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
    """Dense FLOP/s in bfloat16; None where the hardware has no such arithmetic."""
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


@dataclass(frozen=True, slots=True)
class DetectedGpu:
    """A GPU of this machine."""

    name: str
    """As the driver reports it, such as `NVIDIA A100-SXM4-80GB`."""
    memory_bytes: int


def known_gpu(name: str) -> Gpu | None:
    """The row of `GPUS` for a name that the driver reports; None for a model (or a variant with other figures) that is not there."""
    return next((gpu for gpu in GPUS if re.search(gpu.reported, name.strip())), None)


def detect() -> list[DetectedGpu]:
    """The GPUs that a process started here may use, in the driver's order.

    Follows CUDA_VISIBLE_DEVICES as CUDA does: numbers or UUIDs, up to the first that names no device. Empty where there is no NVIDIA
    driver, or it reports no device. MIG slices are not seen: the driver's list has whole GPUs only.
    """
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.rsplit(",", 2)] for line in answer.stdout.splitlines() if line.count(",") >= 2]
    return [DetectedGpu(name, _gpu_memory_bytes(memory)) for name, memory, _ in _visible(rows, os.environ.get("CUDA_VISIBLE_DEVICES"))]


def _visible(rows: list[list[str]], variable: str | None) -> list[list[str]]:
    if variable is None:
        return rows
    chosen: list[list[str]] = []
    for device in variable.split(","):
        row = _named(rows, device.strip())
        if row is None:
            break
        chosen.append(row)
    return chosen


def _named(rows: Sequence[list[str]], device: str) -> list[str] | None:
    if device.isdecimal():
        return rows[int(device)] if int(device) < len(rows) else None
    return next((row for row in rows if device and row[2].startswith(device)), None)


def _gpu_memory_bytes(cell: str) -> int:
    # A chip that shares the machine's memory has none of its own to report, and answers [N/A].
    return int(cell) * 2**20 if cell.isdecimal() else memory_bytes() or 0


def cpu_count() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Memory of the machine; None where the system has no /proc/meminfo."""
    if not _MEMINFO.is_file():
        return None
    found = re.search(r"^MemTotal:\s+(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


if __name__ == "__main__":
    print(*detect(), f"{cpu_count()} cores", f"{memory_bytes()} bytes of memory", sep="\n")
