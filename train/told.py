"""What a process of its own says where it fails, and the status that it ends with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence


def status_of(work: Callable[[], object]) -> int:
    """Does the work: 0; after what a user can mend, told in one line, 1; after Ctrl-C 130."""
    try:
        work()
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run_told(command: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> None:
    """Runs such a process to its end.

    Args:
        command: its command line.
        what: it does, for the message where it was ended.
        environment: this process's own where left out.

    Raises:
        RuntimeError: with what it told, if it failed.
    """
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode < 0:
        raise RuntimeError(f"{what} was ended by signal {-done.returncode}; often the memory is used up")
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"{what} ended with status {done.returncode}"]
        raise RuntimeError(told[-1].removeprefix("error: "))
