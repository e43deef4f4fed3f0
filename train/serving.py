"""What serving a model takes: loading, latency, rates and memory, in the process that serves it. Imports no torch.

load (timed) -> answer once each -> items a second at batch 1 and 32 -> latency prompt by prompt -> the peak of memory
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from data.prompts import Part
from train.cores import usual_threads
from train.progress import StageProgress
from train.runtimes import Device, Runtime, RuntimeKind, answers, open_runtime

TIMED_BATCH_SIZES = (1, 32)
TIMED_PROMPTS = 32
"""Most prompts whose latency is measured."""
TIMED_SECONDS = 20.0
"""Timing at one batch size stops after this long, also before `timed_examples` are done: a slow teacher would take many minutes."""


@dataclass(frozen=True, slots=True)
class Latency:
    """What one user waits for, one prompt at a time; means over the timed prompts."""

    first_token_seconds: float
    """Until the first token is there: the prompt is read, and one token chosen."""
    token_seconds: float | None
    """Each token after it; None where no answer has a second one."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What serving the model took; all None where none was run."""

    device: str = "none"
    load_seconds: float | None = None
    examples_per_second: dict[str, float] | None = None
    peak_memory_bytes: int | None = None
    latency: Latency | None = None
    notes: tuple[str, ...] = ()


def load(
    kind: RuntimeKind, folder: Path, *, device: Device = "auto", dtype: Literal["float32", "bfloat16"] = "float32", threads: int = 0
) -> tuple[Runtime, float]:
    """Opens a model, and says how many seconds that took.

    Args:
        kind: what loads it.
        folder: of the model.
        device: where to.
        dtype: of the transformers runtime's arithmetic.
        threads: of the CPU; 0: OMP_NUM_THREADS, or all that this process may use.

    Raises:
        ValueError, RuntimeError: see `train.runtimes.open_runtime`.
    """
    begin = time.perf_counter()
    runtime = open_runtime(kind, folder, device=device, dtype=dtype, threads=threads or usual_threads())
    return runtime, time.perf_counter() - begin


def measure(runtime: Runtime, inputs: Sequence[str], part: Part, *, max_new_tokens: int, load_seconds: float, title: str) -> Serving:
    """Times a loaded model, then reads the peak of its memory.

    Args:
        runtime: the model.
        inputs: as the task gives them; at least one.
        part: what is asked for.
        max_new_tokens: most tokens of one answer.
        load_seconds: what `load` took.
        title: of the progress line.
    """
    rates = {}
    for size in TIMED_BATCH_SIZES:
        answer = partial(answers, runtime, part=part, batch_size=size, max_new_tokens=max_new_tokens)
        # A line each: what one size takes tells nothing of the other.
        with StageProgress(f"{title}, batch {size}", len(inputs), "items", most_seconds=TIMED_SECONDS) as progress:
            rates[str(size)] = _rate(answer, inputs, size, progress)
    prompts = [runtime.format.prompt_ids(part, text, runtime.encode)[0] for text in inputs[:TIMED_PROMPTS]]
    latency = _latency(runtime, prompts, max_new_tokens)
    if runtime.device == "cpu":
        return Serving(runtime.device, load_seconds, rates, peak_resident_bytes(), latency)
    peak = runtime.peak_device_bytes()
    notes = () if peak is not None else ("peak memory is unknown: this engine does not tell how much GPU memory it holds",)
    return Serving(runtime.device, load_seconds, rates, peak, latency, notes)


def _latency(runtime: Runtime, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Latency:
    first = rest = 0.0
    tokens = done = 0
    begin = time.perf_counter()
    for prompt in prompts:
        start = time.perf_counter()
        runtime.answer([prompt], 1)
        between = time.perf_counter()
        written = runtime.answer([prompt], max_new_tokens)[0]
        end = time.perf_counter()
        first, rest, done = first + between - start, rest + (end - between) - (between - start), done + 1
        tokens += min(len(written), max_new_tokens - 1)  # an end of sequence is computed, too
        if end - begin > TIMED_SECONDS:
            break
    return Latency(first / done, max(0.0, rest) / tokens if tokens else None)


def _rate(answer: Callable[[Sequence[str]], list[str]], inputs: Sequence[str], batch_size: int, progress: StageProgress) -> float:
    """Examples answered a second, tokenizing included; batches in the order of the test split, as a server would meet them."""
    answer(inputs[:batch_size])  # warm-up
    done, begin = 0, time.perf_counter()
    while done < len(inputs) and time.perf_counter() - begin < TIMED_SECONDS:
        batch = inputs[done : done + batch_size]
        answer(batch)
        done += len(batch)
        progress.advance(len(batch))
    return done / (time.perf_counter() - begin)


def peak_resident_bytes() -> int:
    """Most memory that this process has held, from the kernel."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # a system without /proc may still have it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
