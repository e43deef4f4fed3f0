"""How a process is asked to stop in order: SIGTERM and SIGUSR1, which Slurm sends before it takes a node back. Imports no torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = 75
"""Exit status of what was asked to stop and goes on when it is started again: EX_TEMPFAIL of sysexits.h."""

Handler = Callable[[int, FrameType | None], None]


class Stopped(RuntimeError):
    """A training that a signal ended after a step, with its state saved."""


@dataclass(slots=True)
class Request:
    """Whether this process was asked to stop."""

    asked: str | None = None
    """Name of the first signal that asked."""


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
