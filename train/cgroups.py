"""What a container, or a job, may use of its machine's processors and memory: the limits of Linux control groups, of both versions.

Source: docs.kernel.org, admin-guide/cgroup-v2 (cpu.max, memory.max) and admin-guide/cgroup-v1; cgroups(7) of /proc/PID/cgroup.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_MOUNT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def cpu_limit() -> int | None:
    """Processors' worth of time that this process and those beside it in its groups get, rounded up; None where nothing limits them."""
    found = []
    for folder, is_second in _groups("cpu"):
        if is_second:
            quota, _, period = _read(folder / "cpu.max").partition(" ")
        else:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):
            found.append(max(1, math.ceil(int(quota) / int(period))))
    return min(found, default=None)


def memory_limit() -> int | None:
    """Bytes; None where nothing limits them. The first version writes a number that no machine has where there is no limit."""
    read = [_read(folder / ("memory.max" if is_second else "memory.limit_in_bytes")) for folder, is_second in _groups("memory")]
    return min((int(value) for value in read if value.isdecimal()), default=None)


def _groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of the groups that this process is in, and of those around them; whether they are of the second version."""
    for line in _read(_OWN).splitlines():
        number, controllers, path = line.split(":", 2)
        is_second = number == "0" and not controllers
        if is_second or controller in controllers.split(","):
            root = _MOUNT if is_second else _MOUNT / controller
            # In a container the path may be that on the host, and the container's own group be mounted as the root.
            for group in (PurePosixPath(path), *PurePosixPath(path).parents):
                yield root / str(group).lstrip("/"), is_second


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
