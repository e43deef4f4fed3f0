"""What serving each rung of a run takes on this machine: rungs in turn, each time in a fresh process, medians. Imports no torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from launch.hardware import cpu_count
from launch.local import worker_environment
from launch.pipeline import PRUNED, TASK
from launch.rundir import locked, read_stages
from train.artifacts import ARTIFACT, write_json
from train.cores import usual_threads
from train.evaluate import REQUEST, EvalRequest, command
from train.progress import StageProgress
from train.runtimes import Device, device_for, model_bytes
from train.serving import Latency, Serving
from train.told import run_told

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
    folder: Path, rungs: Sequence[str], *, rounds: int, threads: int, device: Device, console: Console, time: Time | None = None
) -> list[Served]:
    """Measures, prints a table, and writes `bench.json` into the run's folder.

    Args:
        folder: of the run.
        rungs: which; all that a model serves where empty.
        rounds: how often each is measured; odd numbers have a median of their own.
        threads: of the CPU; 0: OMP_NUM_THREADS, or all that this process may use.
        device: where (`train.runtimes.device_for`).
        console: gets the table.
        time: measures one; a fresh process where left out.

    Raises:
        ValueError: if the run has no such rung, or none that a model serves.
        RuntimeError: if a rung could not be served (the others are told and written), or something else writes to this run.
    """
    requests = _requests(folder)
    if not requests:
        raise ValueError(f"{folder} has no evaluated model yet: run `stepdown run` with its configuration first")
    for rung in rungs:
        if rung not in requests:
            raise ValueError(f"--rung is {rung}, but {folder} has {', '.join(requests)} (a teacher's records are not served)")
    threads = threads or usual_threads()
    chosen = {name: request for name, request in requests.items() if name in (rungs or requests)}
    found: dict[str, list[Serving]] = {name: [] for name in chosen}
    lost: dict[str, str] = {}
    with locked(folder), StageProgress("bench", rounds * len(chosen), "measurements") as progress:
        for _ in range(rounds):
            for name, request in chosen.items():
                if name in lost:
                    continue
                asked = replace(request, threads=threads, device=device_for(request.runtime, device))
                try:
                    found[name].append((time or _in_a_process)(asked))
                except RuntimeError as error:
                    lost[name] = f"{name}: {error}"
                progress.advance(1, name)
        served = [_served(chosen[name], of) for name, of in found.items() if name not in lost]
        write_json(folder / RESULT, {"threads": threads, "rungs": [asdict(row) for row in served]})
    base = next((name for name, request in reversed(requests.items()) if request.runtime == "transformers"), None)
    console.print(_table(served, next((row for row in served if row.rung == base), None)))
    places = ", ".join(f"{place}: {' '.join(row.rung for row in served if row.device == place)}" for place in {r.device: 0 for r in served})
    console.print(f"medians of {rounds} rounds, {threads} CPU threads; {places}; in JSON: {folder / RESULT}", soft_wrap=True)
    if lost:
        raise RuntimeError("; ".join(lost.values()))
    return served


def _requests(folder: Path) -> dict[str, EvalRequest]:
    """How each rung that a model serves was evaluated, in the order of the ladder, with paths as they are now."""
    stages = read_stages(folder)
    made: dict[str, EvalRequest] = {}
    for name, place in stages.items():
        rung = name.partition(".")[2]
        if not name.startswith("evaluate.") or not (place / ARTIFACT).is_file() or not (place / REQUEST).is_file():
            continue
        request = EvalRequest.read(place / REQUEST)
        model = stages.get(f"deploy.{rung}") or (stages["prune"] if rung == PRUNED else stages.get(f"train.{rung}"))
        if model is not None and request.runtime != "records":
            made[rung] = replace(request, model_folder=str(model / "model"), task_folder=str(stages[TASK]))
    return made


def _in_a_process(request: EvalRequest) -> Serving:
    with TemporaryDirectory() as place:
        asked, out = Path(place) / REQUEST, Path(place) / "serving.json"
        request.write(asked)
        environment = worker_environment(1, cpu_count(), request.device) | {"OMP_NUM_THREADS": str(request.threads)}
        run_told(command(asked, out), "its process", environment)
        values = json.loads(out.read_text())
    return Serving(**{**values, "latency": Latency(**values["latency"]), "notes": tuple(values["notes"])})


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


def _table(served: Sequence[Served], base: Served | None) -> Table:
    """In parentheses, how a rung compares with `base` where both ran on the same kind of device."""
    table = Table(Column("Rung", overflow="fold"), *_COLUMNS, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for row in served:
        is_compared = base is not None and base is not row and base.device == row.device
        before = dict(zip(_COLUMNS, _figures(base), strict=True)) if base is not None and is_compared else dict.fromkeys(_COLUMNS)
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
    times = value / base
    return f"{text}\n({times:.1%})" if column == _WEIGHTS else f"{text}\n({times:{'.0f' if times >= 10 else '.2g'}}x)"
