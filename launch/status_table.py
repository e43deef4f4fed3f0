"""The state of a run as a table on the terminal. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.status import Row, State

_STYLES: dict[State, str] = {"done": "green", "running": "cyan", "failed": "red", "cancelled": "yellow", "not run": "yellow"}


def show(rows: Sequence[Row], console: Console) -> None:
    """Prints the table, and below it in full what stages wait for and what ended them: it may be long."""
    table = Table("stage", "state", "job", "progress", box=box.SIMPLE_HEAD)
    told: dict[str, list[str]] = {}
    for row in rows:
        table.add_row(Text(row.stage), Text(row.state, style=_STYLES.get(row.state, "")), Text(row.job), Text(row.progress))
        for note in filter(None, (row.why, row.link)):
            told.setdefault(note, []).append(row.stage)
    console.print(table)
    for note, stages in told.items():
        console.print(f"{', '.join(stages)}: {note}", highlight=False, soft_wrap=True, markup=False)
