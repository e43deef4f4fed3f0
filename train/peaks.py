"""The most memory that a stage held, measured while it runs; `launch.peaks` sets it against what was planned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from train.artifacts import CPU, PeakMemory
from train.serving import peak_resident_bytes
from train.signals import Stopped
from train.world import World

_CLEAR_REFS, _RESET_PEAK = Path("/proc/self/clear_refs"), "5"
"""Sets the kernel's peak of this process to what it holds now.

Source: Linux, Documentation/filesystems/proc.rst.
"""


@contextmanager
def measuring(folder: Path, world: World) -> Iterator[None]:
    """Notes in a stage's folder the most that any process held until the stage ended, or was stopped; every process must enter it.

    Where a system cannot forget a peak, as macOS, that of a CPU is the process's since it began.
    """
    _reset(world)
    try:
        yield
    except Stopped:  # every process raises it after the same step; of another error some know nothing
        _note(folder, world)
        raise
    _note(folder, world)


def _reset(world: World) -> None:
    """One process runs several stages: each is to have its own peak."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    else:
        with suppress(OSError):
            _CLEAR_REFS.write_text(_RESET_PEAK)


def _note(folder: Path, world: World) -> None:
    on_gpu = world.device.type == "cuda"
    each = torch.zeros(world.size, dtype=torch.int64)
    each[world.rank] = torch.cuda.max_memory_allocated(world.device) if on_gpu else peak_resident_bytes()
    most = int(world.sum(each).max())
    if world.is_main:
        about = torch.cuda.get_device_properties(world.device) if on_gpu else None
        PeakMemory(about.name if about else CPU, about.total_memory if about else None, world.size, most).write(folder)
