"""torchrun, ended with the process that started it.

    python -m launch.agent TORCHRUN_ARGUMENTS

torchrun puts its workers into sessions of their own, so that a kill of the command's process group would leave them running, writing into
a folder that the next command takes for abandoned. Here each generation asks the kernel to be killed with its parent.

SIGTERM and SIGUSR1 are passed on to the workers, and the agent waits: a training saves its state before it ends, for as long as that takes.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import FrameType

from train.signals import SIGNALS, STOPPED, die_with_parent, tell_stopped

_CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children")
_SAME_REQUEST_SECONDS = 2.0
"""A signal to a whole group of processes comes here twice: by itself, and passed on by the command that started this one."""


class Relay:
    """Passes the signals that ask for an end on to the workers; a second SIGTERM ends this process at once, and the workers with it."""

    def __init__(self) -> None:
        self.asked = False
        self._terminated: float | None = None

    def install(self) -> list[str]:
        """Takes the place of torchrun's handling, which leaves workers 30 seconds, and gives the arguments that have torchrun allow it.

        Where Linux's /proc does not list the workers, torchrun's handling stays.
        """
        if not _CHILDREN.is_file():
            return []
        for number in SIGNALS:
            signal.signal(number, self.take)
        return ["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"]

    def take(self, number: int, _: FrameType | None) -> None:
        """Handles a signal."""
        self.asked = True
        workers = [int(pid) for pid in _CHILDREN.read_text().split()]
        if not workers or self._is_repeated(number):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _is_repeated(self, number: int) -> bool:
        if number != signal.SIGTERM:
            return False
        now = time.monotonic()
        if self._terminated is None:
            self._terminated = now
        return now - self._terminated > _SAME_REQUEST_SECONDS


def has_stopped(statuses: Collection[int], asked: bool) -> bool:
    """Whether workers ended because they were asked to, by the exit statuses of those that did not end well.

    A training ends with `STOPPED` after it has saved. In every other stage the signal ends a worker at once, for what is done is on the
    disk; torchrun then ends the others, or they miss it.
    """
    return STOPPED in statuses or (asked and any(-number in statuses for number in SIGNALS))


def main(arguments: list[str]) -> int:
    """Runs torchrun; a worker that failed is told in one line, after its own message."""
    die_with_parent()
    relay = Relay()
    own_arguments = relay.install()
    logging.disable()  # torchrun tells of every worker that ends, in its own words; ours stand below
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun([*own_arguments, *arguments])
    except SignalException:
        return 130
    except ChildFailedError as error:
        if has_stopped({failure.exitcode for failure in error.failures.values()}, relay.asked):
            return tell_stopped()
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            why = " (out of memory, or killed by hand)" if name == "SIGKILL" else ""
            print(f"error: worker {rank} was ended by {name}{why}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
