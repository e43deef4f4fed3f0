"""torchrun, ended with the process that started it.

    python -m launch.agent TORCHRUN_ARGUMENTS

torchrun puts its workers into sessions of their own, so that a kill of the command's process group would leave them running, writing into
a folder that the next command takes for abandoned. Here each generation asks the kernel to be killed with its parent.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
PARENT = "STEPDOWN_PARENT_PID"


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


def main(arguments: list[str]) -> int:
    """Runs torchrun; a worker that failed is told in one line, after its own message."""
    die_with_parent()
    logging.disable()  # torchrun tells of every worker that ends, in its own words; ours stand below
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(arguments)
    except SignalException:
        return 130
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            why = " (out of memory, or killed by hand)" if name == "SIGKILL" else ""
            print(f"error: worker {rank} was ended by {name}{why}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
