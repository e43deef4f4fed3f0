"""Trains a tiny Llama whose weights are pruned on the way, and writes as JSON what became of them; `test_pruning.py` starts it.

    torchrun --nproc-per-node N tests/integration/pruning_driver.py OUT.json FOLDER RUN [RUN ...]

A RUN is STAGE:PRECISION, such as 0:fp32 or 3:bf16, and offloaded after another colon. 50 steps of two micro-batches with momentum and
weight decay: dense up to step 10, half of the weights out from there, three quarters from step 20. The state is saved in FOLDER/RUN after
step 30; where there is one the training goes on from it. Under ZeRO 3 the feed-forward matrices are sharded, and the others stay whole.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from train.config import TrainingConfig
from train.engine import TrainEngine, open_engine, start
from train.shards import PARTS
from train.world import World

STEPS, PRUNED, TIGHTER, SAVED = 50, 10, 20, 30
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, tie_word_embeddings=True, pad_token_id=0, bos_token_id=2, eos_token_id=1, **SIZES)
    return LlamaForCausalLM(config)


def masks(step: int) -> dict[str, Tensor]:
    """Weights of attention one by one; in feed-forward layers whole neurons, as rows and columns. What is out at 10 is out at 20."""
    draw = torch.Generator().manual_seed(5)
    share = 0.5 if step == PRUNED else 0.75
    found = {}
    for name, parameter in model().named_parameters():
        if "self_attn" in name:
            found[name] = torch.rand(parameter.shape, generator=draw) >= share
    for layer in range(SIZES["num_hidden_layers"]):
        kept = torch.rand(SIZES["intermediate_size"], generator=draw) >= share
        place = f"model.layers.{layer}.mlp"
        found |= {
            f"{place}.gate_proj.weight": kept[:, None],
            f"{place}.up_proj.weight": kept[:, None],
            f"{place}.down_proj.weight": kept[None],
        }
    return found


def loss(engine: TrainEngine, step: int, micro: int, world: World) -> Tensor:
    """This process's share of the mean over 8 rows, in 2 micro-batches; of two processes the first takes three rows of four."""
    ids = torch.randint(3, 50, (8, 9), generator=torch.Generator().manual_seed(step))
    rows = ids[micro::2]
    mine = rows if world.size == 1 else rows[:3] if world.is_main else rows[3:]
    logits = engine.forward(mine, use_cache=False).logits.float()
    entropy: Tensor = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), mine[:, 1:].flatten(), reduction="sum")
    return entropy / (8 * 8)


def left(engine: Any, held: dict[str, Tensor], shapes: dict[str, torch.Size]) -> list[int]:
    """Numbers of this process's share that masks leave out and are not 0, by kind; then those kept that are 0."""
    shard, wrong, lost = engine._shard(), [0] * len(PARTS), 0
    for piece in shard.pieces:
        if piece.name in held:
            out = ~held[piece.name].expand(shapes[piece.name]).reshape(-1)[piece.first : piece.first + piece.count]
            for n, part in enumerate(PARTS):
                values = shard.flats[piece.flat][part].detach()[piece.offset : piece.offset + piece.count]
                wrong[n] += int((values[out] != 0).sum())
                lost += int((values[~out] == 0).sum()) if part == "weight" else 0
    return [*wrong, lost]


def run(name: str, folder: Path, world: World) -> dict[str, Any]:
    stage, precision, *more = name.split("#")[0].split(":")
    knobs: dict[str, Any] = {"zero_stage": int(stage), "precision": precision, "weight_decay": 0.1, "offload_optimizer": bool(more)}
    module = model()
    shapes = {key: parameter.shape for key, parameter in module.named_parameters()}
    engine = open_engine(module.train(), world, TrainingConfig.model_validate(knobs))
    resumed = engine.resume(folder / name)
    held = masks(TIGHTER) if resumed else {}
    losses, wrong = [], torch.zeros(len(PARTS) + 1, dtype=torch.int64)
    for step in range(resumed.step if resumed else 0, STEPS):
        if step in (PRUNED, TIGHTER):
            held = masks(step)
            engine.hold(held)
        parts = []
        for micro in range(2):
            parts.append(loss(engine, step, micro, world))
            engine.backward(parts[-1], last=micro == 1)
        engine.step(3e-3)
        losses.append(float(world.sum(torch.stack(parts).detach().sum())))
        wrong += torch.tensor(left(engine, held, shapes))
        if step + 1 == SAVED:
            engine.save(folder / name, SAVED, {})
    weights = engine.gather_weights()
    out = sum(int((weights[key] == 0).sum()) for key in held) if weights else 0
    mine = {key: getattr(p, "ds_tensor", p) for key, p in module.named_parameters()}
    assert all(value.isfinite().all() for value in mine.values())
    found = {
        "losses": losses,
        "wrong": world.sum(wrong).tolist(),
        "zeros": out,
        "expected": sum(int((~mask).expand(shapes[key]).sum()) for key, mask in held.items()),
        "started": resumed.step if resumed else 0,
    }
    engine.release()
    return found


def main() -> None:
    out, folder, *names = sys.argv[1:]
    world = start("cpu")
    found = {name: run(name, Path(folder), world) for name in names}
    if world.is_main:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
