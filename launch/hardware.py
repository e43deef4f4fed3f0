"""What this machine has. Imports no torch.

python -m launch.hardware        prints the devices, cores and memory found here
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.cgroups import memory_limit
from train.cores import cpu_count
from train.gpus import GPUS, Gpu, known_gpu

__all__ = ["GPUS", "DetectedGpu", "Gpu", "cpu_count", "detect", "known_gpu", "memory_bytes"]

_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,uuid", "--format=csv,noheader,nounits")
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class DetectedGpu:
    """A GPU of this machine."""

    name: str
    """As the driver reports it, such as `NVIDIA A100-SXM4-80GB`."""
    memory_bytes: int


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


def memory_bytes() -> int | None:
    """Memory of the machine, or what its container or job gets of it; None where the system has no /proc/meminfo."""
    if not _MEMINFO.is_file():
        return None
    found = re.search(r"^MemTotal:\s+(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)
    if found is None:
        return None
    whole = int(found[1]) * 1024
    return min(whole, memory_limit() or whole)


if __name__ == "__main__":
    print(*detect(), f"{cpu_count()} cores", f"{memory_bytes()} bytes of memory", sep="\n")
