"""Tokens a second of every way to decode, in one run on one shape of model, and what the memory would allow.

torchrun --nproc-per-node 2 tests/bench/decoding.py                                      all routes, Llama-3.1-8B's shape, two GPUs
torchrun --nproc-per-node 1 tests/bench/decoding.py --routes loop step --layers 4        some of them, fewer layers
torchrun --nproc-per-node 1 tests/bench/decoding.py --tiny                               a few seconds on a CPU: does it run

Weights are random, in bf16, so every row writes as many tokens as it may. Times are of the second call of each route, from the first
prompt to the last token, the prefill included; tokens/s count all processes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from data.examples import TaskExample
from train import engine
from train.engine import InferenceModel, place_for_inference, start, stop
from train.teacher.decode import LoopWriter
from train.teacher.fusing import fuse
from train.teacher.generate import Decoding, PlainWriter
from train.teacher.trial import reason_against
from train.teacher.writing import Request, Sampling
from train.tokenization import text_format, train_tokenizer
from train.world import World

ROUTES = ("plain", "static", "loop", "step", "prefix", "tensor", "zero3")


@dataclass(frozen=True)
class NoPrompts:
    """The bench makes its requests itself."""

    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def request(self, example: TaskExample, hint: str | None, key: int) -> Request:
        raise AssertionError("not used")


@dataclass(frozen=True)
class Shape:
    prompt: int
    new: int
    shared: int = 0


@dataclass
class Bench:
    world: World
    options: argparse.Namespace
    rows: list[dict[str, Any]]
    bandwidth: float = 0.0
    matmul: float = 0.0

    def add(self, route: str, batch: int, shape: Shape, tokens: int, seconds: float, **more: Any) -> None:
        slowest = torch.tensor([seconds], dtype=torch.float64, device=self.world.device)
        total = torch.tensor([tokens], dtype=torch.float64, device=self.world.device)
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        if self.world.size > 1:
            distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
            distributed.all_reduce(total)
        row = {"route": route, "batch": batch, "prompt": shape.prompt, "new": shape.new, "seconds": float(slowest)}
        self.rows.append({**row, "tokens_per_second": float(total / slowest), "peak_gib": peak, **more})
        if self.world.is_main:
            print(json.dumps(self.rows[-1]), flush=True)


def build(options: argparse.Namespace, device: torch.device) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=options.width * 7 // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // options.head,
        num_key_value_heads=max(1, options.width // options.head // 4),
        head_dim=options.head,
        vocab_size=options.vocabulary,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], world: World, repeat: int = 2) -> float:
    """Seconds of the last of `repeat` calls."""
    seconds = 0.0
    for turn in range(repeat):
        synchronize()
        world.barrier()
        if turn == repeat - 1 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        work()
        synchronize()
        seconds = time.perf_counter() - begun
    return seconds


def ceilings(bench: Bench) -> None:
    """What the card moves and multiplies: the two limits."""
    if not torch.cuda.is_available():
        bench.bandwidth, bench.matmul = 1e10, 1e11
        return
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for work, amount, name in ((lambda: target.copy_(source), 2 * source.numel(), "bandwidth"), (lambda: a @ b, 2 * 8192**3, "matmul")):
        seconds = []
        for _ in range(13):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            work()
            events[1].record()
            torch.cuda.synchronize()
            seconds.append(events[0].elapsed_time(events[1]) / 1e3)
        setattr(bench, name, amount / sorted(seconds[3:])[5])


def prompts(num: int, shape: Shape, vocabulary: int, rank: int) -> list[Request]:
    generator = torch.Generator().manual_seed(rank)
    shared = torch.randint(5, vocabulary, (shape.shared,), generator=torch.Generator().manual_seed(99)).tolist()
    own = torch.randint(5, vocabulary, (num, shape.prompt - shape.shared), generator=generator).tolist()
    return [Request(key=n, ids=(*shared, *ids)) for n, ids in enumerate(own)]


def decoding(options: argparse.Namespace, shape: Shape) -> Decoding:
    tokenizer = train_tokenizer(["one two three"], 300)
    form = text_format(tokenizer, "decoder_only", max_input_tokens=8192, max_label_tokens=8, max_rationale_tokens=8)
    return Decoding(form, tokenizer, (), options.vocabulary, shape.new, Sampling(options.temperature), ())


def loop(bench: Bench, teacher: InferenceModel, batch: int, shape: Shape, name: str) -> None:
    requests = prompts(batch, shape, bench.options.vocabulary, teacher.group_rank)
    writer = LoopWriter(teacher, decoding(bench.options, shape), NoPrompts(), batch_size=batch)
    seconds = timed(lambda: list(writer.write([(0, requests)])), bench.world)
    tokens = batch * shape.new if teacher.is_writer else 0
    bench.add(name, batch, shape, tokens, seconds)
    writer.close()


@contextmanager
def own_settings(model: Any, **settings: Any) -> Iterator[GenerationConfig]:
    before = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=0, **settings)
    try:
        yield model.generation_config
    finally:
        model.generation_config = before


def plain(bench: Bench, teacher: InferenceModel, batch: int, shape: Shape, name: str, **settings: Any) -> None:
    requests = prompts(batch, shape, bench.options.vocabulary, teacher.group_rank)
    ids = torch.tensor([request.ids for request in requests], device=bench.world.device)
    mask = torch.ones_like(ids)

    def work() -> Tensor:
        return teacher.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=shape.new, do_sample=False, synced_gpus=teacher.in_step, **settings
        )

    with own_settings(teacher.model), torch.no_grad():
        seconds = timed(work, bench.world, 3 if settings else 2)
    bench.add(name, batch, shape, batch * shape.new if teacher.is_writer else 0, seconds)
    torch.cuda.empty_cache()


def plain_writer(bench: Bench, teacher: InferenceModel, batch: int, shape: Shape, name: str) -> None:
    """The product's own writer where it takes plain `generate` (ZeRO-3)."""
    requests = prompts(batch, shape, bench.options.vocabulary, teacher.group_rank)
    writer = PlainWriter(teacher, decoding(bench.options, shape), NoPrompts(), batch_size=batch)
    seconds = timed(lambda: list(writer.write([(0, requests)])), bench.world)
    bench.add(name, batch, shape, batch * shape.new, seconds)


def step(bench: Bench, teacher: InferenceModel, batch: int, shape: Shape, name: str) -> None:
    """One decoding step alone, half of the new tokens written, against its memory floor: weights and cache read once."""
    requests = prompts(batch, shape, bench.options.vocabulary, teacher.group_rank)
    writer = LoopWriter(teacher, decoding(bench.options, shape), NoPrompts(), batch_size=batch)
    next(writer.write([(0, requests)]))  # fills the cache and captures the step
    slots = writer._slots
    assert slots is not None
    slots.lengths.fill_(shape.prompt - shape.shared + shape.new // 2)
    run = slots._graphs[batch]
    seconds = timed(lambda: [run() for _ in range(20)], bench.world) / 20
    own = batch * (shape.prompt - shape.shared + shape.new // 2) + (shape.shared if slots.prefix else 0)
    parameters = sum(p.numel() for p in teacher.model.parameters()) - teacher.model.get_input_embeddings().weight.numel()
    cache = own * slots.cache.bytes_per_token
    floor = (2 * parameters + cache) / bench.bandwidth
    bench.add(name, batch, shape, batch if teacher.is_writer else 0, seconds, step_ms=seconds * 1e3, floor_ms=floor * 1e3)
    if bench.options.profile and torch.cuda.is_available():
        _profile(run)
    writer.close()


def _profile(run: Callable[[], None]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)[:14]
    for event in found:
        print(f"  {event.self_device_time_total / 5e3:7.3f} ms  {event.count // 5:5d} x  {event.key[:100]}")


def report(bench: Bench) -> None:
    table = Table(title=f"bandwidth {bench.bandwidth / 1e12:.2f} TB/s, bf16 matmul {bench.matmul / 1e12:.0f} TFLOP/s")
    for column in ("route", "batch", "prompt", "new", "tokens/s", "seconds", "peak GiB", "step / floor ms"):
        table.add_column(column, justify="left" if column == "route" else "right")
    for row in bench.rows:
        ratio = f"{row['step_ms']:.2f} / {row['floor_ms']:.2f}" if "step_ms" in row else ""
        numbers = f"{row['tokens_per_second']:,.0f}", f"{row['seconds']:.3f}", f"{row['peak_gib']:.1f}"
        table.add_row(row["route"], str(row["batch"]), str(row["prompt"]), str(row["new"]), *numbers, ratio)
    Console(width=120).print(table)


def baselines(bench: Bench, teacher: InferenceModel, near: Shape, few_shot: Shape) -> None:
    """The model's own `generate`, its layers as they came."""
    options = bench.options
    if "plain" in options.routes:
        for batch in options.batches:
            plain(bench, teacher, batch, near, "plain generate")
        if "prefix" in options.routes:
            plain(bench, teacher, options.batches[0], few_shot, "plain generate, same prompts")
    if "static" in options.routes:
        plain(bench, teacher, options.batches[0], near, "static cache generate", cache_implementation="static")


def run(bench: Bench) -> None:
    options = bench.options
    routes = options.routes
    near, few_shot = Shape(options.prompt, options.new), Shape(options.shared + options.own, 2 * options.new, options.shared)
    if {"plain", "static", "loop", "step", "prefix"} & set(routes):
        teacher = place_for_inference(build(options, bench.world.device), bench.world, "replica")
        baselines(bench, teacher, near, few_shot)
        fuse(teacher.model)
        if bench.world.is_main:
            print("against the loop:", reason_against(teacher), flush=True)
        for batch in options.batches:
            if "loop" in routes:
                loop(bench, teacher, batch, near, "loop")
            if "step" in routes:
                step(bench, teacher, batch, near, "loop, one step")
        if "prefix" in routes:
            loop(bench, teacher, options.batches[0], few_shot, "loop, shared prefix")
            step(bench, teacher, options.batches[0], few_shot, "loop, shared prefix, one step")
        del teacher
    if "tensor" in routes:
        tensor(bench, near)
    if "zero3" in routes:
        zero3(bench, near)


def tensor(bench: Bench, shape: Shape) -> None:
    """DeepSpeed's AutoTP over all processes, by plain `generate` and by the loop."""
    teacher = place_for_inference(build(bench.options, bench.world.device), bench.world, "tensor")
    batch = bench.options.batches[0]
    plain(bench, teacher, batch, shape, "tensor, plain generate")
    fuse(teacher.model)
    reason = reason_against(teacher)
    if bench.world.is_main:
        print("against the loop, tensor:", reason, flush=True)
    loop(bench, teacher, batch, shape, "tensor, loop")
    step(bench, teacher, batch, shape, "tensor, loop, one step")


def zero3(bench: Bench, shape: Shape) -> None:
    """ZeRO-3 gathered matrix by matrix, as it comes, by plain `generate`; and as the product places it, by its own writer."""
    batch = bench.options.batches[0]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    by_layer, engine._gather_by_layer = engine._gather_by_layer, lambda *_: None
    teacher = place_for_inference(build(bench.options, bench.world.device), bench.world, "zero3")
    engine._gather_by_layer = by_layer
    plain(bench, teacher, batch, shape, "zero3, plain generate")
    del teacher
    teacher = place_for_inference(build(bench.options, bench.world.device), bench.world, "zero3")
    plain_writer(bench, teacher, batch, shape, "zero3, this writer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--temperature", type=float, default=0.0)
    for name, value in {"layers": 32, "width": 4096, "head": 128, "vocabulary": 128256, "prompt": 256, "new": 64, "shared": 1024}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--own", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    options = parser.parse_args()
    if options.tiny:
        vars(options).update(layers=2, width=64, head=8, vocabulary=512, prompt=16, new=8, shared=64, own=8, batches=[4, 6])
    world = start()
    bench = Bench(world, options, [])
    ceilings(bench)
    run(bench)
    if world.is_main:
        report(bench)
    stop()


if __name__ == "__main__":
    main()
