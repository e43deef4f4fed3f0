"""What a process of its own says where it fails, and the status that it ends with."""

from __future__ import annotations

import sys
from collections.abc import Callable


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
