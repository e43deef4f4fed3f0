"""Trains one small Llama under several layouts in one start of torchrun and prints how far their losses are apart.

    torchrun --nproc-per-node 2 tests/gpu/student_driver.py OUT.json

Plain: ZeRO stage 0, every process holds all. Each other layout is compared with the plain one of the same precision and weights.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data.prompts import TextFormat
from data.rows import TrainRow, TrainSequence
from train.config import LossConfig, TrackingConfig, TrainingConfig
from train.engine import start, stop
from train.keepers import InMemory
from train.lora import attach_lora
from train.tracking import Tracker, read_log
from train.trainer import TrainingRun, train
from train.world import World

FORM = TextFormat("decoder_only", eos_id=1, pad_id=0, max_input_tokens=256, max_label_tokens=16, max_rationale_tokens=128)
LORA = {"rank": 8, "alpha": 16.0}
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2, offloaded": {"zero_stage": 2, "offload_optimizer": True},
    "zero3": {"zero_stage": 3},
    "lora, plain": {"zero_stage": 0, "lora": LORA},
    "lora, zero3": {"zero_stage": 3, "lora": LORA},
    "activations again, plain": {"zero_stage": 0, "activation_checkpointing": True},
}
REFERENCE = {"lora, zero3": "lora, plain"}


def rows(count: int, vocabulary: int) -> list[TrainRow]:
    draw = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(draw.randint(low, high))]

    made = []
    for n in range(count):
        question = ids(10, 60)
        made.append(
            TrainRow(f"row-{n}", (TrainSequence(question, [*ids(1, 4), 1], True), TrainSequence(question, [*ids(5, 60), 1], False)))
        )
    return made


def model(tiny: bool) -> LlamaForCausalLM:
    sizes: dict[str, Any] = (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        if tiny
        else {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=300 if tiny else 8192, tie_word_embeddings=True))


def losses(world: World, precision: str, layout: dict[str, Any], folder: Path) -> list[float]:
    tiny = world.device.type == "cpu"
    config = TrainingConfig.model_validate(
        {
            "epochs": 2,
            "batch_size": 16,
            "learning_rate": 1e-3,
            "precision": precision,
            "micro_batch_tokens": 600,
            "compile": "off",
            **layout,
        }
    )
    student, data = model(tiny), rows(40 if tiny else 160, 300 if tiny else 8192)
    if config.lora is not None:
        attach_lora(student, config.lora, "student.lora")
    run = TrainingRun(data, data[:20], FORM, config, LossConfig(), 0, folder, "student", resumable=False)

    def tracker(step: int) -> Tracker:
        off = TrackingConfig(wandb="disabled")
        return Tracker(folder, off, group="test", job_type="train", settings={}, enabled=world.is_main, from_step=step)

    train(student, run, world, tracker, InMemory())
    return [line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line]


def main() -> None:
    world = start("auto")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "bf16"):
            plain: dict[str, list[float]] = {}
            for number, (name, layout) in enumerate(LAYOUTS.items()):
                begun = time.monotonic()
                plain[name] = losses(world, precision, layout, Path(folder) / f"{precision}-{number}-{world.rank}")
                if world.is_main:
                    other = plain[REFERENCE.get(name, "plain")] if not name.startswith("lora") or name in REFERENCE else plain[name]
                    apart = max(abs(a - b) for a, b in zip(plain[name], other, strict=True))
                    found[f"{precision}, {name}"] = {"first": plain[name][0], "last": plain[name][-1], "apart": apart}
                    print(
                        f"{precision} {name:26} {len(plain[name])} steps, loss {plain[name][0]:.4f} to {plain[name][-1]:.4f}, "
                        f"at most {apart:.1e} apart, {time.monotonic() - begun:.1f} s",
                        flush=True,
                    )
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1))
    stop()


if __name__ == "__main__":
    main()
