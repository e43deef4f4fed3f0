"""Work that must not keep a stage waiting: calls to a service, in a thread of their own. Imports no torch."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, ClassVar

_SHARE, _LEAST_SECONDS = 0.01, 1.0
"""Of the time since this process began, and at least: what all `close` of a process may wait together."""
_BEGAN = time.monotonic()


def answers(url: str, seconds: float) -> bool:
    """Whether something answers HTTP at `url`, with whatever status, within so many seconds."""
    heard: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
                heard.append(True)
        except urllib.error.HTTPError:  # a refusal is an answer, too
            heard.append(True)
        except (OSError, ValueError):
            pass

    # Looking a name up has no time-out of its own, and a server may send one byte a second.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(heard)


class Background:
    """Calls that are made one after another, each with what `open_service` returned.

    Of one that raises `on_error` hears, and those after it are left out, but for the one that closes. Every call must be bounded in time,
    as `drain` waits for it.
    """

    _waited = 0.0
    """Seconds that closing has taken in this process."""
    _closing: ClassVar[list[Thread]] = []

    def __init__(self, open_service: Callable[[], Any], on_error: Callable[[Exception], None]) -> None:
        self._calls: SimpleQueue[Callable[[Any], object] | None] = SimpleQueue()
        self._open, self._on_error = open_service, on_error
        self.has_failed = False
        self._thread = Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    @classmethod
    def drain(cls) -> None:
        """Waits for all that is closing in this process; to be called before its end, where libraries refuse to start anything."""
        while cls._closing:
            cls._closing.pop().join()

    def put(self, call: Callable[[Any], object]) -> None:
        """Has it called, later."""
        self._calls.put(call)

    def close(self, call: Callable[[Any], object]) -> None:
        """Has this called as the last, and waits for it as long as all closing of this process may take together."""
        self._last = call
        self._calls.put(None)
        Background._closing.append(self._thread)
        began = time.monotonic()
        self._thread.join(max(0.0, max(_LEAST_SECONDS, _SHARE * (began - _BEGAN)) - Background._waited))
        Background._waited += time.monotonic() - began

    def _work(self) -> None:
        service = self._tried(self._open)
        while (call := self._calls.get()) is not None:
            if not self.has_failed:
                self._tried(partial(call, service))
        if service is not None:
            self._tried(partial(self._last, service))

    def _tried(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # services raise many kinds, and none is a reason to lose a stage
            self.has_failed = True
            self._on_error(error)
            return None
