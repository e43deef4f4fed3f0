"""One live line a stage on a terminal; a line at a tenth of the work elsewhere. Imports no torch."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import ClassVar, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

_QUIET_SECONDS = 5.0
"""Where there is no terminal, lines are at least this far apart: work of a few seconds needs none."""


class StageProgress:
    """Progress of `total` units of work; silent where not `enabled` (all processes but the main one).

    One that is entered inside another tells how it goes in the other's note, and shows nothing of its own.
    """

    _shown: ClassVar[StageProgress | None] = None
    """The one that this process is inside of."""

    def __init__(self, title: str, total: int, unit: str, *, enabled: bool = True, most_seconds: float = math.inf) -> None:
        """Opens it.

        Args:
            title: of the work.
            total: units of it.
            unit: in the plural.
            enabled: show it.
            most_seconds: after which the work ends, done or not.
        """
        self._most_seconds = most_seconds
        self.title, self.total, self.unit, self.enabled = title, total, unit, enabled
        self.done = 0
        self._console = Console(file=sys.stderr)
        self._bar: Progress | None = None
        self._around: StageProgress | None = None
        self._started = self._told = time.monotonic()
        self._measured: tuple[int, float] | None = None
        """Units done and the time when the first were: what compiles or loads on the way there, or was done before, says nothing of the
        rest."""

    def __enter__(self) -> Self:
        self._around = StageProgress._shown
        if self._around is not None:
            return self
        StageProgress._shown = self
        if self.enabled and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                _TimeLeft(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task(f"{self.title} ({self.unit})", total=self.total, note="", ends=None)
        return self

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Counts `amount` units as done; `note` says how it goes."""
        before, self.done = self.done, self.done + amount
        if self._around is not None:
            self._around.tell(f"{self.title} {self.done}/{self.total} {note}")
            return
        if not self.enabled:
            return
        seconds = self._left()
        left = "" if seconds is None else f"{clock(seconds)} left"
        if self._bar is not None:
            ends = None if seconds is None else time.monotonic() + seconds
            self._bar.update(self._task, completed=self.done, note=note, ends=ends)
        elif self.total and before * 10 // self.total != self.done * 10 // self.total and time.monotonic() - self._told > _QUIET_SECONDS:
            self._told = time.monotonic()
            spent = f"{self._told - self._started:.0f} s{f', {left}' if left else ''}"
            print(f"{self.title}: {self.done}/{self.total} {self.unit}, {spent}  {note}".rstrip(), file=sys.stderr, flush=True)

    def _left(self) -> float | None:
        """Seconds until the end by the mean rate so far; None where there is none yet, and at the end."""
        now = time.monotonic()
        if self._measured is None:
            self._measured = (self.done, now) if self.done else None
            return None
        done, since = self._measured
        if self.done == done or self.done >= self.total:
            return None
        return min((now - since) / (self.done - done) * (self.total - self.done), self._most_seconds - (now - self._started))

    def tell(self, note: str) -> None:
        """Changes the note on a terminal."""
        if self._bar is not None:
            self._bar.update(self._task, note=note)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._around is None:
            StageProgress._shown = None
        if self._bar is not None:
            self._bar.stop()


class _TimeLeft(ProgressColumn):
    """Counts down between two units of work, which may be far apart."""

    def render(self, task: Task) -> Text:
        """The words at this moment."""
        ends = task.fields["ends"]
        return Text("" if ends is None else f"{clock(max(0.0, ends - time.monotonic()))} left")


def clock(seconds: float) -> str:
    """A time in whole units, to a quarter or better from two seconds on: 119 s, 10 min, 2 h 47 min."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
