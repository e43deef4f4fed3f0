"""Whether the time left that a terminal shows turns out to be right: every display of a run against when its work was over.

python tests/bench/time_left.py configs/quickstart.yaml                       a run in a temporary folder, some minutes
python tests/bench/time_left.py configs/quickstart.yaml student.epochs=1      with overrides
python tests/bench/time_left.py --read OUT.json                               the table of an earlier run

The run's live lines are read off a pseudo-terminal, as a person at one sees them. Of each line of work that took over 10 s, those shown
after a tenth of its time are compared with the time from then until its last one: how many are within 30 %, which was worst, and how many
said nothing. What lies in the last three seconds is left out: there a display of whole seconds is off by a third by its rounding alone.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

WITHIN, FIRST, SHORTEST, LAST_SECONDS = 0.3, 0.1, 10.0, 3.0
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LINE = re.compile(r"(?P<title>\S.*?) \((?P<unit>\w+)\) *[━╸╺ ]+ *(?P<done>\d+)/(?P<total>\d+) \d+:\d\d:\d\d *(?P<left>.*? left)?(?: |$)")
_SECONDS = {"s": 1, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Shown:
    """What a live line said, and when."""

    at: float
    title: str
    done: int
    total: int
    left: float | None
    """Seconds; None where the line said nothing."""


@dataclass(frozen=True)
class Judged:
    """A line of work."""

    title: str
    seconds: float
    num_shown: int
    """After the first tenth, and before the last seconds."""
    within: float
    """Share of them."""
    silent: float
    """Share of them that said nothing; they are not within."""
    worst: float
    """The shown time over the true one that is furthest from 1; 0 where none was shown."""


def seconds_of(told: str) -> float:
    """What `train.progress.clock` wrote: `89 s left`, `2 h 47 min left`."""
    words = told.removesuffix(" left").split()
    return sum(float(number) * _SECONDS[unit] for number, unit in zip(words[::2], words[1::2], strict=True))


def read(texts: Iterable[tuple[float, str]]) -> list[Shown]:
    """The displays in what a terminal got, by the time when it did."""
    found = []
    for at, text in texts:
        for line in re.split(r"[\r\n]+", _CONTROL.sub("", text)):
            if (match := _LINE.search(line)) is not None:
                left = match["left"]
                done, total = int(match["done"]), int(match["total"])
                found.append(Shown(at, match["title"], done, total, None if left is None else seconds_of(left)))
    return found


def judge(shown: Sequence[Shown]) -> list[Judged]:
    """Each line of work that lasted."""
    by_title: dict[str, list[Shown]] = {}
    for display in shown:
        by_title.setdefault(display.title, []).append(display)
    return [judged(title, displays) for title, displays in by_title.items() if displays[-1].at - displays[0].at > SHORTEST]


def judged(title: str, displays: Sequence[Shown]) -> Judged:
    began, ended = displays[0].at, displays[-1].at
    counted = [d for d in displays if d.at >= began + FIRST * (ended - began) and ended - d.at > LAST_SECONDS]
    ratios = [d.left / (ended - d.at) for d in counted if d.left is not None]
    num_within = sum(abs(ratio - 1) <= WITHIN for ratio in ratios)
    worst = max(ratios, key=lambda ratio: max(ratio, 1 / max(ratio, 1e-9)), default=0.0)
    return Judged(title, ended - began, len(counted), num_within / len(counted), 1 - len(ratios) / len(counted), worst)


def watched(command: Sequence[str]) -> list[tuple[float, str]]:
    """Runs a command on a pseudo-terminal wide enough for its lines; all it writes, with the time.

    Raises:
        RuntimeError: if it fails.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 240, 0, 0))
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "TERM": "xterm"}
    texts, began = list[tuple[float, str]](), time.monotonic()
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        try:
            while data := os.read(ours, 65536):
                texts.append((time.monotonic() - began, data.decode(errors="replace")))
        except OSError:  # Linux's way to say that the last one has closed it
            pass
    os.close(ours)
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with status {process.returncode}:\n{_CONTROL.sub('', ''.join(t for _, t in texts[-40:]))}"
        )
    return texts


def table(rows: Sequence[Judged], console: Console) -> None:
    """Prints them."""
    shown = Table("Work", "Seconds", "Displays", f"Within {WITHIN:.0%}", "Silent", "Worst")
    for row in rows:
        worst = f"{row.worst:.2f} of it" if row.worst else "-"
        shown.add_row(row.title, f"{row.seconds:.0f}", str(row.num_shown), f"{row.within:.0%}", f"{row.silent:.0%}", worst)
    console.print(shown)


def main() -> None:
    """Runs, and says how it went."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--read", type=Path, help="displays that --out wrote")
    parser.add_argument("--out", type=Path, help="where every display goes")
    asked = parser.parse_args()
    if asked.read is not None:
        shown = [Shown(**values) for values in json.loads(asked.read.read_text())]
    else:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "launch.cli", "run", asked.config, f"output={folder}", *asked.overrides]
            shown = read(watched(command))
    if asked.out is not None:
        asked.out.write_text(json.dumps([asdict(display) for display in shown]))
    table(judge(shown), Console(width=120))


if __name__ == "__main__":
    main()
