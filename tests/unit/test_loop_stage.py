"""The whole stage with the decoding loop in place of plain `generate`: chunks in flight together, hints and scores, the same records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data import store
from data.examples import TaskExample
from data.store import read_records
from data.tasks import Task
from train.config import ScratchModel, TeacherConfig, TrackingConfig
from train.models import load_model, save_model
from train.teacher import claims, generate, stage
from train.teacher.decode import LoopWriter
from train.teacher.stage import TeacherInputs
from train.tokenization import text_format, train_tokenizer
from train.tracking import Tracker
from train.world import World

WORLD = World(0, 1, torch.device("cpu"))
DIGITS = [str(n) for n in range(10)]


@pytest.fixture
def config(tmp_path: Path) -> TeacherConfig:
    """A teacher of random weights: it never comes to an answer, so every training example is asked again with a hint."""
    tokenizer = train_tokenizer([f"Answer: {digit}" for digit in DIGITS], 300)
    source = ScratchModel(from_scratch="llama", d_model=32, layers=2, heads=4, d_ff=64)
    model = load_model(source, tokenizer, seed=3, dtype=torch.float32)
    for name, parameter in model.model.layers.named_parameters():
        if "proj" in name:
            parameter.data *= 12
    form = text_format(tokenizer, "decoder_only", max_input_tokens=400, max_label_tokens=8, max_rationale_tokens=32)
    save_model(model, tokenizer, form, tmp_path / "model")
    shots = [{"input": f"{digit} and 1", "rationale": f"we add {digit} and 1", "label": digit} for digit in DIGITS[:4]]
    (tmp_path / "shots.yaml").write_text(yaml.safe_dump(shots))
    return TeacherConfig.model_validate(
        {
            "source": "deepspeed",
            "model": str(tmp_path / "model"),
            "batch_size": 7,
            "rationales": {
                "examples": str(tmp_path / "shots.yaml"),
                "shots": 4,
                "max_new_tokens": 12,
                "samples": 3,
                "temperature": 2.0,
                "rationalize": True,
            },
            "soft_labels": {"on": "both", "format": "sampled", "draws": 5},
        }
    )


def records(config: TeacherConfig, folder: Path) -> dict[str, list[Any]]:
    sizes = {"train": 23, "test": 5}
    splits = {split: [TaskExample(f"{split}{n}", f"{n} and 1", str(n % 5)) for n in range(num)] for split, num in sizes.items()}
    inputs = TeacherInputs(Task(splits["train"], [], splits["test"]), "number", None, None)
    quiet = TrackingConfig(wandb="disabled")
    with Tracker(folder, quiet, group="g", job_type="teach", settings={}, enabled=False) as tracker:
        stage.run(config, inputs, folder / "store", WORLD, seed=1, tracker=tracker)
    return {split: read_records(folder / "store", split) for split in splits}


def plain(record: Any) -> dict[str, Any]:
    """A record without its arrays, whose last bits follow from the batch."""
    values = {name: getattr(record, name) for name in record.__slots__ if not name.endswith("_soft")}
    soft = {name: getattr(record, name) for name in ("label_soft", "rationale_soft")}
    return {**values, **{name: None if s is None else (s.ids.tolist(), s.counts.tolist()) for name, s in soft.items()}}


def test_the_stage_writes_the_same_records_with_the_loop(config: TeacherConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK", 4)
    monkeypatch.setattr(claims, "CHUNK", 4)
    expected = records(config, tmp_path / "plain")
    made: list[LoopWriter] = []

    def looped(*arguments: Any, **options: Any) -> LoopWriter:
        made.append(LoopWriter(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(generate, "PlainWriter", looped)
    found = records(config, tmp_path / "loop")
    assert len(made) == 1
    assert made[0]._prefix, "the examples that all prompts share are computed once"
    for split, made_of in expected.items():
        assert [plain(record) for record in found[split]] == [plain(record) for record in made_of]
    assert len({record.text for record in expected["train"]}) > 15
