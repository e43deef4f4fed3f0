"""The report of a run as a page and in the terminal; `launch.ladder` works out its figures.

`stepdown report RUN` writes it again.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from launch import plots
from launch import report_html as words
from launch.ladder import LEVEL, SAMPLES, Report, Rung, Sample
from launch.report_html import Page, Plot, Section, Table, Tile
from train.artifacts import CPU, Checkpoint, Records, write_json

_GAP = 2

# ---------------------------------------------------------------- the page


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the ladder; a line break in its title counts in the terminal only, which drops the highest `rank` first."""

    title: str
    rank: int
    cell: Callable[[Rung], str]


def _speed(batch: str) -> Callable[[Rung], str]:
    return lambda rung: words.rate((rung.measured.examples_per_second or {}).get(batch))


_LADDER = [
    _Column("Rung", 0, lambda r: r.name),
    _Column("Accuracy", 0, lambda r: words.percent(r.accuracy)),
    _Column("95 %\ninterval", 5, lambda r: words.percent_range(r.interval)),
    _Column("Points\nvs\nbefore", 4, lambda r: words.points(r.before.difference) if r.before else words.MISSING),
    _Column("p", 6, lambda r: words.p_value(r.before.p_value) if r.before else words.MISSING),
    _Column("Agrees\nwith teacher", 9, lambda r: words.percent(r.agreement)),
    _Column("Params", 2, lambda r: words.count(r.measured.num_parameters)),
    _Column("Weights", 1, lambda r: words.num_bytes(r.measured.weight_bytes)),
    _Column("Of\nfp32", 7, lambda r: words.percent(r.fp32_ratio)),
    _Column("All\nfiles", 11, lambda r: words.num_bytes(r.measured.total_bytes)),
    _Column("Items/s\nbatch 1", 3, _speed("1")),
    _Column("Items/s\nbatch 32", 8, _speed("32")),
    _Column("Peak\nmemory", 10, lambda r: words.num_bytes(r.measured.peak_memory_bytes)),
]


def page(report: Report) -> Page:
    """The report in words."""
    sections = [
        _ladder_section(report),
        _plots_section(report),
        _teacher_section(report),
        *([_training_section(report)] if report.trained else []),
        *[_pruning_section(name, made) for name, made in report.trained.items() if made.sparsity],
        _cost_section(report),
        *([_memory_section(report)] if report.memory else []),
        *([_samples_section(report)] if report.samples else []),
        _provenance_section(report),
        Section("Configuration", [], [], [], [], yaml.safe_dump(report.config, sort_keys=False, allow_unicode=True), folded=True),
    ]
    title = f"{report.name}: the ladder"
    return Page(title, f"Run folder: {report.run_folder}", report.summary, report.warnings, sections, _tiles(report))


def _tiles(report: Report) -> list[Tile]:
    """What is shipped at a glance: right answers, size, latency, each beside what it started from."""
    first, last = report.rungs[0], report.rungs[-1]
    tiles = [Tile("Accuracy", words.percent(last.accuracy), f"95 % interval {words.percent_range(last.interval)}")]
    if first is not last:
        tiles.append(
            Tile(f"{first.name.capitalize()}'s accuracy", words.percent(first.accuracy), f"on the same {_items(first)} test items")
        )
    if last.measured.weight_bytes is not None:
        of = f"{words.percent(last.fp32_ratio)} of the fp32 file" if last.fp32_ratio is not None else "weights on disk"
        tiles.append(Tile("Size", words.num_bytes(last.measured.weight_bytes), of))
    if (seconds := _item_seconds(last)) is not None:
        before = _item_seconds(first)
        tiles.append(Tile("One item takes", words.milliseconds(seconds), f"{first.name}: {words.milliseconds(before)}" if before else ""))
    return tiles


def _items(rung: Rung) -> str:
    return f"{rung.measured.num_items:,}"


def _item_seconds(rung: Rung) -> float | None:
    rate = (rung.measured.examples_per_second or {}).get("1")
    return 1 / rate if rate else None


def _ladder_section(report: Report) -> Section:
    ladder = Table([" ".join(c.title.split()) for c in _LADDER], [[c.cell(rung) for c in _LADDER] for rung in report.rungs])
    tests = [
        [rung.name, t.against, words.points(t.difference), str(t.gained), str(t.lost), words.p_value(t.p_value), t.reading]
        for rung in report.rungs
        for t in rung.tests
    ]
    columns = ["Rung", "Against", "Points", "Gained", "Lost", "p", f"At {100 * LEVEL:g} %"]
    notes = [f"{rung.name}: {note}" for rung in report.rungs for note in rung.measured.notes]
    runtimes = "; ".join(f"{rung.name} by {rung.measured.runtime} on {rung.measured.device}" for rung in report.rungs)
    num_items = report.rungs[0].measured.num_items
    how = "Wilson's 95 % intervals; exact McNemar tests of each rung against the one before. A dash was not measured."
    tables = [ladder] + ([Table(columns, tests, "Paired tests on the same items", text_columns=2)] if tests else [])
    one_seed = "The tests speak of these items and these trained weights; another seed gives other weights."
    return Section("The ladder", [f"{num_items:,} test items; {how}"], tables, [], [f"Answered: {runtimes}.", one_seed, *notes])


def _plots_section(report: Report) -> Section:
    drawn = [plots.accuracy_against_size([plots.Point(r.name, r.accuracy, r.interval, r.measured.weight_bytes) for r in report.rungs])]
    if any(map(_item_seconds, report.rungs)):
        timed = [plots.Point(r.name, r.accuracy, r.interval, _item_seconds(r)) for r in report.rungs]
        drawn.append(plots.accuracy_against_latency(timed))
    # A trained model has the colour and mark of its rung; one that is no rung has the next free ones.
    names = list(dict.fromkeys([*(rung.name for rung in report.rungs), *report.logs]))
    exact = [curve for name, log in report.logs.items() for curve in _curves(log, {"validation_exact_match": (name, names.index(name))})]
    if exact:
        shown = [dataclasses.replace(curve, values=[100 * value for value in curve.values], marked=True) for curve in exact]
        drawn.append(plots.curves("Validation while training", shown, "exact match, %", logarithmic=False))
    drawn += [plot for name, log in report.logs.items() for plot in _loss_plot(name, log)]
    return Section("Plots", [], [], drawn, [])


def _loss_plot(name: str, log: list[dict[str, float]]) -> list[Plot]:
    kinds = {"loss_label": ("label", 0), "loss_rationale": ("rationale", 1), "loss_soft": ("soft labels", 2)}
    lines = _curves(log, kinds) or _curves(log, {"loss": ("total", 4)})
    lines += [dataclasses.replace(curve, marked=True) for curve in _curves(log, {"validation_loss": ("validation", 3)})]
    return [plots.curves(f"Loss of {name}", lines, "loss, nats a token", logarithmic=True)] if lines else []


def _curves(log: list[dict[str, float]], keys: dict[str, tuple[str, int]]) -> list[plots.Curve]:
    """A curve (label, series) for each key that the log holds; a loss that stays 0 has no weight and is left out."""
    found = []
    for key, (label, series) in keys.items():
        lines = [(int(line["step"]), line[key]) for line in log if key in line]
        if any(value for _, value in lines):
            found.append(plots.Curve(label, series, [step for step, _ in lines], [value for _, value in lines]))
    return found


def _teacher_section(report: Report) -> Section:
    rows = [
        [s.name, *map(words.whole, (s.rows, s.rejected, s.teacher_rows)), _of(s.parseable, s.teacher_rows), _of(s.agreeing, s.teacher_rows)]
        for s in report.splits
    ]
    tables = [Table(["Split", "Rows", "Rejected", "Taught", "Usable label", "Agrees with gold"], rows)]
    if (records := report.records) is not None:
        # A recorded teacher generated nothing here and 0 would read as a measurement.
        seconds = records.seconds if records.generated_tokens else None
        facts = [
            ["Tokens generated", words.count(records.generated_tokens or None)],
            ["Tokens/s", words.rate(records.generated_tokens / seconds if seconds else None)],
            ["Soft-label tokens", words.count(records.soft_label_tokens or None)],
            ["Records on disk", words.num_bytes(records.record_bytes or None)],
            ["Bytes on disk a soft-label token, texts included", words.rate(_bytes_a_soft_token(records))],
            ["Unusable labels", _unusable(records)],
            ["Training rationales written with a hint", _hinted(report, records)],
            ["Samples that agree, mean", _agreement(report, records)],
            ["Sharding", records.sharding],
            ["Tensor degree", str(records.tensor_degree)],
            ["Processes", str(records.processes)],
        ]
        tables.append(Table(["Records", ""], facts))
    if report.written:
        written = [[w.input, w.gold, f"{_mark(w.agrees)} {w.label or words.MISSING}", w.rationale or words.MISSING] for w in report.written]
        title = "What it wrote: the first training rows whose label is the gold one, and the first whose is not"
        tables.append(Table(["Input", "Gold", "Teacher", "Rationale"], written, title, text_columns=4, stacked=True))
    return Section("The teacher's records", [], tables, [], [])


def _teacher_words(report: Report) -> str | None:
    """The teacher's section in a sentence, for the terminal; None where there is nothing to say."""
    if (records := report.records) is None:
        return None
    parts = []
    if records.parseable != records.rows:
        parts.append(f"labels that could not be used: {_unusable(records)}, of {sum(records.rows.values()):,}")
    if _asked(report).get("rationalize"):
        parts.append(f"training rationales written with a hint: {_hinted(report, records)}")
    if _asked(report).get("samples", 1) > 1:
        parts.append(f"samples that agree: {_agreement(report, records)} on average")
    if (size := _bytes_a_soft_token(records)) is not None:
        parts.append(f"soft labels of {records.soft_label_tokens:,} tokens, {words.rate(size)} bytes on disk each with all texts")
    return f"The teacher's records: {'; '.join(parts)}." if parts else None


def _asked(report: Report) -> dict[str, Any]:
    rationales: dict[str, Any] = report.config.get("teacher", {}).get("rationales", {})
    return rationales


def _unusable(records: Records) -> str:
    number = sum(records.rows.values()) - sum(records.parseable.values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(records.unparseable.items()))
    return f"{number:,} ({reasons})" if reasons else f"{number:,}"


def _hinted(report: Report, records: Records) -> str:
    asked = _asked(report).get("rationalize")
    return _of(records.rationalized.get("train"), records.rows.get("train")) if asked else words.MISSING


def _agreement(report: Report, records: Records) -> str:
    samples = _asked(report).get("samples", 1)
    return f"{records.mean_votes:.1f} of {samples}" if samples > 1 else words.MISSING


def _bytes_a_soft_token(records: Records) -> float | None:
    return records.record_bytes / records.soft_label_tokens if records.soft_label_tokens else None


def _of(part: int | None, total: int | None) -> str:
    return f"{words.whole(part)} ({words.percent(part / total)})" if part is not None and total else words.whole(part)


def _training_section(report: Report) -> Section:
    """One column a trained model, one row a fact; counts and validations are those that the checkpoints hold."""
    models = report.trained.values()
    rows = [
        ["Parameters", *(words.count(m.num_parameters) for m in models)],
        ["Weights", *(words.num_bytes(m.weight_bytes) for m in models)],
        ["Steps", *(words.whole(m.steps) for m in models)],
        ["Best step", *(words.whole(m.best_step) for m in models)],
    ]
    for key in dict.fromkeys(key for m in models for key in m.counts):
        if any(m.counts.get(key) for m in models):
            rows.append([_spoken(key), *(words.whole(m.counts.get(key)) for m in models)])
    for key in dict.fromkeys(key for m in models for key in m.validation):
        shown = words.percent if "exact_match" in key else words.decimal
        rows.append([f"Validation {_spoken(key).lower()}", *(shown(m.validation.get(key)) for m in models)])
    rows.append(["Processes", *(str(m.processes) for m in models)])
    rows.append(["Time", *(words.duration(m.seconds) for m in models)])
    return Section("What was trained", [], [Table(["", *report.trained], rows)], [], [])


def _pruning_section(name: str, made: Checkpoint) -> Section:
    """What is 0 in a pruned model's file, by kind of matrix."""
    total, zeros = (sum(counts[n] for counts in made.sparsity.values()) for n in range(2))
    rows = [[kind, words.count(weights), words.percent(out / weights)] for kind, (weights, out) in made.sparsity.items()]
    rows.append(["all matrices", words.count(total), words.percent(zeros / total)])
    size = f"{words.num_bytes(made.weight_bytes)} on disk, {words.num_bytes(made.compressed_bytes)} compressed (zlib)"
    # What was removed is not there to be counted: the number of parameters shows it.
    text = f"{words.count(made.num_parameters)} parameters are left, {size}."
    if zeros:
        text += " Runtimes for dense weights compute zeros as they compute any number: these make no file smaller and no answer faster."
    layers = {layer: out / weights for layer, (weights, out) in made.layer_sparsity.items()}
    drawn = [plots.bars(f"Zeros by layer of {name}", layers, "zeros, % of the layer's matrices")] if any(layers.values()) else []
    return Section(f"What was pruned: {name}", [text], [Table(["Matrix", "Weights", "Zeros"], rows)], drawn, [])


def _spoken(key: str) -> str:
    text = key.removeprefix("validation_").replace("_", " ")
    return text[:1].upper() + text[1:]


def _cost_section(report: Report) -> Section:
    stages = [
        [s.name, s.made, "used again" if s.skipped else "ran", str(s.processes), words.duration(s.seconds or None)] for s in report.stages
    ]
    tables = [Table(["Stage", "Made", "This time", "Processes", "Time"], stages, "Stages", text_columns=3, stacked=True)]
    changed = {rung.name: rung.changed for rung in report.rungs}
    files = [
        [
            *[name, m.runtime, *map(words.num_bytes, (m.weight_bytes, m.total_bytes))],
            *[words.percent(m.weight_bytes / m.source_weight_bytes), _figure(m.bits_a_parameter), _figure(m.bits_a_weight)],
            *[_figure(m.error_nats, 3), words.percent(changed.get(name)), f"{len(m.fallbacks)} matrices" if m.fallbacks else words.MISSING],
        ]
        for name, m in report.deployed.items()
    ]
    if files:
        titles = [
            "Deployed",
            "Runtime",
            "Weights",
            "All files",
            "Of fp32",
            "Bits a parameter",
            "Bits a weight",
            "Error, nats",
            "Changed answers",
            "Other type",
        ]
        tables.append(Table(titles, files, "Files to ship", text_columns=2))
        note = (
            "Bits are read from the file: over all of it, and over the matrices of the layers with their scales. The error is the mean "
            "distance of log-probabilities to the fp32 model's, a token, on training rows. Changed answers are test items that the file "
            "answers otherwise than the student before it was rounded."
        )
        served = [
            [
                rung.name,
                rung.measured.device,
                _seconds(m.load_seconds),
                words.milliseconds(m.first_token_seconds),
                words.milliseconds(m.token_seconds),
            ]
            for rung in report.rungs
            if (m := rung.measured).load_seconds is not None
        ]
        tables.append(Table(["Rung", "Device", "Load", "First token", "Each after it"], served, "Latency of one prompt", text_columns=2))
        return Section("Costs", [f"The stages that ran this time took {words.duration(report.seconds)}.", note], tables, [], [])
    return Section("Costs", [f"The stages that ran this time took {words.duration(report.seconds)}."], tables, [], [])


def _memory_section(report: Report) -> Section:
    """Planned against measured where a stage ran on GPUs; what was measured elsewhere."""
    rows = [
        [
            *[peak.stage, peak.device, peak.layout or words.MISSING, str(peak.processes)],
            *[words.num_bytes(peak.planned_bytes), words.num_bytes(peak.measured_bytes), words.percent(peak.ratio)],
        ]
        for peak in report.memory
    ]
    on_gpu = [peak.device != CPU for peak in report.memory]
    notes = []
    if any(on_gpu):
        notes.append(
            "Planned is what `stepdown plan` counts for the layout that ran, every sequence as long as the configuration lets it be; "
            "measured is the most that torch had allocated. A GPU's CUDA context and NCCL are in neither."
        )
    if not all(on_gpu):
        notes.append(
            "Plans count a GPU's memory. On a CPU there is none to compare: measured is all that the process held, Python and its "
            "libraries included."
        )
    titles = ["Stage", "Device", "Layout", "Processes", "Planned", "Measured", "Of the plan"]
    text = "The most memory of one process while a stage ran, of the process that held most."
    return Section("Memory", [text], [Table(titles, rows, text_columns=3, stacked=True)], [], notes)


def _figure(value: float | None, digits: int = 2) -> str:
    return words.MISSING if value is None else f"{value:.{digits}f}"


def _seconds(value: float | None) -> str:
    return words.MISSING if value is None else f"{value:.1f} s"


def _samples_section(report: Report) -> Section:
    names = [rung.name for rung in report.rungs]
    rows = [
        [sample.input or sample.id, sample.label or words.MISSING, *(_answered(sample, name) for name in names)]
        for sample in report.samples
    ]
    text = f"The first {SAMPLES} test items that {names[-1]} gets right and the first {SAMPLES} that it gets wrong; not chosen by hand."
    return Section("Sample answers", [text], [Table(["Input", "Label", *names], rows, text_columns=2 + len(names), stacked=True)], [], [])


def _answered(sample: Sample, rung: str) -> str:
    answer = sample.answers[rung]
    return f"{_mark(sample.correct[rung])} {words.MISSING if answer is None else answer}"


def _mark(right: bool) -> str:
    return "✓" if right else "✗"


def _provenance_section(report: Report) -> Section:
    facts = _flat(report.provenance)
    command = report.provenance.get("command", "")
    command = shlex.join(map(str, command)) if isinstance(command, list) else str(command)
    rows = [[key, value] for key, value in facts.items() if key != "command"]
    again = "\n".join(line for line in (command, f'stepdown predict {shlex.quote(report.run_folder)} "..."') if line)
    return Section("How it was made", [], [Table(["What", "Value"], rows, text_columns=2)] if rows else [], [], [], again)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    facts: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            facts |= _flat(value, f"{prefix}{key}.")
        else:
            facts[f"{prefix}{key}"] = words.MISSING if value is None else str(value)
    return facts


# ---------------------------------------------------------------- out


def write(report: Report, folder: Path) -> None:
    """Writes report.json (every figure), report.md and report.html (one file that needs no network) into `folder`."""
    shown = page(report)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", dataclasses.asdict(report))
    (folder / "report.md").write_text(words.to_markdown(shown), encoding="utf-8")
    (folder / "report.html").write_text(words.to_html(shown), encoding="utf-8")


def terminal_table(report: Report, console: Console) -> None:
    """Prints the ladder, its summary and its warnings; the least important columns leave where the line is too short."""
    columns = _fitting(report.rungs, console.width)
    styled = console.is_terminal
    style = "bold" if styled else ""
    lined = box.SIMPLE_HEAD if styled else None
    padding = (0, _GAP - 1 if lined else _GAP, 0, 0)  # a box adds a column of its own between two
    table = RichTable(box=lined, padding=padding, pad_edge=False, show_edge=False, header_style=style)
    for column in columns:
        table.add_column(Text(column.title), justify="left" if column is _LADDER[0] else "right", no_wrap=True)
    for rung in report.rungs:
        table.add_row(*(Text(column.cell(rung)) for column in columns))
    console.print(table)
    console.print()
    # In a pipe or a file a sentence stays one line, which can be searched; a terminal gets it broken between words.
    told = _teacher_words(report)
    for sentence in [*report.summary, *([told] if told is not None else [])]:
        console.print(Text(sentence), soft_wrap=not styled)
    for warning in report.warnings:
        console.print(Text(f"Warning: {warning}", style="yellow" if styled else ""), soft_wrap=not styled)


def _fitting(rungs: Sequence[Rung], width: int) -> list[_Column]:
    columns = list(_LADDER)
    while sum(_width(column, rungs) + _GAP for column in columns) - _GAP > width and any(column.rank for column in columns):
        columns.remove(max(columns, key=lambda column: column.rank))
    return columns


def _width(column: _Column, rungs: Sequence[Rung]) -> int:
    return max(cell_len(line) for line in [*column.title.split("\n"), *(column.cell(rung) for rung in rungs)])
