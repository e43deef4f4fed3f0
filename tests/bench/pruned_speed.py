"""CPU time a token of two models that differ in size, in turn, so that a busy machine slows both.

python tests/bench/pruned_speed.py DENSE SMALLER [--runs 7] [--tokens 64]

Two folders that plain transformers loads, such as a model and what `stepdown prune` made of it. Each run decodes one prompt greedily, one
thread, fp32, with a key-value cache; CPU time is the process's own. The arithmetic: a token reads every weight once, so that its time
should shrink as the number of parameters does (embeddings that are tied to the head are read as the head).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

PROMPT = list(range(100, 132))


def seconds_a_token(model: PreTrainedModel, tokens: int) -> float:
    ids = torch.tensor([PROMPT])
    started = time.process_time()
    with torch.no_grad():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
    return (time.process_time() - started) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("smaller", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (options.dense, options.smaller)]
    parameters = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    files = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (options.dense, options.smaller)]
    for model in models:
        seconds_a_token(model, 4)
    taken: list[list[float]] = [[], []]
    for _ in range(options.runs):
        for n, model in enumerate(models):
            taken[n].append(seconds_a_token(model, options.tokens))
    medians = [statistics.median(values) for values in taken]
    for n, name in enumerate(("dense", "smaller")):
        print(
            f"{name}: {parameters[n]:,} parameters, {files[n]:,} bytes ({files[n] / (4 * parameters[n]) - 1:+.3%} of 4 each), "
            f"{1000 * medians[n]:.1f} ms CPU a token ({1000 * min(taken[n]):.1f} to {1000 * max(taken[n]):.1f})"
        )
    print(f"parameters {1 - parameters[1] / parameters[0]:.1%} fewer, CPU time a token {1 - medians[1] / medians[0]:.1%} less")


if __name__ == "__main__":
    main()
