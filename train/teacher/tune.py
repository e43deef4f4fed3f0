"""Tuning the teacher: the same trainer, on the task's gold solutions (`solve` -> rationale and label in one target)."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from data.prompts import vocabulary_texts
from data.rows import RowBuilder
from data.tasks import Task
from train.artifacts import Checkpoint
from train.config import LossConfig, TeacherConfig
from train.models import family_of, load_model
from train.tokenization import encoder, load_tokenizer, text_format
from train.trainer import OpenTracker, TrainingRun, train_checkpoint
from train.world import World


def run(config: TeacherConfig, task: Task, folder: Path, world: World, *, seed: int, open_tracker: OpenTracker, solved: bool) -> Checkpoint:
    """Tunes the teacher; its checkpoint, that of the least validation loss, is what the teacher's stage writes with.

    Args:
        config: the teacher, with `tune`.
        task: its rows.
        folder: of the stage.
        world: the processes.
        seed: of initial weights, order and dropout.
        open_tracker: gives the tracker, from a step.
        solved: the teacher learns gold solutions (`task.rationale`); else labels alone.

    Raises:
        ValueError: if it should, and no training row has one.
    """
    began = time.monotonic()
    assert config.model is not None
    assert config.tune is not None
    if solved and not any(example.rationale for example in task.train):
        raise ValueError(
            "teacher.tune needs gold solutions, but task.rationale is missing or empty: name the field that holds them, or tune on labels "
            "alone, without task.rationale and with student.loss.rationale: 0"
        )
    tokenizer = load_tokenizer(config.model, texts=vocabulary_texts(task.train), folder=None, key="teacher.model")
    model = load_model(config.model, tokenizer, seed=seed, dtype=torch.float32, key="teacher.model")
    plain = text_format(
        tokenizer,
        family_of(model),
        max_input_tokens=config.tune.max_input_tokens,
        max_label_tokens=config.tune.max_label_tokens,
        max_rationale_tokens=config.tune.max_rationale_tokens,
    )
    form = replace(plain, part="solve")
    builder = RowBuilder(form, encoder(tokenizer))
    rows = builder.solution_rows(task.train)
    validation = RowBuilder(form, encoder(tokenizer)).solution_rows(task.validation)
    # A solution is one target, so its loss is one mean: the label's. That the whole of it comes out word for word is rare luck.
    loss = LossConfig(label=1.0, rationale=0.0)
    training = TrainingRun(rows, validation, form, config.tune, loss, seed, folder, "tune the teacher", criterion="loss", began=began)
    return train_checkpoint(model, tokenizer, training, world, open_tracker, builder.counts)
