from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.config import RationalesConfig
from data.examples import TaskExample
from data.records import TeacherRecord
from data.soft_labels import AnswerDistribution, Sampled, SoftLabels, TopK
from data.tasks import Task
from train import models
from train.config import LossConfig, ScratchModel, StudentConfig
from train.engine import World
from train.student import stage
from train.tokenization import train_tokenizer
from train.tracking import Tracker
from train.trainer import TrainingRun

EXAMPLES = [TaskExample(f"e{n}", f"{n} + {n}?", str(2 * n)) for n in range(6)]
TASK = Task(EXAMPLES, EXAMPLES[:2], [])
SMALL = {"d_model": 16, "layers": 1, "heads": 2, "vocabulary": 300}
TOKENIZER = train_tokenizer(["0 + 1? 2345", "another text altogether"], 300)
ONE = np.ones(1, np.int32)
TOP_K = TopK(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32), np.zeros(1, np.float32))
DRAWN = Sampled(ONE, ONE, ONE, np.zeros(1, np.float32), draws=1, temperature=1.0)
RECORDS = [TeacherRecord(e.id, "train", "", "why", e.label, parseable=True, agrees=True) for e in EXAMPLES]
ANSWERED = [replace(r, answers=AnswerDistribution((str(n), "0"), (0.75, 0.25))) for n, r in enumerate(RECORDS)]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a T5 and of a Llama with one tokenizer, which is not that of a student from scratch."""
    folders = {}
    for family in ("t5", "llama"):
        model = models.load_model(ScratchModel(from_scratch=family, **SMALL), TOKENIZER, seed=0, dtype=torch.float32)
        form = models.text_format(TOKENIZER, models.family_of(model), max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32)
        folders[family] = str(tmp_path_factory.mktemp(family) / "model")
        models.save_model(model, TOKENIZER, form, Path(folders[family]))
    return folders


def learn(
    monkeypatch: pytest.MonkeyPatch, records: list[TeacherRecord], student: dict[str, Any] | str, teacher: str, served: str | None = None
) -> TrainingRun:
    """What the stage hands to the training loop."""
    handed: list[TrainingRun] = []
    monkeypatch.setattr(stage, "read_records", lambda folder, split: records)
    monkeypatch.setattr(stage, "train_checkpoint", lambda model, tokenizer, run, *rest: handed.append(run))
    inputs = stage.StudentInputs(TASK, Path(), RationalesConfig(), teacher, served)
    config = StudentConfig.model_validate({"model": student})

    def tracker(step: int) -> Tracker:
        raise AssertionError("nothing is trained here")

    world = World(0, 1, torch.device("cpu"))
    stage.run(config, LossConfig(soft=0.5), inputs, Path(), world, seed=0, title="train", open_tracker=tracker)
    return handed[0]


def on_tokens(soft: SoftLabels) -> list[TeacherRecord]:
    return [replace(record, label_soft=soft) for record in RECORDS]


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_student_of_any_family_and_vocabulary_learns_answers(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    # The teacher is a name that only its server knows: nothing of it is opened.
    run = learn(monkeypatch, ANSWERED, {"from_scratch": family, **SMALL}, "some-large-model")
    assert [[s.weight for s in row.sequences] for row in run.rows] == [[None, None, 0.75, 0.25]] * 6


@pytest.mark.parametrize("soft", [TOP_K, DRAWN], ids=["top_k", "sampled"])
def test_distributions_over_tokens_need_the_teachers_vocabulary(
    monkeypatch: pytest.MonkeyPatch, teachers: dict[str, str], soft: SoftLabels
) -> None:
    with pytest.raises(ValueError, match=r"^student\.loss\.soft needs one vocabulary, but \d+ tokens differ"):
        learn(monkeypatch, on_tokens(soft), {"from_scratch": "t5", **SMALL}, teachers["t5"])
    run = learn(monkeypatch, on_tokens(soft), teachers["t5"], teachers["t5"])
    assert [row.sequences[0].soft is not None for row in run.rows] == [True] * 6


@pytest.mark.parametrize("soft", [TOP_K, DRAWN], ids=["top_k", "sampled"])
def test_distributions_over_tokens_need_the_teachers_family(
    monkeypatch: pytest.MonkeyPatch, teachers: dict[str, str], soft: SoftLabels
) -> None:
    with pytest.raises(ValueError, match="but the teacher is decoder_only and the student encoder_decoder") as raised:
        learn(monkeypatch, on_tokens(soft), teachers["t5"], teachers["llama"])
    assert "set teacher.soft_labels.format to choices or answers" in str(raised.value)


def test_the_tokens_of_a_server_are_those_of_the_tokenizer_named_for_it(monkeypatch: pytest.MonkeyPatch, teachers: dict[str, str]) -> None:
    run = learn(monkeypatch, on_tokens(TOP_K), teachers["llama"], "some-large-model", teachers["llama"])
    assert len(run.rows) == 6
    with pytest.raises(ValueError, match="but the teacher is decoder_only and the student encoder_decoder"):
        learn(monkeypatch, on_tokens(TOP_K), teachers["t5"], "some-large-model", teachers["llama"])
    with pytest.raises(ValueError, match=r"^student\.loss\.soft needs one vocabulary"):
        learn(monkeypatch, on_tokens(TOP_K), {"from_scratch": "llama", **SMALL}, "some-large-model", teachers["llama"])
    with pytest.raises(ValueError, match=r"^teacher\.endpoint\.tokenizer is 'nowhere/'"):
        learn(monkeypatch, on_tokens(TOP_K), teachers["llama"], "some-large-model", "nowhere/")


def test_no_soft_label_at_all_is_told(monkeypatch: pytest.MonkeyPatch, teachers: dict[str, str]) -> None:
    records = [*RECORDS[:4], *(replace(record, parseable=False) for record in RECORDS[4:])]
    with pytest.raises(ValueError, match=r"no row has soft labels; 4 of 6 records hold a usable answer\. .* set teacher\.soft_labels\.on"):
        learn(monkeypatch, records, teachers["t5"], teachers["t5"])
