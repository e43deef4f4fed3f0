"""Places tiny teachers on the processes in each way and writes what they generate and score as JSON; `test_inference.py` starts it.

torchrun --nproc-per-node N tests/integration/inference_driver.py OUT.json DTYPE SHARDING [SHARDING ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from data.prompts import TextFormat
from train.config import ScratchModel
from train.engine import World, place_for_inference, start, stop
from train.models import family_of, load_model
from train.teacher.generate import generate
from train.teacher.score import Solution, score
from train.tokenization import text_format, train_tokenizer

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def answer(family: str, sharding: Any, dtype: torch.dtype, world: World) -> dict[str, Any]:
    tokenizer = train_tokenizer(WORDS, 300)
    source = ScratchModel(from_scratch=family, d_model=32, layers=2, heads=4, d_ff=64)
    model = load_model(source, tokenizer, seed=5, dtype=dtype)
    form: TextFormat = text_format(tokenizer, family_of(model), max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32)
    teacher = place_for_inference(model, world, sharding)
    end = [1] if family == "t5" else []
    prompts = [[5 + n, 40 + 3 * n, *range(60, 60 + n), *end] for n in range(1, 6)]
    solutions = [Solution(prompt, [70, 71, 72 + n], [9], [80 + n, 1]) for n, prompt in enumerate(prompts)]
    scored = score(teacher, form, solutions, 4)
    return {
        "sharding": teacher.sharding,
        "generated": generate(teacher, form, prompts, 6 + 2 * world.rank if teacher.sharding != "tensor" else 6)[:2],
        "scores": [[float(v) for part in pair for v in part.target_log_probs] for pair in scored],
    }


def main() -> None:
    out, dtype, *shardings = sys.argv[1:]
    world = start("cpu")
    found = {
        f"{family}/{sharding}": answer(family, sharding, getattr(torch, dtype), world)
        for family in ("t5", "llama")
        for sharding in shardings
    }
    if world.is_main:
        Path(out).write_text(json.dumps(found))
    stop()


if __name__ == "__main__":
    main()
