"""Knobs of tasks and records. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Metric = Literal["choice", "number", "expression", "text"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ArithmeticConfig(Section):
    """The generator behind `builtin:arithmetic`: word problems with a known solution."""

    train_rows: int = Field(4000, ge=1, description="Problems in the training split.")
    validation_rows: int = Field(200, ge=1, description="Problems in the validation split.")
    test_rows: int = Field(500, ge=1, description="Problems in the test split.")
    min_steps: int = Field(1, ge=1, le=3, description="Fewest arithmetic steps in a problem (1 to 3).")
    max_steps: int = Field(2, ge=1, le=3, description="Most arithmetic steps in a problem (1 to 3).")
    max_number: int = Field(9, ge=3, le=999, description="Largest number that a problem mentions.")

    @model_validator(mode="after")
    def _steps_in_order(self) -> Self:
        if self.min_steps > self.max_steps:
            raise ValueError(f"min_steps is {self.min_steps}, more than max_steps ({self.max_steps}): lower min_steps")
        return self


class TaskConfig(Section):
    """Where the examples come from, how a row becomes an input and a label, and how answers are compared."""

    train: str = Field(
        description="Training rows: a .jsonl (also .gz, .xz) or .parquet file, hub:OWNER/NAME[:CONFIG][@SPLIT] "
        "(SPLIT is this key's name where left out), or builtin:arithmetic."
    )
    validation: str | None = Field(
        None,
        description="Rows for model selection, written as `train` is; left out, a part of `train` is set aside (`validation_fraction`).",
    )
    test: str = Field(description="Test rows, written as `train` is; scored once, never used for selection.")
    validation_fraction: float = Field(
        0.1, gt=0.0, lt=1.0, description="Share of the training rows set aside for model selection where `validation` is left out."
    )
    input: str = Field("{input}", description="Template over a row's fields that makes the model's input.")
    label: str = Field("{label}", description="Template over a row's fields that makes the gold label.")
    rationale: str | None = Field(
        None,
        description="Template over a row's fields for a human rationale (gold solution), where the data has one; "
        "a tuned teacher learns from it.",
    )
    choices: str | None = Field(None, description="Name of the row's field that lists the answer choices (metric `choice`).")
    metric: Metric = Field(description="How an answer is compared with the label: choice, number, expression (by value) or text.")
    max_rejected: Fraction = Field(0.01, description="Largest share of rows (0 to 1) that may be rejected before the run stops.")
    max_rows: int | None = Field(None, ge=1, description="Use only the first N rows of the training split; all where left out.")
    arithmetic: ArithmeticConfig | None = Field(None, description="Knobs of builtin:arithmetic.")

    @model_validator(mode="after")
    def _no_idle_knobs(self) -> Self:
        builtin = [s for s in (self.train, self.validation, self.test) if s and s.startswith("builtin:")]
        if self.arithmetic is not None and not builtin:
            raise ValueError("arithmetic has no effect: no split reads builtin:arithmetic; remove it")
        if (
            self.arithmetic is not None
            and "validation_rows" in self.arithmetic.model_fields_set
            and self.validation != "builtin:arithmetic"
        ):
            raise ValueError("arithmetic.validation_rows has no effect unless validation is builtin:arithmetic: set that, or remove it")
        if self.choices is not None and self.metric != "choice":
            raise ValueError(f"choices has no effect with metric {self.metric!r}: remove it, or set metric to choice")
        if self.choices is None and self.metric == "choice":
            raise ValueError("metric is choice but choices is missing: name the field that lists the answer choices")
        if self.validation is not None and "validation_fraction" in self.model_fields_set:
            raise ValueError("validation_fraction has no effect where validation is given: remove one of them")
        return self


class RationalesConfig(Section):
    """What the teacher is asked for, and which of its rationales the student learns from."""

    examples: str | None = Field(
        None, description="YAML file of few-shot examples (a list of input, rationale, label) that open the prompt."
    )
    shots: int = Field(8, ge=1, description="How many of the few-shot examples to use, in the file's order.")
    max_input_tokens: int = Field(2048, ge=16, description="Most tokens of a prompt; a longer one loses its earliest examples.")
    max_new_tokens: int = Field(128, ge=1, description="Most tokens the teacher writes for one example.")
    keep: Literal["all", "agreeing", "parseable"] = Field(
        "all",
        description="Rationales to train on: all, those whose label is the gold one (agreeing), those with a usable label (parseable).",
    )
    drop_rows: bool = Field(False, description="Drop the whole row, label too, where `keep` leaves its rationale out.")

    @model_validator(mode="after")
    def _no_idle_knobs(self) -> Self:
        if self.examples is None and "shots" in self.model_fields_set:
            raise ValueError("shots has no effect without examples: name a YAML file of few-shot examples, or remove shots")
        if self.drop_rows and self.keep == "all":
            raise ValueError("drop_rows has no effect with keep: all; set keep to agreeing or parseable, or remove drop_rows")
        return self


class SoftLabelsConfig(Section):
    """The teacher's distribution over the vocabulary, stored for the student's soft-label loss."""

    on: Literal["label", "rationale", "both"] = Field("label", description="Target tokens that get a soft label.")
    format: Literal["top_k"] = Field("top_k", description="top_k: the k largest probabilities and the missing mass.")
    k: int = Field(32, ge=1, description="Probabilities stored for each token.")
