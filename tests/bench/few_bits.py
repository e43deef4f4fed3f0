"""What SmolLM2-135M, tuned on CommonsenseQA, still gets right in 4, 3, 2 and 1 bits: rounded, and trained through the rounding.

python -m tests.bench.few_bits --model TUNED --data DIR --out DIR [--cells w2a16:2e-4,tq2_0:4e-4] [--epochs 3] [--minutes 8]
python -m tests.bench.few_bits --out DIR --show       the table of what is there
python -m tests.bench.few_bits --model TUNED --data DIR --out DIR --tiny       two of its layers and a few rows on a CPU: does it run

TUNED is OUT/tuned/rounded of pruning_quality.py, DIR holds what that one reads. The blocks of ternary and binary GGUF need rows that 256
and 128 divide: for those the model is widened with zeros, 576 to 768, which changes nothing that it computes. A cell is a target and a
learning rate. It rounds as the stage `recover` does, and leaves its model (OUT/TARGET-RATE) as that stage does, so that `stepdown
quantize` makes of it the file to ship. Answers are counted with the weights that stand on the grid, in bf16 on a GPU. Every cell is a file
of OUT: the same command goes on where it was stopped, and several share the work.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.bench.pruning_quality import (
    Data,
    claimed,
    loaded,
    right_answers,
    set_weights,
    share,
    tracker_of,
    training_options,
    training_run,
)
from train.config import LossConfig
from train.deploy.gguf import type_of
from train.deploy.targets import TARGETS, Target, module_of
from train.grids import put_on_grids, rounding
from train.keepers import InMemory
from train.learner import LiveTeacher
from train.models import load_folder, save_model
from train.significance import paired_bootstrap
from train.student.recovering import recovery_loss, settle
from train.trainer import train
from train.world import World

LOSS = recovery_loss(LossConfig(label=0.5, rationale=0.5))
CELLS = (
    "compressed-tensors-w2a16:2e-4,gguf-tq2_0:4e-4,gguf-q1_0:4e-4,compressed-tensors-w3a16:1e-4,compressed-tensors-w4a16:1e-4,"
    "gguf-q4_0:1e-4,compressed-tensors-w2a16:4e-4,gguf-tq2_0:8e-4,gguf-q1_0:8e-4,compressed-tensors-w3a16:2e-4,"
    "compressed-tensors-w4a16:5e-5,gguf-q4_0:5e-5"
)
_WIDE = 768


def source_of(target: Target, tuned: PreTrainedModel) -> PreTrainedModel:
    """The model in fp32 on the CPU, widened where the target's blocks ask for it."""
    if target.format == "gguf" and type_of("blk", (1, tuned.config.hidden_size), target.type) != target.type:
        return widened(tuned)
    return copy.deepcopy(tuned)


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """A Llama with rows of a multiple of 256 that gives the same logits.

    What is added is zero: channels of the residual stream, and heads. The root of the mean square over more channels is smaller, so norms
    are scaled by the root of the two widths' ratio, and the constant inside it by their ratio.
    """
    old = model.config
    kv = _WIDE // (old.hidden_size // old.num_key_value_heads)
    ratio = old.hidden_size / _WIDE
    config = LlamaConfig(
        **{key: value for key, value in old.to_dict().items() if key not in ("hidden_size", "model_type", "rms_norm_eps")}
        | {"num_attention_heads": kv * old.num_attention_heads // old.num_key_value_heads, "num_key_value_heads": kv},
        hidden_size=_WIDE,
        rms_norm_eps=old.rms_norm_eps * ratio,
    )
    wide = LlamaForCausalLM(config)
    weights: dict[str, Tensor] = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            small = weights[name] * (math.sqrt(ratio) if "norm" in name else 1.0)
            parameter.zero_()
            parameter[tuple(slice(0, size) for size in small.shape)] = small
    wide.generation_config = model.generation_config
    return wide


def measure(
    target: Target, rate: float, options: argparse.Namespace, data: Data, world: World, tuned: PreTrainedModel
) -> dict[str, object]:
    model = source_of(target, tuned).to(world.device)
    grids = module_of(target).grids(model, target)
    half = world.device.type == "cuda"
    teacher = copy.deepcopy(model).to(torch.bfloat16 if half else torch.float32).eval().requires_grad_(False)
    run = training_run(options, data, LOSS, rate, options.epochs, 0, f"{target.name}")
    keeper = InMemory()
    with rounding(model, grids):
        trained = train(model, run, world, tracker_of(run), keeper, live=LiveTeacher(teacher))
    set_weights(model, keeper.best)
    folder = options.out / f"{target.name}-{rate:g}"
    folder.mkdir(parents=True, exist_ok=True)
    settle(model, grids, folder, bf16=half)
    save_model(copy.deepcopy(model).cpu(), data.tokenizer, data.form, folder / "model")
    best = trained.best
    return {"exact_match": best.exact_match, "loss": best.loss, "step": best.step, "right": right_answers(model, data, world)}


def rounded(target: Target, data: Data, world: World, tuned: PreTrainedModel) -> dict[str, object]:
    """To the nearest, as it is."""
    model = source_of(target, tuned).to(world.device)
    put_on_grids(model, module_of(target).grids(model, target))
    return {"right": right_answers(model, data, world)}


def show(options: argparse.Namespace) -> None:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(options.out.glob("cells/*.json"))}
    table = Table("target", "rounded", "learning rate", "validation", "recovered", "recovered - rounded", "recovered - whole")
    whole = found.get("whole", {}).get("right")
    for name, cell in found.items():
        target, _, rate = name.rpartition("@")
        if not target or rate == "rounded":
            continue
        plain = found.get(f"{target}@rounded", {}).get("right")
        against = [paired_bootstrap([of], [cell["right"]]) if of else None for of in (plain, whole)]
        told = [f"{100 * t.difference:+.1f} ({100 * t.low:+.1f} to {100 * t.high:+.1f})" if t else "" for t in against]
        table.add_row(
            target, f"{share(plain):.1%}" if plain else "", rate, f"{cell['exact_match']:.1%}", f"{share(cell['right']):.1%}", *told
        )
    console = Console(width=140)
    if whole:
        console.print(f"whole: {share(whole):.1%} of {len(whole):,} test items")
    console.print(table)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", default=CELLS, help="TARGET:LEARNING_RATE with commas between")
    return training_options(parser, epochs=3.0)


def work(options: argparse.Namespace) -> None:
    """All cells that are left."""
    world = World(0, 1, torch.device("cuda", 0) if torch.cuda.is_available() and not options.tiny else torch.device("cpu"))
    _, data = loaded(options, str(options.model))
    tuned, _, _ = load_folder(options.model, dtype=torch.float32)
    if options.tiny:
        options.batch_size, options.epochs, options.compile = 8, 1.0, "off"
        tuned.model.layers = tuned.model.layers[:2]
        tuned.config.num_hidden_layers = 2
    tasks = [("whole", None, None)]
    cells = [(TARGETS[name], float(rate)) for name, _, rate in (cell.partition(":") for cell in options.cells.split(","))]
    tasks += [(f"{target.name}@{rate:g}", target, rate) for target, rate in cells]
    tasks += [(f"{name}@rounded", TARGETS[name], None) for name in dict.fromkeys(target.name for target, _ in cells)]
    for name, target, rate in tasks:
        if time.time() > options.until:
            return
        path = options.out / "cells" / f"{name}.json"
        with claimed(path) as mine:
            if not mine:
                continue
            began = time.monotonic()
            torch.compiler.reset()
            if target is None:
                found = {"right": right_answers(tuned, data, world)}
            elif rate is None:
                found = rounded(target, data, world, tuned)
            else:
                found = measure(target, rate, options, data, world, tuned)
            path.write_text(json.dumps(found | {"seconds": time.monotonic() - began}))
            right = found["right"]
            print(f"{name}: {share(right):.1%}, validation {found.get('exact_match')}, {time.monotonic() - began:.1f} s", flush=True)


def main() -> None:
    options = parsed()
    if not options.show:
        work(options)
    show(options)


if __name__ == "__main__":
    main()
