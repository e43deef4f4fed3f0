"""Output layer and loss of a student, forward and backward: the plain form on all logits against `head_losses` in chunks.

python tests/bench/head_loss.py                                            8,192 tokens, vocabulary 128,256, bf16, one GPU of 80 GB
python tests/bench/head_loss.py --profile                                  the kernels of `head_losses` that take longest
python tests/bench/head_loss.py --device cpu --tokens 64 --vocabulary 512  seconds: does it run

Run it from the repository's root with PYTHONPATH=. A time is the median of `--repeats` runs after two to warm up; memory is the peak above
what weights, states and targets take, with the gradients. The plain form is the oracle of the tests under automatic differentiation, on
logits in bf16, as one writes it without thinking of memory. `difference` is how far the two gradients of the states are apart, as a share
of their length: both round to bf16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from train.head_loss import Head, LiveRows, head_losses
from train.losses import Divergence, Targets, loss_sums

K = 32
WARM_UP = 2
OUT_OF_MEMORY = float("inf")


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    weight: Tensor
    targets: Targets
    scale: Tensor
    divergence: Divergence
    live: LiveRows | None

    def plain(self) -> Tensor:
        """The total from all logits at once."""
        logits = self.hidden @ self.weight.T
        with torch.no_grad():
            teacher = self.live.hidden @ self.live.head.weight.T if self.live is not None else None
        return (self.scale * loss_sums(logits, self.targets, self.divergence, teacher_logits=teacher)).sum()

    def chunked(self) -> Tensor:
        """The total from chunks."""
        total, _ = head_losses(self.hidden, Head(self.weight), self.targets, self.scale, self.divergence, live=self.live)
        return total


CASES: dict[str, tuple[str, Divergence]] = {
    "cross-entropy": ("none", Divergence()),
    f"and top_k {K}, forward KL": ("top_k", Divergence()),
    "and a live teacher, forward KL": ("live", Divergence("forward_kl")),
    "and a live teacher, JSD": ("live", Divergence("jsd")),
}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


def inputs_of(codec: str, divergence: Divergence, width: int, options: argparse.Namespace) -> Inputs:
    """Random states and weights whose logits have a deviation of 2, every token with a soft label."""
    device, tokens, vocabulary = torch.device(options.device), options.tokens, options.vocabulary
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16) * scale).detach()

    rows = torch.arange(0 if codec == "none" else tokens, device=device)
    soft_ids = torch.zeros(len(rows), 0, dtype=torch.int64, device=device)
    log_probs = torch.zeros(len(rows), 0, device=device)
    if codec == "top_k":
        soft_ids = torch.rand(tokens, vocabulary, device=device, dtype=torch.bfloat16, generator=generator).topk(K).indices
        log_probs = torch.randn(tokens, K, device=device, generator=generator).log_softmax(dim=1) - 0.1
    ids = torch.randint(vocabulary, (tokens,), device=device, generator=generator)
    part = torch.arange(tokens, device=device) % 2
    targets = Targets(ids, part, torch.ones(tokens, device=device), rows, soft_ids, log_probs, None)
    live = LiveRows(random(tokens, width), Head(random(vocabulary, width, scale=2 / width**0.5))) if codec == "live" else None
    hidden, weight = random(tokens, width).requires_grad_(), random(vocabulary, width, scale=2 / width**0.5).requires_grad_()
    return Inputs(hidden, weight, targets, torch.full((3,), 1 / tokens, device=device), divergence, live)


def measured(total: Callable[[], Tensor], inputs: Inputs, options: argparse.Namespace) -> tuple[float, float, Tensor | None]:
    """Seconds, GiB over the inputs, and the gradient of the states; infinite where the memory does not hold it."""
    on_gpu = options.device == "cuda"
    seconds = []
    gradient = None
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    try:
        for turn in range(WARM_UP + options.repeats):
            inputs.hidden.grad = inputs.weight.grad = None
            synchronize(on_gpu)
            begun = time.perf_counter()
            total().backward()
            synchronize(on_gpu)
            if turn >= WARM_UP:
                seconds.append(time.perf_counter() - begun)
        gradient = inputs.hidden.grad
    except torch.OutOfMemoryError:
        seconds = [OUT_OF_MEMORY]
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else float("nan")
    inputs.hidden.grad = inputs.weight.grad = None
    return statistics.median(seconds), OUT_OF_MEMORY if gradient is None else peak, gradient


def synchronize(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def profiled(inputs: Inputs, options: argparse.Namespace) -> None:
    with torch.profiler.profile() as profile:
        inputs.chunked().backward()
        synchronize(options.device == "cuda")
    print(profile.key_averages().table(sort_by=f"self_{options.device}_time_total", row_limit=18, max_name_column_width=60))


def row(name: str, inputs: Inputs, options: argparse.Namespace) -> list[str]:
    if options.profile:
        profiled(inputs, options)
    plain_seconds, plain_memory, wanted = measured(inputs.plain, inputs, options)
    seconds, memory, found = measured(inputs.chunked, inputs, options)
    apart = "-" if wanted is None or found is None else f"{float((found.float() - wanted.float()).norm() / wanted.float().norm()):.1e}"
    times = [f"{1000 * plain_seconds:.1f}", f"{1000 * seconds:.1f}", f"{seconds / plain_seconds:.2f}"]
    memories = [f"{plain_memory:.2f}", f"{memory:.2f}", f"{memory / plain_memory:.3f}"]
    return [f"{inputs.hidden.shape[1]:,}", name, *times, *memories, apart]


def main() -> None:
    options = parsed()
    table = Table(
        "hidden", "loss", "plain ms", "chunks ms", "ratio", "plain GiB", "chunks GiB", "ratio", "difference", title="Head and loss"
    )
    for width in options.hidden:
        for name, (codec, divergence) in CASES.items():
            table.add_row(*row(name, inputs_of(codec, divergence, width, options), options))
    console = Console(width=130)
    console.print(table)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "a CPU"
    console.print(
        f"{device}, {options.tokens:,} tokens, vocabulary {options.vocabulary:,}, bf16; the aim: a time ratio of 1, a memory ratio of 0.2"
    )


if __name__ == "__main__":
    main()
