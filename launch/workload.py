"""What a configuration gives a teacher and a student to do: sequences, forwards, steps. Arithmetic only: imports no torch.

Every sequence is taken to be as long as the configuration lets it be, so memory and hours are upper bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.config import ArithmeticConfig, TaskConfig
from launch.architecture import Architecture
from launch.inference_memory import SCORED_TOKENS, Inference
from launch.training_memory import Step, adapter_parameters
from train.config import LossConfig, StudentConfig, TeacherConfig, TrainingConfig

AUTO_TOKENS = 16_384
"""Of a forward where `micro_batch_tokens` is auto (`train.trainer`)."""
WORTH_COMPILING = 300
"""Steps from which on `compile: auto` compiles (`train.passes`)."""
ROWS = 10_000
"""Training rows where only reading the data would tell."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one example gives to learn, at its longest."""

    inputs: int
    """Tokens of its inputs, over all its sequences."""
    targets: int
    longest: int
    """Tokens that the model reads of its longest sequence."""

    @property
    def tokens(self) -> int:
        """That a forward computes."""
        return self.inputs + self.targets


def row_of(config: TrainingConfig, loss: LossConfig, *, joint: bool = False) -> Row:
    """A label and, where it is learnt, a rationale, each after the input; or both after one input (`joint`)."""
    label, rationale = config.max_label_tokens, config.max_rationale_tokens
    if joint:
        return Row(config.max_input_tokens, label + rationale, config.max_input_tokens + label + rationale - 1)
    if not loss.rationale:
        return Row(config.max_input_tokens, label, config.max_input_tokens + label - 1)
    longest = config.max_input_tokens + max(label, rationale) - 1
    return Row(2 * config.max_input_tokens, label + rationale, longest)


def step_of(
    config: TrainingConfig, model: Architecture, row: Row, processes: int, *, on_gpu: bool, rows: int, live: Architecture | None = None
) -> Step:
    """A training step, `auto` resolved as the trainer does.

    Args:
        config: of the training.
        model: that is trained.
        row: what an example gives.
        processes: that share a step.
        on_gpu: else on a CPU.
        rows: of the training split.
        live: a teacher beside the student.
    """
    stage: Literal[0, 1, 2, 3] = (0 if processes == 1 else 1) if config.zero_stage == "auto" else config.zero_stage
    most = AUTO_TOKENS if config.micro_batch_tokens == "auto" else config.micro_batch_tokens
    share = max(row.longest, -(-config.batch_size * row.tokens // processes))
    forwards = -(-share // max(most, row.longest))
    computed = -(-share // forwards)
    targets = max(1, computed * row.targets // row.tokens)
    both = model.family == "encoder_decoder"
    steps = rows * config.epochs / config.batch_size
    compiled = on_gpu and stage != 3 and (config.compile in ("layers", "graphs") or (config.compile == "auto" and steps >= WORTH_COMPILING))
    lora, prune = config.lora, config.prune if isinstance(config, StudentConfig) else None
    return Step(
        processes=processes,
        zero_stage=stage,
        precision="bf16" if config.computes_in_bf16("cuda" if on_gpu else "cpu") else "fp32",
        tokens=computed - targets if both else computed,
        targets=targets,
        longest=row.longest,
        forwards=forwards,
        offload=config.offload_optimizer,
        checkpointing=config.activation_checkpointing,
        compiled=compiled,
        graphs=compiled and stage == 0 and config.compile != "layers" and model.packs,
        adapters=adapter_parameters(model, lora.rank, lora.modules) if lora is not None else None,
        masked=model.body if prune is not None and prune.makes_zeros and prune.epochs else 0,
        live=live,
    )


def inference_of(config: TeacherConfig) -> Inference:
    """What the teacher is asked for."""
    prompt = config.rationales.max_input_tokens if config.tune is None else config.tune.max_input_tokens
    soft = config.soft_labels
    scored = SCORED_TOKENS if soft is not None and soft.format != "answers" else 0
    return Inference(prompt=prompt, new=config.rationales.max_new_tokens, scored=scored, rows=scored)


def rows_of(task: TaskConfig) -> int | None:
    """Training rows, where that is told without reading any: the lines of a plain .jsonl file, or the generator's number."""
    path = Path(task.train)
    count: int | None = None
    if task.train == "builtin:arithmetic":
        count = (task.arithmetic or ArithmeticConfig.model_validate({})).train_rows
    elif path.suffix == ".jsonl" and path.is_file():
        with path.open("rb") as file:
            count = sum(1 for line in file if line.strip())
    if count is not None and task.max_rows is not None:
        count = min(count, task.max_rows)
    return count
