"""The stage that trains a student through the rounding of a file to ship, so that few bits still do the task.

load -> round the matrices on every forward (train/grids.py) -> train -> put the best on the grid, with its scales beside it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from train.artifacts import Checkpoint
from train.config import LossConfig, RecoverConfig, StudentConfig
from train.grids import Grid, put_on_grids, rounding, write_scales
from train.models import load_folder, replace_model
from train.pruning.gradual import MaskSchedule
from train.student.stage import StudentInputs, live_teacher, prepare_rows
from train.trainer import OpenTracker, TrainingRun, train_checkpoint
from train.world import World

Grids = Callable[[PreTrainedModel], dict[str, Grid]]
"""How a target rounds each matrix of a model, by its name."""


def run(
    config: StudentConfig,
    settings: RecoverConfig,
    inputs: StudentInputs,
    source: Path,
    folder: Path,
    world: World,
    *,
    grids_of: Grids,
    seed: int,
    title: str,
    open_tracker: OpenTracker,
) -> Checkpoint:
    """Trains a model through its rounding.

    Args:
        config: the student as its arm was trained; adapters are left out, all weights are trained.
        settings: of this training.
        inputs: task, records, teacher.
        source: stage folder of the model.
        folder: of this stage; resumable state, the rounded model and its scales go there.
        world: the processes.
        grids_of: how the target rounds.
        seed: the run's.
        title: of the progress line.
        open_tracker: gives the tracker, from a step.

    Raises:
        ValueError: if the target cannot hold such a model, or no row has a target.
    """
    began = time.monotonic()
    model, tokenizer, form = load_folder(source / "model", dtype=torch.float32)
    loss = settings.loss or recovery_loss(config.loss)
    if loss.soft and loss.teacher == "live":
        inputs = replace(inputs, teacher=str(source / "model"), served_tokenizer=None)
    rate = settings.learning_rate or config.learning_rate
    recovering = config.model_copy(update={"epochs": settings.epochs, "learning_rate": rate, "loss": loss, "lora": None})
    rows, validation, counts = prepare_rows(recovering, loss, inputs, tokenizer, form, seed=seed)
    grids = grids_of(model)
    own_seed = seed if config.seed is None else config.seed
    masks = _zeros_stay(model, grids)
    training = TrainingRun(rows, validation, form, recovering, loss, own_seed, folder, title, masks=masks, began=began)
    live = live_teacher(recovering, inputs, tokenizer, world) if loss.soft and loss.teacher == "live" else None
    with rounding(model, grids):
        made = train_checkpoint(model, tokenizer, training, world, open_tracker, counts, live=live)
    ended = time.monotonic()
    error: Exception | None = None
    if world.is_main:
        try:
            best, tokenizer, form = load_folder(folder / "model", dtype=torch.float32)
            settle(best, grids, folder, bf16=recovering.computes_in_bf16(world.device.type))
            replace_model(best, tokenizer, form, folder)
        except (OSError, RuntimeError) as caught:
            error = caught
    world.agree(error)
    return made.plus_since(ended)


def recovery_loss(loss: LossConfig) -> LossConfig:
    """A student's loss with the distribution of the student itself, as it was before it was rounded, beside it."""
    return LossConfig(label=loss.label, rationale=loss.rationale, soft=1.0, teacher="live")


@torch.no_grad()
def settle(model: PreTrainedModel, grids: Mapping[str, Grid], folder: Path, *, bf16: bool) -> None:
    """Puts a trained model's matrices on their grids, and writes the scales into `folder`, beside where the model is to lie.

    Args:
        model: its matrices in the precision that they were trained in.
        grids: as in training.
        folder: of the stage.
        bf16: they were rounded from bf16 in training: rounded from more digits some weights would fall to the next code.
    """
    for name in grids if bf16 else ():
        weight = model.get_submodule(name).weight
        weight.copy_(weight.to(torch.bfloat16))
    write_scales(put_on_grids(model, grids), folder)


def _zeros_stay(model: PreTrainedModel, grids: Mapping[str, Grid]) -> MaskSchedule | None:
    """Holds the weights that pruning has made 0, of matrices that are rounded; None where there are none."""
    weights = {f"{name}.weight": model.get_submodule(name).weight for name in grids}
    sparse = [name for name, weight in weights.items() if bool((weight == 0).any())]

    def choose(current: Mapping[str, Tensor], fraction: float, device: torch.device) -> dict[str, Tensor]:
        del fraction, device
        return {name: weight != 0 for name, weight in current.items()}

    return MaskSchedule(choose, sparse, fraction=0.0, end=0, every=1) if sparse else None
