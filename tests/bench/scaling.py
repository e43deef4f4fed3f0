"""How the work spreads over the GPUs of a node: a teacher that writes, and a student that trains.

torchrun --nproc-per-node N -m tests.bench.scaling OUT-N.json                     all cases of N GPUs: 1, 2, 4 or 8
torchrun --nproc-per-node N -m tests.bench.scaling OUT-N.json --cases '8B replica; zero1, weak'
torchrun --nproc-per-node N -m tests.bench.scaling OUT-N.json --tiny              a few seconds on CPUs: does it run
python -m tests.bench.scaling --show OUT-1.json OUT-2.json ...                    one table of all

The product's own code writes (`LoopWriter`; under ZeRO-3 `PlainWriter`) and trains (`train.trainer.train`) models of random weights in
bf16: teachers of Llama-3.1-8B's and 70B's shape, 64 prompts of 256 tokens a copy, 64 new; a student of Llama-3.2-1B's shape on full
forwards of one length, its layers compiled but under ZeRO-3. Weak: every GPU has 2 forwards of 16,384 tokens a step. Strong: 8 of them are
shared out. Tokens/s count all processes: those written, or those a training step reads. `of linear` is against the fewest GPUs that the
same case ran on. The floor of a decoding step reads weights and cache once, at the bandwidth that a copy reaches in the same run.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import tempfile
import time
import traceback
from argparse import Namespace
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM

from launch.architecture import architecture_of
from launch.inference_memory import Inference, decoding_memory
from tests.bench import decoding
from tests.bench.memory import FORM, STUDENT, TEACHER, TINY, Shape, built, in_turn, made_rows, rows_a_forward, train, training
from train import trainer
from train.config import LossConfig, TrainingConfig
from train.engine import place_for_inference, start, stop
from train.teacher.fusing import fuse
from train.world import World

LARGE = Shape(8192, 80, 64, 8, 28672, 128256, False)
SLOTS, PROMPT, NEW = 64, 256, 64
WARM_STEPS, TIMED_STEPS = 2, 5
TOKENS = 16_384
"""Of one forward."""


@dataclass(frozen=True)
class Writing:
    """A teacher, laid out in some way."""

    shape: Shape
    sharding: Literal["replica", "tensor", "zero3"]
    degree: int | None = None
    """tensor: GPUs of a copy; all where None."""
    new: int = NEW


@dataclass(frozen=True)
class Training:
    """A student under a ZeRO stage."""

    zero_stage: int
    forwards: int
    """Of a step: of every GPU, or of all together."""
    shared: bool = False


def cases(gpus: int) -> dict[str, Writing | Training]:
    """Those that so many GPUs can run."""
    found: dict[str, Writing | Training] = {"8B replica": Writing(TEACHER, "replica")}
    if gpus > 1:
        found |= {"8B tensor": Writing(TEACHER, "tensor"), "70B tensor": Writing(LARGE, "tensor")}
    if gpus > 4:
        found |= {"70B tensor over 4": Writing(LARGE, "tensor", 4)}
    if gpus > 2:
        found |= {"70B zero3": Writing(LARGE, "zero3", new=8)}
    for stage in (0, 1, 2, 3):
        found[f"zero{stage}, weak"] = Training(stage, 2)
        found[f"zero{stage}, strong"] = Training(stage, 8, shared=True)
    return found


@dataclass
class Bench:
    world: World
    folder: Path
    tiny: bool
    student: LlamaForCausalLM
    """In fp32 on the CPU; each training takes a copy."""
    bandwidth: float

    def run(self, case: Writing | Training) -> dict[str, Any]:
        return written(self, case) if isinstance(case, Writing) else trained(self, case)


def written(bench: Bench, case: Writing) -> dict[str, Any]:
    """A chunk of prompts for each copy, the second time; then one decoding step alone."""
    cuda = bench.world.device.type == "cuda"
    shape = TINY if bench.tiny else case.shape
    slots, prompt, new = (4, 16, 8) if bench.tiny else (SLOTS, PROMPT, case.new)
    model = built(shape, bench.world.device, torch.bfloat16 if cuda else torch.float32)
    architecture = architecture_of(model.config.to_dict())
    teacher = place_for_inference(model, bench.world, case.sharding, degree=case.degree)
    del model
    rows: list[dict[str, Any]] = []
    options = Namespace(vocabulary=shape.vocabulary, temperature=0.0, profile=False)
    timing = decoding.Bench(bench.world, options, rows, bench.bandwidth)
    work = decoding.Shape(prompt, new)
    if case.sharding == "zero3":
        decoding.plain_writer(timing, teacher, slots, work, "writes")
    else:
        if cuda:
            fuse(teacher.model)
            torch.cuda.empty_cache()
        decoding.loop(timing, teacher, slots, work, "writes")
        decoding.step(timing, teacher, slots, work, "one step")
    degree = {"replica": 1, "tensor": teacher.degree, "zero3": bench.world.size}[case.sharding]
    how = Inference(case.sharding, degree, "bf16" if cuda else "fp32", prompt=prompt, new=new, slots=slots)
    found = {"tokens_per_second": rows[0]["tokens_per_second"], "peak_bytes": int(rows[0]["peak_gib"] * 2**30)}
    found["planned_bytes"] = decoding_memory(architecture, how).allocated
    return found | ({name: rows[1][name] for name in ("step_ms", "floor_ms")} if len(rows) > 1 else {})


def trained(bench: Bench, case: Training) -> dict[str, Any]:
    """A few steps of the one training loop."""
    world, tokens = bench.world, 800 if bench.tiny else TOKENS
    forwards = case.forwards // world.size if case.shared else case.forwards
    batch_size = rows_a_forward(tokens) * forwards * world.size
    off = case.zero_stage == 3 or world.device.type == "cpu"
    settings = training(zero_stage=case.zero_stage, micro_batch_tokens=tokens, compile="off" if off else "layers")
    config = TrainingConfig.model_validate({**settings, "batch_size": batch_size, "epochs": 1, "learning_rate": 1e-5})
    rows = made_rows(batch_size * (WARM_STEPS + TIMED_STEPS + 1), TINY.vocabulary if bench.tiny else STUDENT.vocabulary, top_k=False)
    run = trainer.TrainingRun(rows, rows[:2], FORM, config, LossConfig(), 0, bench.folder, "student", resumable=False)
    ends: list[float] = []
    read = 0

    def watched(engine: Any) -> None:
        step, forward = engine.step, engine.forward

        def timed(*arguments: Any) -> Any:
            found = step(*arguments)
            decoding.synchronize()
            ends.append(time.perf_counter())
            return found

        def counted(*arguments: Any, **batch: Any) -> Any:
            nonlocal read
            read += batch["input_ids"].numel() if len(ends) == WARM_STEPS else 0
            return forward(*arguments, **batch)

        engine.step, engine.forward = timed, counted
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    train(copy.deepcopy(bench.student), run, world, watched)
    between = [after - before for before, after in pairwise(ends)][WARM_STEPS - 1 :]
    seconds = statistics.median(between[:TIMED_STEPS])
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"tokens_per_second": read * world.size / seconds, "step_ms": 1e3 * seconds, "peak_bytes": peak}


def attempted(bench: Bench, name: str, case: Writing | Training) -> dict[str, Any]:
    """A case's row; its failure, out of memory for one, is told in it and leaves the others alone."""
    begun, error, found = time.perf_counter(), "", {}
    try:
        found = bench.run(case)
    except Exception as caught:  # outside of this, where its frames are gone, its tensors are too
        traceback.print_exc()
        error = f"{type(caught).__name__}: {str(caught)[:300]}"
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if bench.world.is_main:
        print(f"{name}: {found.get('tokens_per_second', 0):,.0f} tokens/s, {time.perf_counter() - begun:.0f} s {error}", flush=True)
    return {"case": name, "gpus": bench.world.size, "rank": bench.world.rank, "settings": asdict(case), "error": error, **found}


def show(files: list[Path]) -> None:
    rows = [row for file in files for row in json.loads(file.read_text())["rows"] if row["rank"] == 0 and not row["error"]]
    rows.sort(key=lambda row: (row["case"], row["gpus"]))
    table = Table("case", "GPUs", "tokens/s", "of linear", "step, ms", "floor, ms", "of the floor", "peak, GB", "planned, GB")

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in rows:
        first = next(other for other in rows if other["case"] == row["case"])
        linear = row["tokens_per_second"] / first["tokens_per_second"] * first["gpus"] / row["gpus"]
        step, floor, planned = (row.get(name) for name in ("step_ms", "floor_ms", "planned_bytes"))
        share = floor / step if step and floor else None
        against = f"{planned / 1e9:.1f} ({planned / row['peak_bytes'] - 1:+.1%})" if planned and row["peak_bytes"] else ""
        numbers = f"{row['tokens_per_second']:,.0f}", f"{linear:.1%}", cell(step, ".2f"), cell(floor, ".2f"), cell(share, ".0%")
        table.add_row(row["case"], str(row["gpus"]), *numbers, f"{row['peak_bytes'] / 1e9:.1f}", against)
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--cases", default="", help="names with a semicolon between them; all where left out")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--show", nargs="+", type=Path, help="files that runs wrote")
    options = parser.parse_args()
    if options.show:
        show(options.show)
        return
    assert options.out is not None, "where to?"
    world = start()
    known = cases(world.size)
    asked = [name.strip() for name in options.cases.split(";")] if options.cases else list(known)
    limits = decoding.Bench(world, options, [])
    decoding.ceilings(limits)
    with tempfile.TemporaryDirectory() as folder:
        student = built(TINY if options.tiny else STUDENT, world.device, torch.float32).to("cpu")
        bench = Bench(world, Path(folder), options.tiny, student, limits.bandwidth)
        in_turn(asked, lambda name: attempted(bench, name, known[name]), world, options.out)
    if world.is_main:
        show([options.out])
    stop()


if __name__ == "__main__":
    main()
