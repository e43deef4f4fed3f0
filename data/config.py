"""Knobs of tasks and records. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Metric = Literal["choice", "number", "expression", "text"]
CHOICES_FIELD = "choices"
"""Of every row, where the configuration lists the choices."""
MAX_CHOICES = 26
"""As many as there are letters."""
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
        description="Training rows: a .jsonl (also .gz, .xz), .parquet, .csv or .tsv file, hub:OWNER/NAME[:CONFIG][@SPLIT] "
        "(SPLIT is this key's name where left out; several are joined by +), or builtin:arithmetic."
    )
    validation: str | None = Field(
        None,
        description="Rows for model selection, written as `train` is; left out, a part of `train` is set aside (`validation_fraction`).",
    )
    test: str | None = Field(
        None,
        description="Test rows, written as `train` is; scored once, never used for selection. Without such a file: `test_fraction`.",
    )
    test_fraction: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="Share of the training rows set aside as test rows, all rows of one input together; in place of `test`.",
    )
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
    choices: str | list[str] | None = Field(
        None,
        description="Answer choices (metric `choice`): the name of the row's field that lists them (or holds their list as `text`), or a "
        "list of those of all rows, which templates find as {choices}.",
    )
    metric: Metric = Field(description="How an answer is compared with the label: choice, number, expression (by value) or text.")
    max_rejected: Fraction = Field(0.01, description="Largest share of rows (0 to 1) that may be rejected before the run stops.")
    max_rows: int | None = Field(None, ge=1, description="Use only the first N rows of the training split; all where left out.")
    arithmetic: ArithmeticConfig | None = Field(None, description="Knobs of builtin:arithmetic.")

    @property
    def choices_field(self) -> str | None:
        """The field of a row that lists its choices, given there or added to every row."""
        return CHOICES_FIELD if isinstance(self.choices, list) else self.choices

    @model_validator(mode="after")
    def _choices_are_choices(self) -> Self:
        if isinstance(self.choices, list) and not 2 <= len(set(filter(str.strip, self.choices))) == len(self.choices) <= MAX_CHOICES:
            raise ValueError(f"choices is {self.choices}: list 2 to {MAX_CHOICES} different ones, none of them empty")
        return self

    @model_validator(mode="after")
    def _test_rows_have_a_source(self) -> Self:
        if (self.test is None) == (self.test_fraction is None):
            both = "test and test_fraction both say" if self.test is not None else "neither test nor test_fraction says"
            raise ValueError(
                f"{both} where the test rows come from: name a source in test, or set test_fraction (such as 0.2) to set a share of train "
                "aside"
            )
        if self.test_fraction is not None and self.train.startswith("builtin:"):
            raise ValueError(f"test_fraction is for a file or a data set: write test: {self.train}, which has test rows of its own")
        return self

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
        None, description="YAML file of few-shot examples that open the prompt (configs/prompts/ holds some), its path as seen from here."
    )
    shots: int = Field(8, ge=1, description="How many of the few-shot examples to use, in the file's order.")
    chat: Literal["auto", "never"] = Field(
        "auto", description="auto: a teacher that was not tuned is asked through its chat template where it has one; never: in plain text."
    )
    max_input_tokens: int = Field(2048, ge=16, description="Most tokens of a prompt; a longer one loses its earliest examples.")
    max_new_tokens: int = Field(128, ge=1, description="Most tokens the teacher writes for one example.")
    samples: int = Field(
        1,
        ge=1,
        le=256,
        description="Answers drawn for each example; the majority's label and its first rationale are kept (self-consistency).",
    )
    temperature: float | None = Field(
        None, ge=0.0, le=10.0, description="Sampling temperature; 0 is greedy. Where left out: 0 for one sample, 0.7 for several."
    )
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="Sample from the most probable tokens that hold this share of the mass.")
    rationalize: bool = Field(
        False, description="Ask again, the gold label given as a hint, where the teacher's label was wrong or missing (STaR)."
    )
    keep: Literal["all", "agreeing", "parseable"] = Field(
        "all",
        description="Rationales to train on: all, those whose label is the gold one (agreeing), those with a usable label (parseable).",
    )
    drop_rows: bool = Field(False, description="Drop the whole row, label too, where `keep` leaves its rationale out.")

    @property
    def sampling_temperature(self) -> float:
        """`temperature`, resolved where it was left out."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.samples == 1 else 0.7

    @model_validator(mode="after")
    def _no_idle_knobs(self) -> Self:
        if self.examples is None and "shots" in self.model_fields_set:
            raise ValueError("shots has no effect without examples: name a YAML file of few-shot examples, or remove shots")
        if self.drop_rows and self.keep == "all":
            raise ValueError("drop_rows has no effect with keep: all; set keep to agreeing or parseable, or remove drop_rows")
        if self.sampling_temperature == 0 and self.samples > 1:
            raise ValueError(f"samples is {self.samples} at temperature 0, which gives the same answer each time: raise temperature")
        if self.sampling_temperature == 0 and "top_p" in self.model_fields_set:
            raise ValueError("top_p has no effect on greedy decoding: set temperature above 0, or remove top_p")
        return self


class SoftLabelsConfig(Section):
    """What of the teacher's uncertainty is stored for the student's soft-label loss."""

    on: Literal["label", "rationale", "both"] = Field(
        "label", description="Target tokens that get a soft label (formats top_k and sampled)."
    )
    format: Literal["top_k", "sampled", "choices", "answers"] = Field(
        "top_k",
        description="top_k: the k largest probabilities of each token and the missing mass; sampled: tokens drawn from each distribution "
        "(unbiased, a quarter of the bytes); choices: probabilities of the answer choices; answers: how often each answer was sampled. "
        "The last two need no shared vocabulary.",
    )
    k: int = Field(32, ge=1, description="Probabilities stored for each token (top_k).")
    draws: int = Field(50, ge=1, le=4096, description="Tokens drawn at each position (sampled).")
    temperature: float = Field(
        1.0, gt=0.0, le=10.0, description="Temperature of the distribution drawn from, and of the student's against it (sampled)."
    )
    likelihood: Literal["sum", "mean"] = Field(
        "sum", description="Log-likelihood of a choice before the softmax: summed over its tokens, or their mean (choices)."
    )

    @property
    def on_tokens(self) -> bool:
        """Stored token by token, so that teacher and student must share a vocabulary."""
        return self.format in ("top_k", "sampled")

    @model_validator(mode="after")
    def _no_idle_knobs(self) -> Self:
        owners = {
            "k": ("top_k",),
            "draws": ("sampled",),
            "temperature": ("sampled",),
            "likelihood": ("choices",),
            "on": ("top_k", "sampled"),
        }
        for key, formats in owners.items():
            if key in self.model_fields_set and self.format not in formats:
                raise ValueError(f"{key} has no effect with format: {self.format}; remove it, or set format to {' or '.join(formats)}")
        return self
