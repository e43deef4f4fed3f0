"""The student's stage: labels, rationales and soft labels become a small model (`train.trainer` holds the loop)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from data.config import RationalesConfig
from data.prompts import vocabulary_texts
from data.rows import RowBuilder, TrainRow
from data.store import read_records
from data.tasks import Task
from train.artifacts import Checkpoint
from train.config import LossConfig, StudentConfig
from train.engine import World
from train.models import family_of, load_model, skeleton
from train.tokenization import check_same_vocabulary, encoder, load_tokenizer, text_format
from train.trainer import OpenTracker, TrainingRun, train_checkpoint


@dataclass(frozen=True, slots=True)
class StudentInputs:
    """What the student learns from."""

    task: Task
    records: Path
    """Folder of the record store."""
    rationales: RationalesConfig
    teacher: str | None
    """The live teacher's model: folder of the tuned one, else its name; None for a recorded teacher."""


def run(
    config: StudentConfig,
    loss: LossConfig,
    inputs: StudentInputs,
    folder: Path,
    world: World,
    *,
    seed: int,
    title: str,
    open_tracker: OpenTracker,
) -> Checkpoint:
    """Trains one arm.

    Args:
        config: the student.
        loss: weights of this arm's loss.
        inputs: task, records, teacher.
        folder: of the stage; resumable state and the best model go there.
        world: the processes.
        seed: of initial weights, order and dropout.
        title: of the progress line.
        open_tracker: gives the tracker, from a step.

    Raises:
        ValueError: where no row has a target, or soft labels meet another vocabulary.
    """
    source = config.model
    tokenizer = load_tokenizer(source, texts=vocabulary_texts(inputs.task.train), folder=inputs.teacher)
    model = load_model(source, tokenizer, seed=seed, dtype=torch.float32, teacher_folder=inputs.teacher, key="student.model")
    if loss.soft:
        assert inputs.teacher is not None, "the configuration asks for soft labels of a live teacher only"
        check_same_vocabulary(tokenizer, load_tokenizer(inputs.teacher, texts=None, folder=None, key="teacher.model"))
        _check_same_family(model, skeleton(inputs.teacher, "teacher.model"))
    form = text_format(
        tokenizer,
        family_of(model),
        max_input_tokens=config.max_input_tokens,
        max_label_tokens=config.max_label_tokens,
        max_rationale_tokens=config.max_rationale_tokens,
    )
    builder = RowBuilder(form, encoder(tokenizer))
    records = {record.id: record for record in read_records(inputs.records, "train")}
    rows = builder.student_rows(
        inputs.task.train, records, inputs.rationales, config.targets, with_rationales=loss.rationale > 0, with_soft_labels=loss.soft > 0
    )
    _check_rows(rows, builder.counts, loss)
    validation = RowBuilder(form, encoder(tokenizer)).student_rows(
        inputs.task.validation, {}, RationalesConfig(), "gold", with_rationales=False, with_soft_labels=False
    )
    return train_checkpoint(
        model, tokenizer, TrainingRun(rows, validation, form, config, loss, seed, folder, title), world, open_tracker, builder.counts
    )


def _check_same_family(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    # The families write a target differently (a decoder-only model starts it with a space): its tokens would not be those scored.
    if family_of(student) != family_of(teacher):
        raise ValueError(
            f"student.loss.soft needs a student of the teacher's family, but the teacher is {family_of(teacher)} and the student "
            f"{family_of(student)}: choose a student like the teacher, or set soft to 0"
        )


def _check_rows(rows: list[TrainRow], counts: Mapping[str, int], loss: LossConfig) -> None:
    if not rows:
        raise ValueError(
            "the student has no row to learn: teacher.rationales.keep with drop_rows, or student.targets: teacher, leaves none; loosen them"
        )
    if loss.rationale and not counts["rationale_rows"]:
        raise ValueError(
            "student.loss.rationale has a weight, but no record has a rationale that teacher.rationales.keep lets pass; loosen keep"
        )
    if loss.soft and not counts["soft_label_rows"]:
        raise ValueError(
            "student.loss.soft has a weight, but no row has soft labels: set teacher.soft_labels.on to what the student learns"
        )
