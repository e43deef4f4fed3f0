"""The stage that prunes a trained student and lets it recover; its best, in a folder of its own, is what is shipped.

load -> prune (train/pruning/once.py), or masks that the training holds and tightens (train/pruning/gradual.py) -> recover -> make smaller
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.prompts import TextFormat
from train.activity import Sample
from train.artifacts import Checkpoint
from train.config import LossConfig, StudentConfig, StudentPruneConfig
from train.cutting import layers_of
from train.models import load_folder, num_parameters, replace_model
from train.neurons import feed_forwards
from train.pruning.gradual import MaskSchedule, NeuronNames, neuron_schedule, weight_schedule
from train.pruning.once import check_pattern, prunable, prune, weight_norms
from train.pruning.sizes import file_sizes, layer_sparsities, sparsities
from train.student.stage import StudentInputs, live_teacher, prepare_rows
from train.trainer import OpenTracker, TrainingRun, train_checkpoint
from train.world import World

KEY = "student.prune"
_SAMPLE_ROWS = 64
"""Training rows on which it is measured what matters."""


def run(
    config: StudentConfig,
    loss: LossConfig,
    inputs: StudentInputs,
    trained: Checkpoint,
    trained_folder: Path,
    folder: Path,
    world: World,
    *,
    seed: int,
    open_tracker: OpenTracker,
) -> Checkpoint:
    """Prunes a checkpoint.

    Args:
        config: the student as its arm was trained, and `prune`.
        loss: of that arm; the recovery's, where `prune` gives none.
        inputs: task, records, teacher.
        trained: the checkpoint.
        trained_folder: of its stage.
        folder: of this stage; resumable state and the pruned model go there.
        world: the processes.
        seed: the run's.
        open_tracker: gives the tracker, from a step.

    Raises:
        ValueError: if the model cannot be pruned so, or no row has a target.
    """
    began, settings = time.monotonic(), config.prune
    assert settings is not None
    model, tokenizer, form = load_folder(trained_folder / "model", dtype=torch.float32)
    loss = settings.loss or loss
    if loss.soft and loss.teacher == "live":
        inputs = replace(inputs, teacher=str(trained_folder / "model"), served_tokenizer=None)
    rate = settings.learning_rate or config.learning_rate
    recovering = config.model_copy(update={"epochs": settings.epochs, "learning_rate": rate, "prune": None})
    rows, validation, counts = prepare_rows(recovering, loss, inputs, tokenizer, form, seed=seed)
    samples = [(sequence.input_ids, sequence.target_ids) for row in rows[:_SAMPLE_ROWS] for sequence in row.sequences]
    if not settings.epochs:
        prune(model, settings, samples, KEY)
        made = _saved(model, tokenizer, form, trained, folder, world)
        made = replace(made, steps=0, best_step=0, validation={}, counts={}, seconds=0.0)
        return _measured(made, folder, world).plus_since(began)
    own_seed = seed if config.seed is None else config.seed
    training = TrainingRun(rows, validation, form, recovering, loss, own_seed, folder, "recover from pruning", began=began)
    masks = masks_of(model, settings, samples, training.num_steps)
    if masks is None:
        prune(model, settings, samples, KEY)
    live = live_teacher(recovering, inputs, tokenizer, world) if loss.soft and loss.teacher == "live" else None
    made = train_checkpoint(model, tokenizer, replace(training, masks=masks), world, open_tracker, counts, live=live)
    ended = time.monotonic()
    if masks is None or settings.makes_zeros:
        return _measured(made, folder, world).plus_since(ended)
    # What the masks have left of each neuron is 0, so that the same choice now finds those.
    smaller, tokenizer, form = load_folder(folder / "model", dtype=torch.float32)
    prune(smaller, settings, samples, KEY)
    return _measured(_saved(smaller, tokenizer, form, made, folder, world), folder, world).plus_since(ended)


def _measured(made: Checkpoint, folder: Path, world: World) -> Checkpoint:
    """With what is in the file, on rank 0, which describes it: zeros, and bytes when it is compressed."""
    if not world.is_main:
        return made
    model = folder / "model"
    kinds, layers = ({part.kind: [part.weights, part.zeros] for part in count(model)} for count in (sparsities, layer_sparsities))
    return replace(made, sparsity=kinds, layer_sparsity=layers, compressed_bytes=file_sizes(model).compressed_bytes)


def masks_of(model: PreTrainedModel, config: StudentPruneConfig, samples: Sequence[Sample], num_steps: int) -> MaskSchedule | None:
    """What the training has to hold; None where the model is made smaller before it."""
    if config.makes_zeros:
        linears = prunable(model, config.exclude, KEY)
        check_pattern(linears, config, KEY)
        mean_squares = weight_norms(model, linears, samples) if config.method == "wanda" else {}
        return weight_schedule(config, [f"{name}.weight" for name in linears], mean_squares, num_steps)
    if config.schedule == "one_shot":
        return None
    layers = [layer for stack in layers_of(model, KEY) for layer in stack]
    names = {parameter: name for name, parameter in model.named_parameters()}

    def named(linears: Sequence[nn.Linear]) -> list[str]:
        return [names[linear.weight] for linear in linears]

    parts = feed_forwards(model, layers, f"{KEY}.method is {config.method}")
    found = [
        NeuronNames(named(part.inner), [names[linear.bias] for linear in part.inner if linear.bias is not None], named([part.outer])[0])
        for part in parts
    ]
    return neuron_schedule(config, found, num_steps)


def _saved(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: TextFormat, of: Checkpoint, folder: Path, world: World
) -> Checkpoint:
    """The model as this stage's, in place of what may lie there; described as `of` is, but for its size."""
    error: Exception | None = None
    if world.is_main:
        try:
            replace_model(model, tokenizer, form, folder)
        except (OSError, RuntimeError) as caught:
            error = caught
    world.agree(error)
    size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
    return replace(of, num_parameters=num_parameters(model), weight_bytes=size)
