"""`stepdown quantize`: files to ship made of any transformers model, without a run. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch import report_html as words
from launch.hardware import cpu_count
from launch.local import supervise, worker_environment
from train.artifacts import ARTIFACT, DeployedModel
from train.deploy.request import QuantizeRequest
from train.deploy.targets import TARGETS


def quantize(model: str, out: Path, targets: Sequence[str], texts: Path, console: Console) -> None:
    """Makes `out/TARGET/model` for each target, and tells what each is.

    Args:
        model: hub id, folder, .gguf file or package:NAME/FILE.
        out: made where missing; a target that is there already is not made again.
        targets: some of `TARGETS`.
        texts: to calibrate and verify on.
        console: to tell it on.

    Raises:
        ValueError: for what the user wrote.
        RuntimeError: if a target was not made (its message stands above); the others are made.
    """
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"--target is {target}: give one of {', '.join(TARGETS)}")
    wanted = list(dict.fromkeys(targets))
    left = [target for target in wanted if not (out / target / ARTIFACT).exists()]
    asked = QuantizeRequest(model, left, str(texts), str(out))
    earlier = out / "request.json"
    if earlier.is_file() and (other := QuantizeRequest.read(earlier).model) != model:
        raise ValueError(f"{out} holds files of another model ({other}): give another folder")
    out.mkdir(parents=True, exist_ok=True)
    asked.write(earlier)
    command = [sys.executable, "-m", "train.deploy.command", str(earlier)]
    status = supervise(command, worker_environment(1, cpu_count())) if left else 0
    made = [target for target in wanted if (out / target / ARTIFACT).exists()]
    if made:
        table = Table(box=None)
        for column in ("Target", "Weights", "Of fp32", "Bits a parameter", "Bits a weight", "Error, nats a token"):
            table.add_column(column, justify="right" if table.columns else "left", no_wrap=not table.columns)
        for target in made:
            table.add_row(*_row(DeployedModel.read(out / target)))
        console.print(table)
        console.print(f"the models: {out}/TARGET/model", soft_wrap=True, highlight=False, markup=False)
    if status:
        raise RuntimeError(f"quantizing ended with status {status}")


def _row(made: DeployedModel) -> list[str]:
    figures = [f"{value:.2f}" if value is not None else "-" for value in (made.bits_a_parameter, made.bits_a_weight)]
    error = f"{made.error_nats:.3f}" if made.error_nats is not None else "-"
    return [made.target, words.num_bytes(made.weight_bytes), words.percent(made.weight_bytes / made.source_weight_bytes), *figures, error]
