from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.config import TaskConfig
from launch.architecture import architecture_of
from launch.forecast import COMPILED_MFU, DECODING_SHARE, MFU, PREFILL_MFU, Speed, record_bytes, training_hours, writing_hours
from launch.inference_memory import SCORED_TOKENS, Inference
from launch.plan import TeacherPlan
from launch.training_memory import Step
from launch.workload import Row, inference_of, row_of, rows_of, step_of
from train.config import LossConfig, StudentConfig, TeacherConfig

# 3 + 8 + 3 matrices of 10 x 10 in a layer of width 10, a vocabulary of 100.
MODEL = architecture_of(
    {
        "model_type": "llama",
        "hidden_size": 10,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 100,
        "tie_word_embeddings": True,
    }
)
STEP = Step(processes=1, zero_stage=0, precision="bf16", tokens=100, targets=50, longest=20)
SPEED = Speed(flops=1e6, bandwidth=1e6)


def student(**knobs: Any) -> StudentConfig:
    return StudentConfig.model_validate({"model": "a/b", **knobs})


def test_hours_of_training_by_hand() -> None:
    # 400 + 600 weights of matrices, two norms and a last one of 10, and the head at every second token.
    weights = 1000 + 30 + 1000 / 2
    hours = training_hours(MODEL, STEP, 10_000, 2, SPEED)
    assert hours == pytest.approx(10_000 * 6 * weights / (2 * 1e6 * MFU) / 3600)
    assert training_hours(MODEL, replace(STEP, compiled=True), 10_000, 2, SPEED) == pytest.approx(hours * MFU / COMPILED_MFU)
    assert training_hours(MODEL, replace(STEP, checkpointing=True), 10_000, 2, SPEED) == pytest.approx(hours * 4 / 3)
    assert training_hours(MODEL, replace(STEP, adapters=1), 10_000, 2, SPEED) == pytest.approx(hours * 4 / 6)


def test_hours_of_writing_by_hand() -> None:
    plan = TeacherPlan("replica", 1, 2, 4000, True, "", slots=10)
    how = Inference(prompt=100, new=20)
    # Ten slots read the weights and 110 tokens of 40 bytes each in a step; 500 answers a copy are 1,000 steps.
    steps = 1000 * (4000 + 10 * 110 * 40) / (1e6 * DECODING_SHARE["replica"])
    prompts = 1000 * 100 * 2 * 1030 / (2 * 1e6 * PREFILL_MFU)
    assert writing_hours(MODEL, plan, how, 1000, SPEED) == pytest.approx((steps + prompts) / 3600)
    assert writing_hours(MODEL, replace(plan, sharding="zero3"), how, 1000, SPEED) is None


def test_bytes_of_records_by_hand() -> None:
    assert record_bytes(10, 100, 50, 22.7) == 10 * (400 + 1135)


def test_rows_by_hand() -> None:
    config = student(max_input_tokens=100, max_label_tokens=10, max_rationale_tokens=50)
    assert row_of(config, LossConfig()) == Row(200, 60, 149)
    assert row_of(config, LossConfig(label=1.0, rationale=0.0)) == Row(100, 10, 109)
    assert row_of(config, LossConfig(label=1.0, rationale=0.0), joint=True) == Row(100, 60, 159)


def test_a_step_is_cut_as_the_trainer_cuts_it() -> None:
    row = Row(200, 60, 149)
    alone = step_of(student(batch_size=64), MODEL, row, 1, on_gpu=True, rows=10)
    # 64 x 260 tokens are more than 16,384: two forwards.
    assert (alone.zero_stage, alone.forwards, alone.tokens, alone.targets) == (0, 2, 8320, 1920)
    four = step_of(student(batch_size=64, micro_batch_tokens=1000), MODEL, row, 4, on_gpu=True, rows=10)
    assert (four.zero_stage, four.forwards, four.tokens) == (1, 5, 832)
    one = step_of(student(batch_size=1, micro_batch_tokens=1), MODEL, row, 8, on_gpu=True, rows=10)
    assert (one.forwards, one.tokens) == (1, 149), "a longer sequence goes alone"


def test_auto_is_resolved_as_the_trainer_does() -> None:
    row = Row(200, 60, 149)
    assert step_of(student(), MODEL, row, 1, on_gpu=True, rows=10).compiled is False, "too few steps"
    assert step_of(student(), MODEL, row, 1, on_gpu=True, rows=10_000).compiled is True
    assert step_of(student(), MODEL, row, 1, on_gpu=False, rows=10_000).compiled is False
    assert step_of(student(zero_stage=3), MODEL, row, 2, on_gpu=True, rows=10_000).compiled is False
    assert step_of(student(compile="off"), MODEL, row, 1, on_gpu=True, rows=10_000).compiled is False
    assert [step_of(student(), MODEL, row, 1, on_gpu=gpu, rows=1).precision for gpu in (True, False)] == ["bf16", "fp32"]
    assert step_of(student(lora={"rank": 2, "modules": ["q_proj"]}), MODEL, row, 1, on_gpu=True, rows=1).adapters == 2 * 20
    zeros = {"method": "magnitude", "fraction": 0.5}
    assert step_of(student(prune=zeros), MODEL, row, 1, on_gpu=True, rows=1).masked == MODEL.body
    assert step_of(student(prune={**zeros, "epochs": 0}), MODEL, row, 1, on_gpu=True, rows=1).masked == 0


def test_what_a_teacher_is_asked_for() -> None:
    asked = {"source": "deepspeed", "model": "a/b", "rationales": {"max_input_tokens": 500, "max_new_tokens": 60}}
    assert inference_of(TeacherConfig.model_validate(asked)) == Inference(prompt=500, new=60, scored=0, rows=0)
    scored = inference_of(TeacherConfig.model_validate({**asked, "soft_labels": {}}))
    assert (scored.scored, scored.rows) == (SCORED_TOKENS, SCORED_TOKENS)


def test_rows_are_counted_where_that_is_quick(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3}')

    def counted(**knobs: Any) -> int | None:
        return rows_of(TaskConfig.model_validate({"train": str(rows), "test": "b.jsonl", "metric": "text", **knobs}))

    assert counted() == 3
    assert counted(max_rows=2) == 2
    assert counted(train="builtin:arithmetic") == 4000
    assert counted(train="builtin:arithmetic", arithmetic={"train_rows": 7}) == 7
    assert counted(train="hub:a/b") is None
    assert counted(train="missing.jsonl") is None
