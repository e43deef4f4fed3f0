"""The published agreement of the recorded PaLM labels, through the product's own loader and scorer."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from data.config import TaskConfig
from data.examples import TaskExample
from data.tasks import prepare, read_task, render
from train.scoring import equal, parse_answer

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared real data, which a clone does not have")


class Agreement(NamedTuple):
    rows: int
    correct: int
    unusable: int


def _task(name: str) -> TaskConfig:
    values = {"train": str(DATA / f"{name}_train.jsonl.xz"), "test": str(DATA / f"{name}_test.jsonl.xz"), "max_rejected": 0.0}
    if name == "svamp":
        return TaskConfig.model_validate({**values, "metric": "expression"})
    return TaskConfig.model_validate({**values, "metric": "choice", "choices": "choices", "input": "{input}\nAnswer Choices:\n{choices}"})


def _agreement(examples: list[TaskExample], config: TaskConfig) -> Agreement:
    answers = [parse_answer(render("{llm_label}", e.fields, choices_field=config.choices), config.metric, e.choices) for e in examples]
    correct = sum(equal(answer, e.label, config.metric, e.choices) for answer, e in zip(answers, examples, strict=True))
    return Agreement(len(examples), correct, answers.count(None))


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [("cqa", Agreement(9741, 7234, 448), Agreement(1221, 943, 46)), ("svamp", Agreement(800, 586, 34), Agreement(200, 148, 7))],
)
def test_recorded_labels_agree_with_gold_as_published(name: str, train: Agreement, test: Agreement, tmp_path: Path) -> None:
    config = _task(name)
    summary = prepare(config, seed=0, folder=tmp_path)
    task = read_task(tmp_path)
    assert summary.rejected == {"train": 0, "validation": 0, "test": 0}
    assert (tmp_path / "rejected.jsonl").read_text() == ""
    assert _agreement(task.train + task.validation, config) == train
    assert _agreement(task.test, config) == test
    if name == "cqa":
        _check_first_cqa_row(task.test[0])


def _check_first_cqa_row(first: TaskExample) -> None:
    """The input has the form of the paper's."""
    assert first.input == (
        "A beaver is know for building prowess, their supplies come from where?\nAnswer Choices:\n"
        "(a) british columbia\n(b) body of water\n(c) wooded area\n(d) pay debts\n(e) zoo"
    )
    assert first.label == "wooded area"
    assert render("{rationale}", first.fields).startswith("The answer must be the place where beavers get their supplies.")
