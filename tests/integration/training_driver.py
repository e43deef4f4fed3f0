"""Trains tiny models several times in one start of torchrun and writes every run's losses as JSON; `test_training.py` starts it.

    torchrun --nproc-per-node N tests/integration/training_driver.py OUT.json RUN [RUN ...]

A RUN is FAMILY:ZERO_STAGE:MICRO_BATCH_TOKENS, such as t5:2:auto or llama:0:64, or FAMILY:ZERO_STAGE:MICRO_BATCH_TOKENS:WAY, where WAY is
the kind of soft labels (top_k where left out, sampled, answers, or live: of a teacher beside the student), or lora, or checkpointed. What
follows a # only tells runs apart. A number of tokens must be one at which a step takes several forwards, auto one at which it takes one.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.batches import deal
from data.rows import TrainRow, TrainSequence
from data.soft_labels import Sampled, SoftLabels, TopK
from train.config import LossConfig, ScratchModel, StudentConfig, TrackingConfig
from train.engine import start
from train.learner import LiveTeacher
from train.models import family_of, load_model
from train.tokenization import text_format, train_tokenizer
from train.tracking import Tracker, read_log
from train.trainer import TrainingRun, train_checkpoint
from train.world import World

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def rows(vocabulary: int, prompt_end: list[int], soft: str) -> list[TrainRow]:
    """37 rows of very unequal lengths, a third of them without a rationale, half with soft labels."""
    draw = random.Random(1)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(draw.randint(low, high))]

    made = []
    for n in range(37):
        question = ids(2, 20)
        label = [*ids(1, 4), 1]
        on_tokens = scored(label, vocabulary, soft) if n % 2 and soft != "answers" else None
        sequences = [TrainSequence([*question, *prompt_end], label, True, on_tokens)]
        if n % 3:
            sequences.append(TrainSequence([*question, *prompt_end], [*ids(1, 25), 1], False))
        if n % 2 and soft == "answers":
            share = draw.uniform(0.1, 0.9)
            sequences += [TrainSequence([*question, *prompt_end], [*ids(0, 6), 1], False, weight=w) for w in (share, 1 - share)]
        made.append(TrainRow(f"row{n}", tuple(sequences)))
    return made


def scored(label: list[int], vocabulary: int, soft: str) -> SoftLabels:
    generator = torch.Generator().manual_seed(len(label))
    logits = torch.randn(len(label), vocabulary, generator=generator)
    log_probs = logits.log_softmax(dim=-1)
    at_target = log_probs[torch.arange(len(label)), torch.tensor(label)].numpy()
    if soft == "top_k":
        values, best = log_probs.topk(5)
        return TopK(best.to(torch.int32).numpy(), values.numpy(), at_target)
    draws = torch.multinomial((2 * logits).softmax(-1), 20, replacement=True, generator=generator)
    found = [torch.unique(row, return_counts=True) for row in draws]
    ids, counts = (torch.cat(parts).to(torch.int32).numpy() for parts in zip(*found, strict=True))
    return Sampled(ids, counts, np.array([len(row) for row, _ in found], np.int32), at_target, draws=20, temperature=0.5)


TRAINED: list[weakref.ref[Any]] = []
"""The models of all trainings."""


def train_once(name: str, folder: Path, world: World) -> list[dict[str, float]]:
    """One training of 15 steps: 3 epochs of 5 batches of 8, the last batch short."""
    family, zero_stage, tokens, way = [*name.split("#")[0].split(":"), "top_k"][:4]
    tokenizer = train_tokenizer(WORDS, 300)
    sizes = ScratchModel(from_scratch=family, d_model=16, layers=2, heads=2, d_ff=32)
    model = load_model(sizes, tokenizer, seed=3, dtype=torch.float32)
    form = text_format(tokenizer, family_of(model), max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32)
    data = rows(len(tokenizer), [1] if family == "t5" else [5], way if way in ("sampled", "answers") else "top_k")
    config = StudentConfig.model_validate(
        {
            "model": "unused",
            "epochs": 3,
            "batch_size": 8,
            "micro_batch_tokens": int(tokens) if tokens != "auto" else "auto",
            "zero_stage": int(zero_stage),
            "precision": "fp32",
            "learning_rate": 3e-3,
            "weight_decay": 0.1,
            "activation_checkpointing": way == "checkpointed",
            "lora": {"rank": 4} if way == "lora" else None,
        }
    )
    teacher = LiveTeacher(load_model(sizes, tokenizer, seed=4, dtype=torch.float32).eval()) if way == "live" else None
    loss: dict[str, Any] = {
        "label": 0.5,
        "rationale": 0.5,
        "soft": 0.7,
        **({"teacher": "live", "divergence": "jsd", "temperature": 0.5} if teacher else {}),
    }
    training = TrainingRun(data, data[:11], form, config, LossConfig.model_validate(loss), 7, folder, name)
    shares = deal(training.sequences_of(0), num_ranks=world.size, max_tokens=training.micro_batch_tokens, packed=family == "llama")
    assert (len(shares[0]) == 1) == (tokens == "auto"), shares

    def tracker(step: int) -> Tracker:
        disabled = TrackingConfig(wandb="disabled")
        return Tracker(folder, disabled, group="test", job_type="train", settings={}, enabled=world.is_main, from_step=step)

    TRAINED.append(weakref.ref(model))
    made = train_checkpoint(model, tokenizer, training, world, tracker, {}, live=teacher)
    if not world.is_main:
        return []
    weights = sum(
        float(p.detach().double().abs().sum())
        for p in load_model(str(folder / "model"), tokenizer, seed=0, dtype=torch.float32).parameters()
    )
    return [*read_log(folder / "log.jsonl"), {"step": 10**6, "weights": weights, "best_step": made.best_step}]


def main() -> None:
    out, *names = sys.argv[1:]
    world = start("cpu")
    found = {}
    for name in names:
        found[name] = train_once(name, Path(out).parent / f"{world.size}-{name}", world)
        gc.collect()
        assert TRAINED[-1]() is None, f"{name}: the trained model, and with it what trained it, stays in memory"
    if world.is_main:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
