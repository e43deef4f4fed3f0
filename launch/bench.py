"""What serving each rung of a run takes on this machine: rungs in turn, each time in a fresh process, medians. Imports no torch."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from launch.hardware import cpu_count
from launch.local import worker_environment
from launch.rundir import read_stages
from train.artifacts import ARTIFACT, write_json
from train.evaluate import REQUEST, EvalRequest, command
from train.progress import StageProgress
from train.runtimes import Device, model_bytes
from train.serving import Latency, Serving

RESULT = "bench.json"
_WEIGHTS = "Weights\nMB"
_COLUMNS = {
    _WEIGHTS: 1,
    "Load\ns": 2,
    "1st token\nms": 1,
    "then\ntokens/s": 1,
    "batch 1\nitems/s": 2,
    "batch 32\nitems/s": 2,
    "Memory\nMB": 0,
}
"""With the digits after the point."""
Time = Callable[[EvalRequest], Serving]


@dataclass(frozen=True, slots=True)
class Served:
    """A rung's medians over the rounds."""

    rung: str
    runtime: str
    device: str
    weight_bytes: int
    load_seconds: float
    first_token_seconds: float
    token_seconds: float | None
    """Each token after the first; None where no answer has a second one."""
    examples_per_second: dict[str, float]
    """By batch size."""
    peak_memory_bytes: int | None
    rounds: int


def bench(
    folder: Path, rungs: Sequence[str], *, rounds: int, threads: int, device: Device | None, console: Console, time: Time | None = None
) -> list[Served]:
    """Measures, prints a table, and writes `bench.json` into the run's folder.

    Args:
        folder: of the run.
        rungs: which; all that a model serves where empty.
        rounds: how often each is measured; odd numbers have a median of their own.
        threads: of the CPU; 0: all that this process may use.
        device: instead of the one of each evaluation.
        console: gets the table.
        time: measures one; a fresh process where left out.

    Raises:
        ValueError: if the run has no such rung, or none that a model serves.
        RuntimeError: if a rung could not be served.
    """
    requests = {name: request for name, request in _requests(folder).items() if request.runtime != "records"}
    if not requests:
        raise ValueError(f"{folder} has no evaluated model yet: run `stepdown run` with its configuration first")
    for rung in rungs:
        if rung not in requests:
            raise ValueError(f"--rung is {rung}, but {folder} has {', '.join(requests)}")
    chosen = {name: requests[name] for name in rungs or requests}
    found: dict[str, list[Serving]] = {name: [] for name in chosen}
    with StageProgress("bench", rounds * len(chosen), "measurements") as progress:
        for _ in range(rounds):
            for name, request in chosen.items():
                asked = replace(request, threads=threads, device=device or request.device)
                found[name].append((time or _in_a_process(folder))(asked))
                progress.advance(1, name)
    served = [_served(chosen[name], of) for name, of in found.items()]
    write_json(folder / RESULT, {"threads": threads or cpu_count(), "rungs": [asdict(row) for row in served]})
    console.print(_table(served))
    console.print(f"medians of {rounds} rounds, {threads or 'all'} CPU threads; in JSON: {folder / RESULT}", soft_wrap=True)
    return served


def _requests(folder: Path) -> dict[str, EvalRequest]:
    stages = {name: path for name, path in read_stages(folder).items() if name.startswith("evaluate.") and (path / ARTIFACT).is_file()}
    found = {name.partition(".")[2]: path / REQUEST for name, path in stages.items()}
    return {rung: EvalRequest.read(path) for rung, path in found.items() if path.is_file()}


def _in_a_process(folder: Path) -> Time:
    request_path, out = folder / ".bench-request.json", folder / ".bench-serving.json"

    def time(request: EvalRequest) -> Serving:
        request.write(request_path)
        try:
            fixed = {"OMP_NUM_THREADS": str(request.threads)} if request.threads else {}
            environment = worker_environment(1, cpu_count(), request.device) | fixed
            done = subprocess.run(command(request_path, out), stderr=subprocess.PIPE, text=True, check=False, env=environment)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"its process ended with status {done.returncode}"]
                raise RuntimeError(f"{request.rung}: {lines[-1].removeprefix('error: ')}")
            values = json.loads(out.read_text())
        finally:
            request_path.unlink(missing_ok=True)
            out.unlink(missing_ok=True)
        return Serving(**{**values, "latency": Latency(**values["latency"]), "notes": tuple(values["notes"])})

    return time


def _served(request: EvalRequest, found: Sequence[Serving]) -> Served:
    latencies = [serving.latency for serving in found if serving.latency is not None]
    rates: list[Mapping[str, float]] = [serving.examples_per_second or {} for serving in found]
    tokens = [latency.token_seconds for latency in latencies if latency.token_seconds is not None]
    peaks = [serving.peak_memory_bytes for serving in found if serving.peak_memory_bytes is not None]
    assert request.model_folder is not None
    return Served(
        rung=request.rung,
        runtime=request.runtime,
        device=found[0].device,
        weight_bytes=model_bytes(Path(request.model_folder))[0],
        load_seconds=statistics.median(serving.load_seconds or 0.0 for serving in found),
        first_token_seconds=statistics.median(latency.first_token_seconds for latency in latencies),
        token_seconds=statistics.median(tokens) if tokens else None,
        examples_per_second={size: statistics.median(rate[size] for rate in rates) for size in rates[0]},
        peak_memory_bytes=int(statistics.median(peaks)) if peaks else None,
        rounds=len(found),
    )


def _table(served: Sequence[Served]) -> Table:
    """In parentheses, how it compares with the last rung that transformers serves: the student in fp32, of which the files are made."""
    base = next((row for row in reversed(served) if row.runtime == "transformers"), None)
    table = Table(Column("Rung", overflow="fold"), *_COLUMNS, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for row in served:
        before = dict.fromkeys(_COLUMNS) if base is None or base is row else dict(zip(_COLUMNS, _figures(base), strict=True))
        cells = [_told(name, value, before[name]) for name, value in zip(_COLUMNS, _figures(row), strict=True)]
        table.add_row(row.rung, *cells)
    return table


def _figures(row: Served) -> list[float | None]:
    """In the order of the columns."""
    return [
        row.weight_bytes / 1e6,
        row.load_seconds,
        1000 * row.first_token_seconds,
        1 / row.token_seconds if row.token_seconds else None,
        *(row.examples_per_second[size] for size in ("1", "32")),
        row.peak_memory_bytes / 1e6 if row.peak_memory_bytes else None,
    ]


def _told(column: str, value: float | None, base: float | None) -> str:
    if value is None:
        return "-"
    text = f"{value:,.{_COLUMNS[column]}f}"
    if not base:
        return text
    return f"{text}\n({value / base:.1%})" if column == _WEIGHTS else f"{text}\n({value / base:.2g}x)"
