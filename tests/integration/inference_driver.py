"""Places tiny teachers on the processes in each way and writes what they answer and score as JSON; `test_inference.py` starts it.

torchrun --nproc-per-node N tests/integration/inference_driver.py OUT.json WAY [WAY ...]

WAY is whole (unsharded, one process for itself), replica, tensor, zero3 or offload (zero3 with its shares in the host's memory), and may
end in :bfloat16.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from data.config import SoftLabelsConfig
from data.examples import TaskExample
from data.soft_labels import TopK
from train.config import ScratchModel
from train.engine import InferenceModel, place_for_inference, start, stop
from train.models import family_of, load_model
from train.teacher.generate import open_writer
from train.teacher.score import Scorer, Solution
from train.teacher.writing import Request, Sampling
from train.tokenization import text_format, train_tokenizer
from train.world import World

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


class Prompts:
    """Requests are made below, of token ids."""

    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def request(self, example: TaskExample, hint: str | None, key: int) -> Request:
        raise AssertionError((example, hint, key))


class Spelled:
    """Decodes a token to its number, so that no two answers read alike."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(map(str, ids))


def tiny_model(family: str, tokenizer: Any, dtype: torch.dtype) -> Any:
    model = load_model(ScratchModel(from_scratch=family, d_model=32, layers=2, heads=4, d_ff=64), tokenizer, seed=5, dtype=dtype)
    torch.manual_seed(5)
    with torch.no_grad():  # far from uniform, so that no answer hangs on the last bit
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return model


def share(teacher: InferenceModel, items: list[Any]) -> list[Any]:
    """The items of this process: not equally many, nor equally long."""
    return items[teacher.group_rank :: teacher.num_groups]


def joined(teacher: InferenceModel, found: list[Any], world: World) -> list[Any]:
    """What all groups found, in the order of the items."""
    if teacher.world.size == 1:
        return found
    parts: list[Any] = [None] * world.size
    distributed.all_gather_object(parts, (teacher.group_rank, found) if teacher.is_writer else None)
    rows = dict(part for part in parts if part is not None)
    assert len(rows) == teacher.num_groups
    return [rows[n % teacher.num_groups][n // teacher.num_groups] for n in range(sum(map(len, rows.values())))]


def answer(family: str, way: str, world: World) -> dict[str, Any]:
    name, _, dtype = way.partition(":")
    tokenizer = train_tokenizer(WORDS, 300)
    model = tiny_model(family, tokenizer, getattr(torch, dtype or "float32"))
    form = text_format(tokenizer, family_of(model), max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32)
    sharding: Any = {"whole": "replica", "offload": "zero3"}.get(name, name)
    together = World(0, 1, world.device) if name == "whole" else world
    teacher = place_for_inference(model, together, sharding, offload=name == "offload")
    end = [1] if family == "t5" else []
    prompts = [[5 + n, 40 + 3 * n, *range(60, 60 + 2 * n), *end] for n in range(1, 6)]
    requests = share(teacher, [Request(key=n, ids=tuple(prompt)) for n, prompt in enumerate(prompts)])
    spelled: Any = Spelled(len(tokenizer))
    writer = open_writer(teacher, spelled, form, Prompts(), max_new_tokens=12, sampling=Sampling(), batch_size=2)
    ((_, written),) = writer.write([(0, requests)])
    solutions = [Solution(prompt, [70, 71, 72 + n], [9], [80 + n, 1]) for n, prompt in enumerate(prompts)]
    scorer = Scorer(teacher, form, SoftLabelsConfig(on="both", k=4), vocabulary=len(tokenizer), batch_tokens=30)
    pairs = scorer.tokens(share(teacher, solutions), share(teacher, list(range(5))))
    scores = [[float(v) for part in pair if isinstance(part, TopK) for v in part.target_log_probs] for pair in pairs]
    # One process of several has nothing at all to score here.
    choices = scorer.choices(share(teacher, prompts[:1]), share(teacher, [[[70], [71, 72], [80, 81]]]))
    return {
        "layout": [teacher.sharding, teacher.degree, teacher.num_groups],
        "answers": joined(teacher, [[w.text, w.num_tokens] for w in written], world),
        "scores": joined(teacher, scores, world),
        "choices": joined(teacher, choices, world),
    }


def main() -> None:
    out, *ways = sys.argv[1:]
    world = start("cpu")
    found = {f"{family}/{way}": answer(family, way, world) for family in ("t5", "llama") for way in ways}
    if world.is_main:
        Path(out).write_text(json.dumps(found))
    stop()


if __name__ == "__main__":
    main()
