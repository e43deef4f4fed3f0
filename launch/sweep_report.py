"""The table of a sweep: what each arm got with its own best values, how sure its gain is, and the cells that are not run.

`stepdown report RUN/sweep` writes it again; `launch.sweep_figures` works out its figures.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from launch import plots
from launch import report_html as words
from launch.report_html import Page, Plot, Section, Table
from launch.sweep_figures import BASELINE, Cell, SweepReport, build
from train.artifacts import write_json

NOT_RUN = "not run"


def page(report: SweepReport) -> Page:
    """The report in words."""
    subtitle = f"Sweep folder: {report.folder}"
    sections = [_arms_section(report), *_curve_sections(report), *_tuning_sections(report)]
    sections.append(Section("How it was made", [], [], [], [], report.command))
    return Page(f"{report.name}: arms of the student", subtitle, _summary(report), _warnings(report), sections)


_COLUMNS = ["Arm", "Data", "Chosen", "Seeds", "Test accuracy, %", "Validation", "Points", "95 % interval", "p"]
_TEXT_COLUMNS = 3
_LESS_NEEDED = ("Validation", "Chosen", "Seeds")
"""Columns that leave where a line of the terminal is too short, in this order."""
_GAP = 2


def _row(cell: Cell) -> list[str]:
    tested = cell.comparison
    return [
        cell.label,
        f"{100 * cell.fraction:g} %",
        words.MISSING if not cell.values else _settings(cell.values),
        f"{len(cell.seeds)} of {cell.planned}",
        _mean_of(cell),
        words.percent(statistics.fmean(cell.validations) if cell.validations else None),
        words.MISSING if tested is None else words.points(tested.difference),
        words.MISSING if tested is None else f"{words.points(tested.low)} to {words.points(tested.high)}",
        words.MISSING if tested is None else words.p_value(tested.p_value),
    ]


def _settings(values: Mapping[str, str]) -> str:
    return " ".join(f"{key.removeprefix('student.')}={value}" for key, value in values.items())


def _arms_section(report: SweepReport) -> Section:
    items = "" if report.num_items is None else f"{report.num_items:,} test items. "
    text = (
        f"{items}Test accuracy is the mean over seeds ± the standard deviation of one training. Points, interval and p "
        f"compare an arm with {BASELINE} on the same labels and share of the data, by a bootstrap over items and seeds of the per-item "
        "difference. A dash was not measured, or has nothing to be compared with."
    )
    notes = [
        "Validation chose the values and the best step of every training; the test split was answered once by each scored training, and by "
        "none of those that chose.",
        "Validation figures of single_task are of another task, the label after a given rationale: compare them within that arm only.",
    ]
    notes = notes if any(cell.arm == "single_task" for cell in report.cells) else notes[:1]
    table = Table(_COLUMNS, [_row(cell) for cell in report.cells], text_columns=_TEXT_COLUMNS)
    return Section("Arms", [text], [table], [], notes)


def _curve_sections(report: SweepReport) -> list[Section]:
    fractions = sorted({cell.fraction for cell in report.cells})
    if len(fractions) < 2:
        return []
    labels = list(dict.fromkeys(cell.label for cell in report.cells))
    cells = {(cell.label, cell.fraction): cell for cell in report.cells}
    rows = [[label, *(_counted(cells[label, fraction]) for fraction in fractions)] for label in labels]
    table = Table(["Test accuracy, % (seeds)", *(f"{100 * fraction:g} %" for fraction in fractions)], rows)
    text = "Test accuracy over the share of the training rows."
    return [Section("Learning curve", [text], [table], _curve_plot(labels, cells, fractions), [])]


def _counted(cell: Cell) -> str:
    return _mean_of(cell) if cell.mean is None else f"{_mean_of(cell)} ({len(cell.accuracies)})"


def _mean_of(cell: Cell) -> str:
    if cell.mean is None:
        return NOT_RUN
    return f"{100 * cell.mean:.1f}" + ("" if cell.deviation is None else f" ± {100 * cell.deviation:.1f}")


def _curve_plot(labels: Sequence[str], cells: Mapping[tuple[str, float], Cell], fractions: Sequence[float]) -> list[Plot]:
    lines = []
    for series, label in enumerate(labels):
        measured = [(100 * f, 100 * mean) for f in fractions if (mean := cells[label, f].mean) is not None]
        if measured:
            lines.append(plots.Curve(label, series, [x for x, _ in measured], [y for _, y in measured], marked=True))
    if not lines:
        return []
    return [plots.curves("Learning curve", lines, "test accuracy, %", logarithmic=False, x_label="share of the training rows, %")]


def _tuning_sections(report: SweepReport) -> list[Section]:
    if not report.tried:
        return []
    rows = [
        [
            tried.label,
            _settings(tried.values),
            "failed" if tried.failed else words.percent(tried.exact_match) if tried.done else NOT_RUN,
            words.decimal(tried.loss),
            "chosen" if tried.chosen else "",
        ]
        for tried in report.tried
    ]
    table = Table(["Arm", "Values", "Validation", "Loss", ""], rows, text_columns=2)
    text = "Each arm tries the same grid with the first seed on all rows; most exact matches on validation win, then the least loss."
    fewer = {label: sum(tried.label == label for tried in report.tried) for label in dict.fromkeys(tried.label for tried in report.tried)}
    most = max(fewer.values())
    notes = [f"{label} has {number} different settings in this grid, not {most}." for label, number in fewer.items() if number < most]
    failed = [f"{tried.label} {_settings(tried.values)}: {tried.failed}" for tried in report.tried if tried.failed]
    return [Section("Tuning", [text], [table], [], [*notes, *failed])]


def _summary(report: SweepReport) -> list[str]:
    sentences = [f"{report.trials_done} of {report.trials} trials are done; their trainings took {words.duration(report.seconds)}."]
    for cell in report.cells:
        if (tested := cell.comparison) is not None:
            change = "gains" if tested.difference > 0 else "loses" if tested.difference < 0 else "changes nothing:"
            moved = f"{cell.label} on {_share(cell)} {change} {words.points(abs(tested.difference)).lstrip('+')} points"
            interval = f"95 % interval {words.points(tested.low)} to {words.points(tested.high)}"
            sentences.append(f"{moved} against {BASELINE}@{cell.targets} ({interval}, {words.p_equals(tested.p_value)}).")
    return sentences


def _share(cell: Cell) -> str:
    return f"{100 * cell.fraction:g} % of the data"


def _warnings(report: SweepReport) -> list[str]:
    warnings = [f"{cell.label} on {_share(cell)} failed with {why}" for cell in report.cells for why in cell.failures]
    unseen = [cell for cell in report.cells if len(cell.seeds) + len(cell.failures) < cell.planned]
    if unseen:
        seeds = sum(cell.planned - len(cell.seeds) - len(cell.failures) for cell in unseen)
        warnings.append(f"{len(unseen)} of {len(report.cells)} cells lack {seeds} of their trainings: the same command goes on with them.")
    without = [label for label, chosen in _is_chosen(report).items() if not chosen]
    if without:
        warnings.append(f"{', '.join(without)}: every setting of the grid failed, so that nothing is scored; try others.")
    if any(len(cell.seeds) == 1 and cell.comparison is not None for cell in report.cells):
        warnings.append("A comparison of one seed speaks of that trained model alone: another seed gives another one.")
    return warnings


def _is_chosen(report: SweepReport) -> dict[str, bool]:
    """By label, whether an arm all of whose settings have been tried has one to go on with."""
    labels = dict.fromkeys(tried.label for tried in report.tried)
    own = {label: [tried for tried in report.tried if tried.label == label] for label in labels}
    return {label: any(t.chosen for t in tries) for label, tries in own.items() if all(t.done for t in tries)}


# ---------------------------------------------------------------- out


def write_report(folder: Path, console: Console) -> SweepReport:
    """Writes sweep.json (every figure), sweep.md and sweep.html into a sweep's folder, and prints its table.

    Raises:
        RuntimeError: if a file in it is damaged.
    """
    report = build(folder)
    shown = page(report)
    write_json(folder / "sweep.json", dataclasses.asdict(report))
    (folder / "sweep.md").write_text(words.to_markdown(shown), encoding="utf-8")
    (folder / "sweep.html").write_text(words.to_html(shown), encoding="utf-8")
    print_tables(shown, console)
    console.print(f"report: {folder / 'sweep.html'} (also sweep.md and sweep.json)", soft_wrap=True, highlight=False, markup=False)
    return report


def print_tables(shown: Page, console: Console) -> None:
    """Prints the tables, the summary and the warnings."""
    styled = console.is_terminal
    for section in shown.sections:
        for table in section.tables:
            # In a pipe or a file nothing is left out: lines may be of any length there.
            head, *rows = _lines(_fitting(table, console.width) if styled else table)
            console.print(Text(table.title or section.title, style="bold" if styled else ""))
            for line in (Text(head, style="dim" if styled else ""), *map(Text, rows)):
                console.print(line, soft_wrap=True)
            console.print()
    for sentence in shown.summary:
        console.print(Text(sentence), soft_wrap=not styled)
    for warning in shown.warnings:
        console.print(Text(f"Warning: {warning}", style="yellow" if styled else ""), soft_wrap=not styled)


def _widths(table: Table) -> list[int]:
    return [max(map(cell_len, column)) for column in zip(table.columns, *table.rows, strict=True)]


def _fitting(table: Table, width: int) -> Table:
    for name in _LESS_NEEDED:
        if sum(_widths(table)) + _GAP * (len(table.columns) - 1) > width and name in table.columns:
            n = table.columns.index(name)
            rows = [row[:n] + row[n + 1 :] for row in table.rows]
            left = table.text_columns - (n < table.text_columns)
            table = dataclasses.replace(table, columns=table.columns[:n] + table.columns[n + 1 :], rows=rows, text_columns=left)
    return table


def _lines(table: Table) -> list[str]:
    widths = _widths(table)
    cells = [[_padded(cell, widths[n], n < table.text_columns) for n, cell in enumerate(row)] for row in (table.columns, *table.rows)]
    return [(" " * _GAP).join(row).rstrip() for row in cells]


def _padded(cell: str, width: int, is_text: bool) -> str:
    space = " " * (width - cell_len(cell))
    return cell + space if is_text else space + cell
