"""The student's stage: labels, rationales and soft labels become a small model (`train.trainer` holds the loop)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.config import RationalesConfig
from data.prompts import vocabulary_texts
from data.records import TeacherRecord
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
    """The live teacher's model: folder of the tuned one, else its name (a server's own name of it, too); None for a recorded teacher."""
    served_tokenizer: str | None = None
    """Of a teacher behind a server: the tokenizer by whose ids its soft labels are stored (`teacher.endpoint.tokenizer`)."""


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
        ValueError: where no row has a target, or soft labels of tokens meet another vocabulary.
    """
    source = config.model
    tokenizer = load_tokenizer(source, texts=vocabulary_texts(inputs.task.train), folder=inputs.teacher)
    model = load_model(source, tokenizer, seed=seed, dtype=torch.float32, teacher_folder=inputs.teacher, key="student.model")
    records = {record.id: record for record in read_records(inputs.records, "train")}
    if loss.soft and _on_tokens(records.values()):
        _check_same_tokens(model, tokenizer, inputs)
    form = text_format(
        tokenizer,
        family_of(model),
        max_input_tokens=config.max_input_tokens,
        max_label_tokens=config.max_label_tokens,
        max_rationale_tokens=config.max_rationale_tokens,
    )
    builder = RowBuilder(form, encoder(tokenizer))
    rows = builder.student_rows(
        inputs.task.train, records, inputs.rationales, config.targets, with_rationales=loss.rationale > 0, with_soft_labels=loss.soft > 0
    )
    _check_rows(rows, builder.counts, loss, records.values())
    validation = RowBuilder(form, encoder(tokenizer)).student_rows(
        inputs.task.validation, {}, RationalesConfig(), "gold", with_rationales=False, with_soft_labels=False
    )
    return train_checkpoint(
        model, tokenizer, TrainingRun(rows, validation, form, config, loss, seed, folder, title), world, open_tracker, builder.counts
    )


def _on_tokens(records: Iterable[TeacherRecord]) -> bool:
    """The store holds distributions over token ids; distributions over answers are of texts, which any student can learn."""
    return any(record.label_soft is not None or record.rationale_soft is not None for record in records)


def _check_same_tokens(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: StudentInputs) -> None:
    assert inputs.teacher is not None, "the configuration asks for soft labels of a live teacher only"
    served = inputs.served_tokenizer
    key = "teacher.endpoint.tokenizer" if served is not None else "teacher.model"
    check_same_vocabulary(tokenizer, load_tokenizer(served or inputs.teacher, texts=None, folder=None, key=key))
    # A server goes on with its prompt's text, as a decoder-only model does.
    teacher_family = "decoder_only" if served is not None else family_of(skeleton(inputs.teacher, "teacher.model"))
    student_family = family_of(student)
    # The families write a target differently (a decoder-only model starts it with a space): its tokens would not be those scored.
    if student_family != teacher_family:
        raise ValueError(
            f"student.loss.soft needs a student of the teacher's family, but the teacher is {teacher_family} and the student "
            f"{student_family}: choose a student like the teacher, set teacher.soft_labels.format to choices or answers, which are "
            "texts, or set soft to 0"
        )


def _check_rows(rows: list[TrainRow], counts: Mapping[str, int], loss: LossConfig, records: Collection[TeacherRecord]) -> None:
    if not rows:
        raise ValueError(
            "the student has no row to learn: teacher.rationales.keep with drop_rows, or student.targets: teacher, leaves none; loosen them"
        )
    if loss.rationale and not counts["rationale_rows"]:
        raise ValueError(
            "student.loss.rationale has a weight, but no record has a rationale that teacher.rationales.keep lets pass; loosen keep"
        )
    if loss.soft and not counts["soft_label_rows"]:
        usable = sum(record.parseable for record in records)
        raise ValueError(
            f"student.loss.soft has a weight, but no row has soft labels; {usable} of {len(records)} records hold a usable answer. With "
            "teacher.soft_labels.format top_k or sampled, set teacher.soft_labels.on to what the student learns; with answers, see in the "
            "records' texts why none could be read (cut by teacher.rationales.max_new_tokens, or too little tuning); or set soft to 0"
        )
