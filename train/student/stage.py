"""The student's stage: labels, rationales and soft labels become a small model (`train.trainer` holds the loop)."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.config import RationalesConfig
from data.examples import TaskExample
from data.prompts import TextFormat, vocabulary_texts
from data.records import TeacherRecord
from data.rows import RowBuilder, TrainRow, share_of, usable_examples
from data.store import read_records
from data.tasks import Task
from train.artifacts import Checkpoint, Family
from train.config import CutModel, LossConfig, StudentConfig
from train.models import family_of, load_model, skeleton
from train.tokenization import check_same_vocabulary, encoder, load_tokenizer, text_format
from train.trainer import OpenTracker, TrainingRun, train_checkpoint
from train.world import World

if TYPE_CHECKING:
    from train.learner import LiveTeacher


_CUTTING_ROWS = 64
"""Training rows that show which neurons and heads of a teacher matter for the task."""


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
    validation_records: Mapping[str, TeacherRecord] = field(default_factory=dict)
    """What the teacher wrote about validation rows, by the example's id; a recorded teacher's only."""


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
        config: the student, as this arm trains it (`StudentConfig.of_arm`).
        loss: weights of this arm's loss.
        inputs: task, records, teacher.
        folder: of the stage; resumable state and the best model go there.
        world: the processes.
        seed: the run's: of the rows that `data_fraction` takes, and where `config.seed` is left out of initial weights, order and dropout.
        title: of the progress line.
        open_tracker: gives the tracker, from a step.

    Raises:
        ValueError: where no row has a target, or soft labels of tokens meet another vocabulary.
    """
    began = time.monotonic()
    tokenizer = load_tokenizer(config.model, texts=vocabulary_texts(inputs.task.train), folder=inputs.teacher)
    student_seed = seed if config.seed is None else config.seed
    model = load_student(config, inputs, tokenizer, seed=student_seed)
    form = student_format(config, tokenizer, family_of(model))
    rows, validation, counts = prepare_rows(config, loss, inputs, tokenizer, form, seed=seed)
    live = live_teacher(config, inputs, tokenizer, world) if loss.soft and loss.teacher == "live" else None
    training = TrainingRun(rows, validation, form, config, loss, student_seed, folder, title, began=began)
    return train_checkpoint(model, tokenizer, training, world, open_tracker, counts, live=live)


def load_student(config: StudentConfig, inputs: StudentInputs, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """The student before it learns, in fp32 on the CPU.

    Args:
        config: its source.
        inputs: its teacher, and the task by whose inputs it is chosen what of its teacher a cut student keeps.
        tokenizer: its own.
        seed: of the weights of a model from scratch.

    Raises:
        ValueError: see `train.models.load_model`.
    """
    source, samples = config.model, None
    if isinstance(source, CutModel):
        assert inputs.teacher is not None, "the configuration asks for a cut student of a live teacher only"
        builder = RowBuilder(student_format(config, tokenizer, family_of(skeleton(inputs.teacher, "teacher.model"))), encoder(tokenizer))
        rows = builder.student_rows(
            inputs.task.train[:_CUTTING_ROWS], {}, RationalesConfig(), "gold", with_rationales=False, with_soft_labels=False
        )
        samples = [(sequence.input_ids, sequence.target_ids) for row in rows for sequence in row.sequences]
    return load_model(
        source, tokenizer, seed=seed, dtype=torch.float32, teacher_folder=inputs.teacher, key="student.model", samples=samples
    )


def student_format(config: StudentConfig, tokenizer: PreTrainedTokenizerBase, family: Family) -> TextFormat:
    """How the student is called; a single-task one is asked to solve."""
    form = text_format(
        tokenizer,
        family,
        max_input_tokens=config.max_input_tokens,
        max_label_tokens=config.max_label_tokens,
        max_rationale_tokens=config.max_rationale_tokens,
    )
    return replace(form, part="solve") if config.single_task else form


def prepare_rows(
    config: StudentConfig,
    loss: LossConfig,
    inputs: StudentInputs,
    tokenizer: PreTrainedTokenizerBase,
    form: TextFormat,
    *,
    seed: int,
) -> tuple[list[TrainRow], list[TrainRow], Mapping[str, int]]:
    """What one arm learns, what it is selected by, and what was done to the rows.

    The validation rows are gold labels, in a recorded teacher's words where its labels are learned and mean the same. A student of one
    task writes its rationale first, so that it would take a decoding of each row to see which label it reaches. Its criterion is the
    label after a given rationale instead: the recorded teacher's or the task's own, and where the validation rows have neither (no
    teacher writes about them) the label right after `Answer:`. Rationale and mark count in neither figure. So its validation figures
    compare checkpoints and settings of this arm; those of other arms are of another task.

    Args:
        config: the student, as this arm trains it (`StudentConfig.of_arm`).
        loss: weights of this arm's loss.
        inputs: task, records, teacher.
        tokenizer: the student's.
        form: how the student is called (`student_format`).
        seed: the run's, of the share that `data_fraction` takes: students of other seeds learn the same rows.

    Returns:
        Rows, validation rows, and counts for the report (`rows_available`: before `data_fraction`).

    Raises:
        ValueError: where no row has a target, or soft labels of tokens meet another vocabulary.
    """
    live = loss.soft > 0 and loss.teacher == "live"
    records = {record.id: record for record in read_records(inputs.records, "train")}
    if live or (loss.soft and _on_tokens(records.values())):
        _check_same_tokens(form.family, tokenizer, inputs, live=live)
    builder, trial = RowBuilder(form, encoder(tokenizer)), RowBuilder(form, encoder(tokenizer))
    available = usable_examples(inputs.task.train, records, inputs.rationales, config.targets)
    learnt = share_of(available, config.data_fraction, seed)
    asked = [_as_taught(example, inputs.validation_records.get(example.id), config.targets) for example in inputs.task.validation]
    if config.single_task:
        rows = builder.single_task_rows(learnt, records, inputs.rationales, config.targets)
        rationales = {id: record.rationale for id, record in inputs.validation_records.items()}
        validation = trial.label_of_solution_rows(asked, rationales)
    else:
        soft = loss.soft > 0 and not live
        rows = builder.student_rows(
            learnt, records, inputs.rationales, config.targets, with_rationales=loss.rationale > 0, with_soft_labels=soft
        )
        validation = trial.student_rows(asked, {}, RationalesConfig(), "gold", with_rationales=False, with_soft_labels=False)
    _check_rows(config, loss, builder.counts, records.values())
    return rows, validation, {"rows_available": len(available), **builder.counts}


def _as_taught(example: TaskExample, record: TeacherRecord | None, targets: Literal["gold", "teacher"]) -> TaskExample:
    """An example with its label as the student learns to write it: 10 / 2, say, where the gold one is ( 10.0 / 2.0 )."""
    if targets == "gold" or record is None or record.label is None or not record.agrees:
        return example
    return replace(example, label=record.label)


def live_teacher(config: StudentConfig, inputs: StudentInputs, tokenizer: PreTrainedTokenizerBase, world: World) -> LiveTeacher:
    """The teacher, whole on this process's device, to run beside the student, in the precision of its arithmetic.

    Args:
        config: the student's.
        inputs: whose teacher.
        tokenizer: the student's, which `prepare_rows` has found to be the teacher's too.
        world: the processes.
    """
    from train.learner import LiveTeacher

    assert inputs.teacher is not None, "the configuration lets a live loss meet a live teacher only"
    dtype = torch.bfloat16 if config.computes_in_bf16(world.device.type) else torch.float32
    model = load_model(inputs.teacher, tokenizer, seed=0, dtype=dtype, key="teacher.model")
    return LiveTeacher(model.to(world.device).eval().requires_grad_(False))


def _on_tokens(records: Iterable[TeacherRecord]) -> bool:
    """The store holds distributions over token ids; distributions over answers are of texts, which any student can learn."""
    return any(record.label_soft is not None or record.rationale_soft is not None for record in records)


def _check_same_tokens(student_family: Family, tokenizer: PreTrainedTokenizerBase, inputs: StudentInputs, *, live: bool) -> None:
    assert inputs.teacher is not None, "the configuration asks for soft labels of a live teacher only"
    served = inputs.served_tokenizer
    key = "teacher.endpoint.tokenizer" if served is not None else "teacher.model"
    check_same_vocabulary(tokenizer, load_tokenizer(served or inputs.teacher, texts=None, folder=None, key=key))
    # A server goes on with its prompt's text, as a decoder-only model does.
    teacher_family = "decoder_only" if served is not None else family_of(skeleton(inputs.teacher, "teacher.model"))
    # The families write a target differently (a decoder-only model starts it with a space): its tokens would not be those scored.
    if student_family != teacher_family:
        records = "student.loss.teacher to records and " if live else ""
        raise ValueError(
            f"student.loss.soft needs a student of the teacher's family, but the teacher is {teacher_family} and the student "
            f"{student_family}: choose a student like the teacher, set {records}teacher.soft_labels.format to choices or answers, which "
            "are texts, or set soft to 0"
        )


def _check_rows(config: StudentConfig, loss: LossConfig, counts: Mapping[str, int], records: Collection[TeacherRecord]) -> None:
    if not counts["rows"]:
        raise ValueError(
            "the student has no row to learn: teacher.rationales.keep with drop_rows, or student.targets: teacher, leaves none; loosen them"
        )
    if (loss.rationale or config.single_task) and not counts["rationale_rows"]:
        asked = "student.single_task is true" if config.single_task else "student.loss.rationale has a weight"
        raise ValueError(f"{asked}, but no record has a rationale that teacher.rationales.keep lets pass; loosen keep")
    if loss.soft and loss.teacher == "records" and not counts["soft_label_rows"]:
        usable = sum(record.parseable for record in records)
        raise ValueError(
            f"student.loss.soft has a weight, but no row has soft labels; {usable} of {len(records)} records hold a usable answer. With "
            "teacher.soft_labels.format top_k or sampled, set teacher.soft_labels.on to what the student learns; with answers, see in the "
            "records' texts why none could be read (cut by teacher.rationales.max_new_tokens, or too little tuning); or set soft to 0"
        )
