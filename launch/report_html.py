"""How a report looks: its numbers in words, and a page as Markdown or as one self-contained HTML file."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup

MISSING = "-"
"""What was not measured; never 0."""


def whole(value: int | None) -> str:
    """Rows and items in full: 9,741."""
    return MISSING if value is None else f"{value:,}"


def count(value: int | None) -> str:
    """Parameters and tokens: 1.2M, 210.3k, 512."""
    if value is None or abs(value) < 1000:
        return whole(value)
    # The bound lies where rounding to one decimal would give 1000.0 of the smaller unit.
    units = ((1e3, "k"), (1e6, "M"), (1e9, "B"))
    size, unit = next((pair for pair in units if abs(value) < 999.95 * pair[0]), units[-1])
    return f"{value / size:.1f}{unit}"


def num_bytes(value: int | None) -> str:
    """Decimal units, three digits: 0.81 MB, 12.3 MB, 538 MB, 1.42 GB; kB below 10 kB, where MB would show nothing."""
    if value is None:
        return MISSING
    size, unit = (1e9, "GB") if value >= 999.5e6 else (1e6, "MB") if value >= 10_000 else (1e3, "kB")
    scaled = value / size
    return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {unit}"


def bytes_tick(value: float) -> str:
    """A round number of bytes on an axis: 0.5 MB, 20 MB, 1 GB."""
    size, unit = (1e9, "GB") if value >= 1e9 else (1e6, "MB") if value >= 1e5 else (1e3, "kB")
    return f"{value / size:g} {unit}"


def seconds_tick(value: float) -> str:
    """A round number of seconds on an axis: 0.5 ms, 20 ms, 1 s."""
    return f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms"


def percent(share: float | None) -> str:
    """A share (0 to 1) as 81.2 %."""
    return MISSING if share is None else f"{100 * share:.1f} %"


def percent_range(interval: tuple[float, float]) -> str:
    """Two shares as 77.3 to 84.2 %."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def points(difference: float | None) -> str:
    """A difference of shares in percentage points: +3.4."""
    if difference is None:
        return MISSING
    rounded = round(100 * difference, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"


def p_value(value: float | None) -> str:
    """A p-value as 0.083 or < 0.001."""
    return MISSING if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def p_equals(value: float) -> str:
    """A p-value in a sentence: p = 0.083 or p < 0.001."""
    return f"p {p_value(value)}" if value < 0.001 else f"p = {p_value(value)}"


def rate(value: float | None) -> str:
    """Items or tokens a second, three digits and more: 1,234 or 12.3."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def duration(seconds: float | None) -> str:
    """Seconds as 12.3 s, 4 min 05 s or 2 h 05 min."""
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        return "{} min {:02d} s".format(*divmod(round(seconds), 60))
    return "{} h {:02d} min".format(*divmod(round(seconds / 60), 60))


def milliseconds(seconds: float | None) -> str:
    """A latency: 0.85 ms, 12.3 ms, 1,234 ms."""
    return MISSING if seconds is None else f"{rate(1000 * seconds)} ms"


def decimal(value: float | None) -> str:
    """A loss or a score of a validation, to four decimals: 0.8125."""
    return MISSING if value is None else f"{value:.4f}"


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; the first `text_columns` are aligned on the left, the others are numbers."""

    columns: list[str]
    rows: list[list[str]]
    title: str = ""
    text_columns: int = 1
    stacked: bool = False
    """On a narrow screen each row is a card of its own, its first cell the heading: for rows of texts."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure to see first, and what it is to be read against."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, slots=True)
class Plot:
    """One drawing, and what its colours and marks stand for."""

    title: str
    svg: str
    legend: list[tuple[str, str, str]]
    """Label, CSS colour and mark of each series."""
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it, in this order."""

    title: str
    paragraphs: list[str]
    tables: list[Table]
    plots: list[Plot]
    notes: list[str]
    code: str = ""
    folded: bool = False
    """Shown closed, as a line to open."""


@dataclass(frozen=True, slots=True)
class Page:
    """A whole report in words."""

    title: str
    subtitle: str
    summary: list[str]
    warnings: list[str]
    sections: list[Section]
    tiles: list[Tile] = field(default_factory=list)


def to_html(page: Page) -> str:
    """The page as one file that needs no network: style and drawings inside; every text from data is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    # The drawings are ours, and matplotlib escapes the texts in them.
    drawing: Callable[[str], Markup] = Markup
    environment.filters["drawing"] = drawing
    return environment.get_template("report.html").render(page=page, missing=MISSING)


def to_markdown(page: Page) -> str:
    """The page as GitHub Markdown, without its drawings."""
    lines = [f"# {_inline(page.title)}", "", _inline(page.subtitle), ""]
    lines += [line for sentence in page.summary for line in (_inline(sentence), "")]
    lines += [line for warning in page.warnings for line in (f"> **Warning:** {_inline(warning)}", "")]
    for section in page.sections:
        lines += _markdown_section(section) if section.tables or section.code or section.notes else []
    return "\n".join(lines).rstrip() + "\n"


def _markdown_section(section: Section) -> list[str]:
    lines = [f"## {_inline(section.title)}", ""]
    lines += [line for paragraph in section.paragraphs for line in (_inline(paragraph), "")]
    for table in section.tables:
        lines += [f"### {_inline(table.title)}", ""] if table.title else []
        lines += [*markdown_table(table), ""]
    if section.code:
        # A fence longer than any run of backticks inside cannot be closed by the text.
        fence = "`" * (max([2, *map(len, re.findall("`+", section.code))]) + 1)
        lines += [fence, section.code.rstrip("\n"), fence, ""]
    lines += [f"- {_inline(note)}" for note in section.notes]
    return [*lines, ""] if section.notes else lines


def markdown_table(table: Table) -> list[str]:
    """A table's lines as GitHub Markdown, without its title."""
    rules = [":---" if i < table.text_columns else "---:" for i in range(len(table.columns))]
    return [_row(table.columns), f"| {' | '.join(rules)} |", *map(_row, table.rows)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(map(_inline, cells))} |"


def _inline(text: str) -> str:
    """Text that GitHub shows as it is: no tag, no cell border, no link, no emphasis, on one line."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
