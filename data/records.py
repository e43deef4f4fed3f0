"""What a teacher wrote about one example, and its Arrow schema. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from data.soft_labels import AnswerDistribution, SoftLabels


@dataclass(frozen=True, slots=True)
class TeacherRecord:
    """One example of one split, as the teacher answered it."""

    id: str
    """The example's id (`TaskExample.id`)."""
    split: str
    """train or test."""
    text: str
    """What the teacher wrote, whole."""
    rationale: str
    label: str | None
    """The teacher's label as it wrote it; None where the output had none."""
    parseable: bool
    """The label can be used: one of the choices, a number, an expression that evaluates, or a text."""
    agrees: bool
    """The label is the gold one, as the task's metric compares."""
    generated_tokens: int = 0
    votes: int = 1
    """How many of the teacher's samples gave this label (self-consistency)."""
    rationalized: bool = False
    """The rationale was written with the gold label as a hint (STaR); `label` is what the teacher said then."""
    answers: AnswerDistribution | None = None
    """Probabilities of whole answers (soft-label formats choices and answers)."""
    label_soft: SoftLabels | None = None
    """Soft labels of the label's tokens and its end-of-sequence token."""
    rationale_soft: SoftLabels | None = None
    """Soft labels of the rationale's tokens; none of the end-of-sequence token after them, as the teacher goes on with the label there."""


SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("split", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("rationale", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("parseable", pa.bool_(), nullable=False),
        pa.field("agrees", pa.bool_(), nullable=False),
        pa.field("generated_tokens", pa.int32(), nullable=False),
        pa.field("votes", pa.int16(), nullable=False),
        pa.field("rationalized", pa.bool_(), nullable=False),
        pa.field("answers", pa.list_(pa.struct([pa.field("answer", pa.string()), pa.field("probability", pa.float32())]))),
        pa.field("label_soft", pa.binary()),
        pa.field("rationale_soft", pa.binary()),
    ]
)
