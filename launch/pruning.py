"""`stepdown prune`: a model pruned by itself, without a run, or a page that shows what it can do without. Imports no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table as RichTable

from launch import plots
from launch import report_html as words
from launch.hardware import cpu_count
from launch.local import supervise, worker_environment
from launch.report_html import Page, Plot, Section, Table
from train.config import PruneConfig
from train.pruning.requests import MEASURED, Pruned, PruneRequest, Scan

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Of a scan."""
_MEASURED_METHODS = ("wanda", "neuron_taylor", "neuron_activity", "head", "layer")
_PAGE = "scan.html"


def prune(model: str, out: Path, settings: dict[str, Any], texts: Path | None, console: Console, *, scan: bool) -> None:
    """Prunes `model` into `out`, or scans it, and tells what came of it.

    Args:
        model: hub id, folder, .gguf file or package:NAME/FILE.
        out: made where missing; a folder that holds a pruned model or a scan is refused.
        settings: of a `PruneConfig`, those that were given.
        texts: to measure on; a scan, and methods that look at more than the weights, need them.
        console: to tell it on.
        scan: do not prune.

    Raises:
        ValueError: for what the user wrote.
        RuntimeError: if the process failed (its message stands above).
    """
    if (out / MEASURED).exists():
        raise ValueError(f"{out} holds an earlier result ({MEASURED}): give another folder, or remove that")
    config = _settings({**settings, "fraction": FRACTIONS[0]} if scan else settings)
    if scan and not config.makes_zeros:
        raise ValueError(f"--scan goes by kind of matrix, but --method is {config.method}: use magnitude or wanda")
    if scan and config.pattern is not None:
        raise ValueError("--scan tries fractions of its own: leave --pattern out")
    if scan and settings.get("fraction") is not None:
        raise ValueError(f"--scan tries fractions of its own ({', '.join(f'{f:g}' for f in FRACTIONS)}): leave --fraction out")
    if texts is None and (scan or config.method in _MEASURED_METHODS):
        raise ValueError(f"--{'scan' if scan else f'method {config.method}'} is measured on texts: give a file of some with --texts")
    values = config.model_dump(mode="json", exclude_unset=True)
    request = PruneRequest(model, str(out), values, None if texts is None else str(texts), list(FRACTIONS) if scan else [])
    out.mkdir(parents=True, exist_ok=True)
    request.write(out / "request.json")
    status = supervise([sys.executable, "-m", "train.pruning.command", str(out / "request.json")], worker_environment(1, cpu_count()))
    if status:
        raise RuntimeError(f"pruning ended with status {status}")
    found = json.loads((out / MEASURED).read_text(encoding="utf-8"))
    if scan:
        _tell_scan(Scan(**found), model, out, console)
    else:
        _tell(Pruned(**found), out, console, makes_zeros=config.makes_zeros)


def _settings(settings: dict[str, Any]) -> PruneConfig:
    try:
        return PruneConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"--{str(part).replace('_', '-')} " for part in first["loc"] if isinstance(part, str))
        given = f"is {first['input']!r}: " if where else ""
        raise ValueError(f"{where}{given}{first['msg'].removeprefix('Value error, ')}") from None


def _tell(made: Pruned, out: Path, console: Console, *, makes_zeros: bool) -> None:
    table = RichTable(box=None)
    for column in ("Matrix", "Weights", "Zeros"):
        table.add_column(column, justify="left" if column == "Matrix" else "right")
    for kind, (weights, zeros) in made.kinds.items():
        table.add_row(kind, f"{weights:,}", words.percent(zeros / weights))
    console.print(table)
    lost = 1 - made.parameters / made.parameters_before
    console.print(f"{made.parameters:,} parameters of {made.parameters_before:,} ({words.percent(lost)} fewer)", highlight=False)
    size = f"{words.num_bytes(made.file_bytes)} on disk, {words.num_bytes(made.compressed_bytes)} compressed (zlib)"
    note = "; runtimes for dense weights compute zeros as they compute any number" if makes_zeros else ""
    console.print(f"{size}{note}", highlight=False)
    if made.loss is not None and made.loss_before is not None:
        console.print(f"loss on the texts: {made.loss:.3f} nats a token, {made.loss_before:.3f} before", highlight=False)
    console.print(f"the model: {out / 'model'}", soft_wrap=True, highlight=False, markup=False)


def _tell_scan(scan: Scan, model: str, out: Path, console: Console) -> None:
    shown = RichTable(box=None)
    for column in _columns(scan):
        shown.add_column(column, justify="right" if shown.columns else "left")
    for row in _rows(scan):
        shown.add_row(*row)
    console.print(shown)
    console.print(f"loss of the whole model: {scan.dense:.3f} nats a token, {scan.tokens:,} tokens", highlight=False)
    (out / _PAGE).write_text(words.to_html(scan_page(scan, model)), encoding="utf-8")
    console.print(f"the page: {out / _PAGE}", soft_wrap=True, highlight=False, markup=False)


def scan_page(scan: Scan, model: str) -> Page:
    """One plot and one table: loss against the share taken out, a line for each kind of matrix."""
    steps = [0.0, *(100 * fraction for fraction in scan.fractions)]
    lines = [plots.Curve(kind, n, steps, [scan.dense, *losses], marked=True) for n, (kind, losses) in enumerate(scan.losses.items())]
    drawn: Plot = plots.curves("Loss", lines, "nats a token", logarithmic=True, x_label="taken out of one kind of matrix, %")
    text = (
        f"Weights were taken out by {scan.method}, of one kind of matrix at a time, in all layers, without any training after it. The loss "
        f"is the mean over {scan.tokens:,} tokens; the whole model has {scan.dense:.3f}."
    )
    last = max(scan.losses, key=lambda kind: scan.losses[kind][-1])
    summary = f"Most sensitive at {words.percent(scan.fractions[-1])}: {last}, with a loss of {scan.losses[last][-1]:.3f}."
    section = Section("Loss by kind of matrix", [text], [Table(_columns(scan), _rows(scan))], [drawn], [])
    return Page("What it can do without", model, [summary], [], [section])


def _columns(scan: Scan) -> list[str]:
    return ["Matrix", *(words.percent(fraction) for fraction in scan.fractions)]


def _rows(scan: Scan) -> list[list[str]]:
    return [[kind, *(f"{loss:.3f}" for loss in losses)] for kind, losses in scan.losses.items()]
