"""How fast a teacher scores, as a share of what the device multiplies, and how much memory it takes beside the weights.

python tests/bench/scoring.py                              Llama-3.1-8B's shape, bf16, one GPU; run it from the repository's root
python tests/bench/scoring.py --layers 8 --largest torch   fewer layers, and torch's own top-k
python tests/bench/scoring.py --profile                    the kernels that take longest
python tests/bench/scoring.py --tiny                       a few seconds on a CPU: does it run

Weights are random. Each line is the median of three calls after one to warm up, from the token ids to numbers on the host. Arithmetic is
counted as done: two operations a weight and token, the output embedding at scored tokens only, and attention's lower triangle.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from data.config import SoftLabelsConfig
from data.prompts import TextFormat
from train.engine import InferenceModel, place_for_inference
from train.teacher import distributions
from train.teacher.fusing import fuse
from train.teacher.score import Scorer, Solution, auto_batch_tokens
from train.world import World

REPEATS = 3


@dataclass(frozen=True)
class Case:
    name: str
    soft: SoftLabelsConfig
    scored: int
    """Tokens at the end of each sequence that get a soft label."""


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch-tokens", type=int, default=0, help="tokens of a forward; chosen from the free memory where left out")
    parser.add_argument("--largest", choices=("blocks", "torch"), default="blocks", help="how the k largest logits are found")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def built(options: argparse.Namespace, device: torch.device) -> LlamaForCausalLM:
    width, neurons, heads, kv, vocabulary = (64, 128, 4, 2, 1000) if options.tiny else (4096, 14336, 32, 8, 128256)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=min(options.layers, 2) if options.tiny else options.layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            torch.manual_seed(0)
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median of the seconds of `repeats` calls, after one to warm up."""
    seconds = []
    for turn in range(repeats + 1):
        synchronize(device)
        begun = time.perf_counter()
        work()
        synchronize(device)
        if turn:
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def matmul_peak(device: torch.device) -> float:
    """Operations a second of a bf16 product of two square matrices."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, device, 10)


def operations(model: LlamaForCausalLM, case: Case, sequences: int, length: int) -> float:
    """Of one call: layers at every token that is computed, the head at scored ones, attention's lower triangle."""
    config, tokens = model.config, length - 1
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    head = config.vocab_size * config.hidden_size
    triangle = 2 * tokens * (tokens + 1) * config.hidden_size * config.num_hidden_layers
    return float(sequences * (2 * layers * tokens + 2 * head * case.scored + triangle))


def measure(teacher: InferenceModel, case: Case, options: argparse.Namespace, peak: float) -> list[str]:
    model, device = teacher.model, teacher.world.device
    vocabulary, length = model.config.vocab_size, options.length
    ids = torch.randint(0, vocabulary, (options.sequences, length), generator=torch.Generator().manual_seed(1)).tolist()
    start = length - case.scored
    solutions = [Solution(row[:start], row[start:-1], [], row[-1:]) for row in ids]
    form = TextFormat("decoder_only", eos_id=1, pad_id=0, max_input_tokens=length, max_label_tokens=length, max_rationale_tokens=length)
    budget = options.batch_tokens or auto_batch_tokens(teacher)
    scorer = Scorer(teacher, form, case.soft, vocabulary=vocabulary, batch_tokens=budget)
    keys = list(range(options.sequences))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(lambda: scorer.tokens(solutions, keys), device, REPEATS)
    above = (torch.cuda.max_memory_allocated() - before) / 2**30 if device.type == "cuda" else 0.0
    if options.profile:
        profiled(lambda: scorer.tokens(solutions, keys), device)
    done = operations(model, case, options.sequences, length) / seconds
    rate = options.sequences * length / seconds
    return [case.name, f"{rate:,.0f}", f"{done / 1e12:,.1f}", f"{done / peak:.1%}", f"{above:.2f}" if above else "-", f"{budget:,}"]


def profiled(work: Callable[[], Any], device: torch.device) -> None:
    with torch.profiler.profile() as profile:
        work()
    print(profile.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=18, max_name_column_width=60))


def main() -> None:
    options = parsed()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if options.tiny:
        options.sequences, options.length = 8, 64
    if options.largest == "torch":
        distributions.largest = lambda values, k: tuple(values.topk(k))
    peak = matmul_peak(device)
    teacher = place_for_inference(built(options, device), World(0, 1, device), "replica")
    if device.type == "cuda":
        fuse(teacher.model)  # as the stage does
    config = teacher.model.config
    per_token = 2 * (8 * config.hidden_size + 4 * config.intermediate_size)
    every = options.length - 1
    top_k, sampled = SoftLabelsConfig(on="both", k=32), SoftLabelsConfig(on="both", format="sampled", draws=50)
    cases = [
        Case(f"top_k 32, {every} of {options.length} tokens", top_k, every),
        Case(f"top_k 32, {options.length // 2} of {options.length} tokens", top_k, options.length // 2),
        Case(f"sampled 50, {every} of {options.length} tokens", sampled, every),
    ]
    table = Table("soft labels", "tokens/s", "TFLOP/s", "of the peak", "GiB over the weights", "tokens a forward", title="Scoring")
    for case in cases:
        table.add_row(*measure(teacher, case, options, peak))
    console = Console(width=130)
    console.print(table)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    console.print(
        f"{name}, {config.num_hidden_layers} layers of width {config.hidden_size}, vocabulary {config.vocab_size:,}; {options.sequences} "
        f"sequences; bf16 matmul {peak / 1e12:,.1f} TFLOP/s; a layer's activations take about {per_token / 1e6:.3f} MB a token; "
        f"k largest by {options.largest}"
    )


if __name__ == "__main__":
    main()
