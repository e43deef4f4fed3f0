"""A student of each family goes all the way, from recorded rationales to an int8 file that answers as the fp32 model does."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.rundir import read_stages

Start = Callable[..., subprocess.Popen[str]]
ANIMALS = {"cat": "milk", "dog": "meat", "cow": "grass", "hen": "corn", "bee": "nectar", "owl": "mice", "seal": "fish", "goat": "hay"}


def write_rows(path: Path, count: int, seed: int) -> None:
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            name, (animal, food) = draw.choice(["Ann", "Bob", "Cid", "Dora", "Eve", "Fred"]), draw.choice(list(ANIMALS.items()))
            row = {"input": f"{name} has {draw.randint(1, 99)} of one kind: a {animal}.", "label": food, "llm_label": food}
            file.write(json.dumps({**row, "rationale": f"A {animal} likes {food}."}) + "\n")


@pytest.mark.parametrize("family", [pytest.param("t5", marks=pytest.mark.slow), "llama"])  # the quickstart runs a t5
def test_int8_answers_as_fp32_does_on_98_of_100_items(family: str, tmp_path: Path, start: Start) -> None:
    write_rows(tmp_path / "train.jsonl", 400, 1)
    write_rows(tmp_path / "test.jsonl", 150, 2)
    config: dict[str, Any] = {
        "name": family,
        "task": {"train": "train.jsonl", "test": "test.jsonl", "metric": "text"},
        "teacher": {"source": "recorded", "label": "{llm_label}", "rationale": "{rationale}"},
        "student": {
            "model": {"from_scratch": family, "d_model": 32, "layers": 1, "heads": 2, "d_ff": 64, "vocabulary": 320},
            "epochs": 12,
            "batch_size": 32,
            "learning_rate": 5e-3,
            "max_label_tokens": 8,
        },
        "evaluate": {"timed_examples": 2},
        "tracking": {"wandb": "disabled"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    process = start(tmp_path, "run", "config.yaml")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    stages = read_stages(tmp_path / "runs" / family)
    answers = [
        [json.loads(line) for line in (stages[f"evaluate.{rung}"] / "answers.jsonl").read_text().splitlines()]
        for rung in ("step_by_step", "ctranslate2-int8")
    ]
    assert [a["id"] for a in answers[0]] == [a["id"] for a in answers[1]]
    same = sum(a["answer"] == b["answer"] for a, b in zip(*answers, strict=True))
    assert same >= 0.98 * 150
    # Answers that were never learnt could agree by all being empty.
    assert sum(a["correct"] for a in answers[1]) >= 0.9 * 150
