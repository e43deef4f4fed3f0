"""How a process is asked to stop in order, and how none outlives the process that started it. Imports no torch.

SIGTERM and SIGUSR1 ask: Slurm sends them before it takes a node back.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = 75
"""Exit status of what was asked to stop and goes on when it is started again: EX_TEMPFAIL of sysexits.h."""

STOPPED_FILE = "STEPDOWN_STOPPED_FILE"
"""The environment variable with the path of a file that is made where work stopped so: over several nodes exit statuses get lost, as
the first process to end has the others killed."""
PARENT = "STEPDOWN_PARENT_PID"
"""The environment variable by which a process knows its parent's number."""
_PR_SET_PDEATHSIG = 1

Handler = Callable[[int, FrameType | None], None]


class Stopped(RuntimeError):
    """A training that a signal ended after a step, with its state saved."""


@dataclass(slots=True)
class Request:
    """Whether this process was asked to stop."""

    asked: str | None = None
    """Name of the first signal that asked."""


def tell_stopped() -> int:
    """Makes the file that `STOPPED_FILE` names, where it names one; gives the exit status for what was asked to stop and did."""
    if path := os.environ.get(STOPPED_FILE):
        Path(path).touch()
    return STOPPED


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """`handler` takes both signals inside; outside the main thread, where Python allows no handlers, it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            # None stands for a handler that was not installed from Python, and cannot be from there.
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


@contextmanager
def catching() -> Iterator[Request]:
    """Both signals are noted inside instead of ending the process; whoever asked waits for it to look."""
    request = Request()

    def note(number: int, _: FrameType | None) -> None:
        request.asked = request.asked or signal.Signals(number).name

    with handling(note):
        yield request


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent ends; elsewhere it does nothing.

    A parent that ended before this call sends no signal any more: it is known by its number, which every generation hands down.
    """
    # Ctrl-C ends it at once and without a traceback: nothing is lost that a kill would not lose.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.environ.get(PARENT)
    if parent is not None and os.getppid() != int(parent):
        sys.exit(1)
    os.environ[PARENT] = str(os.getpid())
