"""How many cores a process may use. Imports no torch."""

from __future__ import annotations

import os

from train.cgroups import cpu_limit


def cpu_count() -> int:
    """Cores that this process may run on, and gets the time of: more threads would wait for each other."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(bound, cpu_limit() or bound)


def usual_threads() -> int:
    """OMP_NUM_THREADS, or one a core."""
    return int(os.environ.get("OMP_NUM_THREADS") or cpu_count())
