"""The recipe of the paper's released code beside ours: the same small T5, the same rows of CommonsenseQA, the same losses for 20 steps.

The oracle is written out below: two forwards, each padded to its own batch, T5's own loss of each (a mean over that batch's target tokens),
their weighted sum, and what the released code gets from its trainer: AdamW, gradients clipped to 1, a learning rate falling linearly to 0.
It reads the raw rows, and makes its own texts, tokens and padding.

Source: google-research/distilling-step-by-step, model_utils.py (collator and loss), run.py (texts, limits, defaults).
"""

from __future__ import annotations

import copy
import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from data.batches import Order
from data.config import RationalesConfig, TaskConfig
from data.prompts import vocabulary_texts
from data.rows import RowBuilder
from data.tasks import prepare, read_task
from train.config import LossConfig, ScratchModel, StudentConfig, TeacherConfig, TrackingConfig
from train.keepers import InMemory
from train.models import load_model
from train.teacher.recorded import records
from train.tokenization import encoder, text_format, train_tokenizer
from train.tracking import Tracker, read_log
from train.trainer import TrainingRun, train
from train.world import World

NUM_ROWS, NUM_STEPS, BATCH_SIZE, SEED = 64, 20, 16, 3
MODEL = ScratchModel(from_scratch="t5", d_model=32, layers=2, heads=2, d_ff=64, vocabulary=600)
MAX_INPUT_TOKENS, MAX_TARGET_TOKENS = 1024, 256


@dataclass(frozen=True)
class Losses:
    label: list[float]
    rationale: list[float]
    total: list[float]


@pytest.fixture(scope="module")
def raw(shared_data: Path) -> list[dict[str, Any]]:
    """The first rows that have a rationale, and a few more to validate with: the released code has no row without one."""
    with lzma.open(shared_data / "cqa_train.jsonl.xz", "rt") as file:
        found = [row for row in map(json.loads, file) if row["rationale"].strip()]
    return found[: NUM_ROWS + 8]


@pytest.fixture(scope="module")
def tokenizer(raw: list[dict[str, Any]], task_folder: Path) -> PreTrainedTokenizerBase:
    return train_tokenizer(vocabulary_texts(read_task(task_folder).train), 600)


@pytest.fixture(scope="module")
def task_folder(raw: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    for name, rows in (("train", raw[:NUM_ROWS]), ("validation", raw[NUM_ROWS:])):
        (folder / f"{name}-rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: str(folder / f"{name}-rows.jsonl") for split, name in (("train", "train"), ("validation", "validation"))}
    config = TaskConfig(**files, test=files["validation"], input="{input}\nAnswer Choices:\n{choices}", choices="choices", metric="choice")
    prepare(config, seed=0, folder=folder)
    return folder


def released(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, raw: list[dict[str, Any]], *, alpha: float, learning_rate: float
) -> Losses:
    """The oracle."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, NUM_STEPS)
    collator = DataCollatorForSeq2Seq(tokenizer, model)
    found = Losses([], [], [])
    for step in range(NUM_STEPS):
        rows = [raw[n] for n in Order(NUM_ROWS, BATCH_SIZE, SEED).rows_of(step)]
        pred = model(**collator([features(tokenizer, "predict: ", row, row["label"]) for row in rows]))
        expl = model(**collator([features(tokenizer, "explain: ", row, row["rationale"].strip()) for row in rows]))
        loss = alpha * pred.loss + (1.0 - alpha) * expl.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for values, value in ((found.label, pred.loss), (found.rationale, expl.loss), (found.total, loss)):
            values.append(float(value.detach()))
    return found


def features(tokenizer: PreTrainedTokenizerBase, prefix: str, row: dict[str, Any], target: str) -> dict[str, list[int]]:
    choices = "\n".join(f"({letter}) {choice}" for letter, choice in zip("abcde", row["choices"], strict=True))

    def ids(text: str, limit: int) -> list[int]:
        # T5's tokenizer ends each text with </s>; the small one trained here is told to.
        return [*tokenizer(text, add_special_tokens=False)["input_ids"][: limit - 1], tokenizer.eos_token_id]

    inputs = ids(f"{prefix}{row['input']}\nAnswer Choices:\n{choices}", MAX_INPUT_TOKENS)
    return {"input_ids": inputs, "attention_mask": [1] * len(inputs), "labels": ids(target, MAX_TARGET_TOKENS)}


def ours(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task_folder: Path, folder: Path, loss: LossConfig, config: StudentConfig
) -> Losses:
    """The product's loop; its losses are read from its log."""
    task = read_task(task_folder)
    recorded = TeacherConfig.model_validate({"source": "recorded", "label": "{llm_label}", "rationale": "{rationale}"})
    found = {record.id: record for record in records(recorded, task.train, "train", "choice", "choices")}
    form = text_format(
        tokenizer,
        "encoder_decoder",
        max_input_tokens=MAX_INPUT_TOKENS,
        max_label_tokens=MAX_TARGET_TOKENS,
        max_rationale_tokens=MAX_TARGET_TOKENS,
    )
    builder = RowBuilder(form, encoder(tokenizer))
    rows = builder.student_rows(task.train, found, RationalesConfig(), "gold", with_rationales=True, with_soft_labels=False)
    validation = builder.student_rows(task.validation, {}, RationalesConfig(), "gold", with_rationales=False, with_soft_labels=False)
    run = TrainingRun(rows, validation, form, config, loss, SEED, folder, "oracle")

    def open_tracker(step: int) -> Tracker:
        tracking = TrackingConfig(wandb="disabled")
        return Tracker(folder, tracking, group="test", job_type="train", settings={}, enabled=True, from_step=step)

    train(model, run, World(0, 1, torch.device("cpu")), open_tracker, InMemory())
    lines = [line for line in read_log(folder / "log.jsonl") if "loss" in line]
    return Losses([line["loss_label"] for line in lines], [line["loss_rationale"] for line in lines], [line["loss"] for line in lines])


@pytest.mark.parametrize(
    ("alpha", "learning_rate", "micro_batch_tokens"),
    [(0.5, 5e-5, "auto"), (0.8, 1e-3, 1500)],
    ids=["the released defaults", "another weight, larger steps, several forwards"],
)
def test_the_released_recipe_gives_the_same_losses(
    raw: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    task_folder: Path,
    tmp_path: Path,
    alpha: float,
    learning_rate: float,
    micro_batch_tokens: Any,
) -> None:
    model = load_model(MODEL, tokenizer, seed=SEED, dtype=torch.float32)
    config = StudentConfig(
        model=MODEL,
        epochs=NUM_STEPS * BATCH_SIZE / NUM_ROWS,
        batch_size=BATCH_SIZE,
        micro_batch_tokens=micro_batch_tokens,
        learning_rate=learning_rate,
        schedule="linear",
        warmup=0.0,
        weight_decay=0.0,
        clip_norm=1.0,
        precision="fp32",
        max_input_tokens=MAX_INPUT_TOKENS,
        max_label_tokens=MAX_TARGET_TOKENS,
        max_rationale_tokens=MAX_TARGET_TOKENS,
    )
    expected = released(copy.deepcopy(model).train(), tokenizer, raw, alpha=alpha, learning_rate=learning_rate)
    found = ours(model, tokenizer, task_folder, tmp_path, LossConfig(label=alpha, rationale=1.0 - alpha), config)
    assert len(found.total) == NUM_STEPS
    for part in ("label", "rationale", "total"):
        assert getattr(found, part) == pytest.approx(getattr(expected, part), rel=1e-5), part
    # What is compared has been trained: the losses of one epoch lie below those of the epoch before by far more than the tolerance.
    epoch = NUM_ROWS // BATCH_SIZE
    assert sum(expected.total[-epoch:]) < sum(expected.total[:epoch]) * (1 - 1e-3)
