"""Many trainings in one process give what each would give in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.config import RationalesConfig
from data.examples import TaskExample
from data.prompts import label_of
from data.records import TeacherRecord
from data.tasks import Task
from train.config import StudentConfig, TrackingConfig
from train.runtimes import answers, open_runtime
from train.student import stage, trials
from train.student.results import Trial, TrialResult, read_result
from train.tracking import Tracker
from train.world import World

EXAMPLES = [TaskExample(f"e{n}", f"{'ab'[n % 2]} {n}", "xy"[n % 2]) for n in range(16)]
TASK = Task(EXAMPLES[:12], EXAMPLES[:4], EXAMPLES)
RECORDS = [TeacherRecord(e.id, "train", "", f"because {e.label}", e.label, parseable=True, agrees=True) for e in TASK.train]
INPUTS = stage.StudentInputs(TASK, Path(), RationalesConfig(), None)
ALONE = World(0, 1, torch.device("cpu"))
STUDENT: dict[str, Any] = {
    "model": {"from_scratch": "llama", "d_model": 16, "layers": 1, "heads": 2, "vocabulary": 300},
    "loss": {"label": 1.0, "rationale": 0.0},
    "epochs": 12,
    "batch_size": 6,
    "learning_rate": 1e-2,
    "max_input_tokens": 16,
    "max_label_tokens": 4,
    "max_rationale_tokens": 16,
}
BOTH = {"loss": {"label": 0.5, "rationale": 0.5}}
ONE_TASK = {"single_task": True}
ADAPTED = {"lora": {"rank": 4}}


@pytest.fixture(autouse=True)
def _records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "read_records", lambda folder, split: RECORDS)


def trial(key: str, seed: int = 0, *, fraction: float = 1.0, scored: bool = True, **changes: Any) -> Trial:
    student = {**STUDENT, **changes, "seed": seed, "data_fraction": fraction}
    return Trial(key, "arm@gold", {}, student, seed, fraction, scored)


def tracker(_: Trial, folder: Path) -> Callable[[int], Tracker]:
    config = TrackingConfig(wandb="disabled")
    return lambda step: Tracker(folder, config, group="g", job_type="j", settings={}, enabled=True, from_step=step)


def runner() -> trials.TrialRunner:
    return trials.TrialRunner(INPUTS, ALONE, seed=0, metric="text", batch_size=8, num_trials=1, open_tracker=tracker)


def outcome(result: TrialResult) -> tuple[Any, ...]:
    """All but the times."""
    return result.validation, result.best_step, result.steps, result.counts, result.answers


def by_stage(folder: Path, changes: Mapping[str, Any]) -> tuple[dict[str, float], int, list[tuple[str | None, bool]]]:
    """Validation, best step and answers of the pipeline's own training and serving."""
    config = StudentConfig.model_validate({**STUDENT, **changes, "seed": 0})
    made = stage.run(config, config.loss, INPUTS, folder, ALONE, seed=0, title="train", open_tracker=tracker(trial("-"), folder))
    runtime = open_runtime("transformers", folder / "model", device="cpu")
    part, most = runtime.format.part, runtime.format.max_answer_tokens
    texts = answers(runtime, [e.input for e in TASK.test], part, batch_size=3, max_new_tokens=most)
    labels = [label_of(text, part) for text in texts]
    return made.validation, made.best_step, [(label, label == e.label) for label, e in zip(labels, TASK.test, strict=True)]


@pytest.mark.parametrize("changes", [{}, BOTH, ONE_TASK, ADAPTED], ids=["labels_only", "step_by_step", "single_task", "lora"])
def test_a_trial_is_what_the_pipeline_trains_and_serves(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = runner()
    # What came before in the same process leaves nothing behind.
    run.run(trial("other", seed=3, **BOTH), tmp_path / "other")
    result = run.run(trial("own", **changes), tmp_path / "own")
    validation, best_step, answered = by_stage(tmp_path / "stage", changes)
    assert result.failed is None
    assert (result.validation, result.best_step) == (pytest.approx(validation, rel=1e-6), best_step)
    assert result.answers is not None
    assert [answer["id"] for answer in result.answers] == [e.id for e in TASK.test]
    assert [answer["correct"] for answer in result.answers] == [right for _, right in answered]
    assert [answer["parsed"] for answer in result.answers] == [label or None for label, _ in answered]


def test_trials_learn(tmp_path: Path) -> None:
    result = runner().run(trial("t", epochs=30), tmp_path / "t")
    assert result.accuracy is not None
    assert result.accuracy > 0.9


def test_the_same_trial_again_is_the_same_and_another_seed_is_not(tmp_path: Path) -> None:
    run = runner()
    first = run.run(trial("a"), tmp_path / "a")
    other = run.run(trial("b", seed=1), tmp_path / "b")
    run.run(trial("c", **ADAPTED), tmp_path / "c")
    again = run.run(trial("d"), tmp_path / "d")
    assert outcome(first) == outcome(again)
    assert first.validation != other.validation


def test_a_share_of_the_data_is_the_same_for_every_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[set[str]] = []

    def loop(model: Any, training: Any, *arguments: Any, **options: Any) -> Any:
        learnt.append({row.id for row in training.rows})
        raise RuntimeError("the loss is not finite at step 1 (label nan); nothing was updated")

    monkeypatch.setattr(trials, "train", loop)
    run = runner()
    for n, (seed, fraction) in enumerate([(0, 0.5), (1, 0.5), (0, 0.25), (0, 1.0)]):
        run.run(trial(str(n), seed=seed, fraction=fraction), tmp_path / str(n))
    assert [len(ids) for ids in learnt] == [6, 6, 3, 12]
    assert learnt[0] == learnt[1]
    assert learnt[2] < learnt[0] < learnt[3]


def test_rows_are_made_once_for_all_trials_that_learn_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def prepared(config: StudentConfig, *arguments: Any, **options: Any) -> Any:
        made.append(config.model_dump())
        return stage.prepare_rows(config, *arguments, **options)

    monkeypatch.setattr(trials, "prepare_rows", prepared)
    run = runner()
    changes: list[dict[str, Any]] = [{}, {"learning_rate": 1e-3}, {"seed": 5}, {"loss": {"label": 0.7, "rationale": 0.0}}, BOTH, ONE_TASK]
    for n, change in enumerate(changes):
        run.run(trial(str(n), scored=False, **{"epochs": 1, **change}), tmp_path / str(n))
    assert len(made) == 3


def test_a_trial_that_diverges_is_recorded_and_the_next_one_is_whole(tmp_path: Path) -> None:
    run = runner()
    failed = run.run(trial("wild", learning_rate=1e30), tmp_path / "wild")
    assert failed.failed is not None
    assert " is not finite at step " in failed.failed
    assert (failed.answers, failed.accuracy) == (None, None)
    assert read_result(tmp_path / "wild") == failed
    assert outcome(run.run(trial("tame"), tmp_path / "tame")) == outcome(runner().run(trial("tame"), tmp_path / "alone"))


def test_any_other_fault_stops_the_sweep_and_marks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(trials, "train", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        runner().run(trial("t"), tmp_path / "t")
    assert read_result(tmp_path / "t") is None


def test_a_trial_that_chooses_values_answers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "answers", lambda *_, **__: pytest.fail("the test split was asked"))
    result = runner().run(trial("t", scored=False), tmp_path / "t")
    assert result.answers is None
    assert result.validation["exact_match"] >= 0


def test_a_folder_holds_the_log_and_the_result_and_no_weights(tmp_path: Path) -> None:
    (tmp_path / "t" / "state").mkdir(parents=True)
    (tmp_path / "t" / "state" / "resume.json").write_text("left by a process that was killed")
    result = runner().run(trial("t"), tmp_path / "t")
    assert {path.name for path in (tmp_path / "t").iterdir()} == {"log.jsonl", "tracking.json", "trial.json"}
    assert read_result(tmp_path / "t") == result
    assert (result.steps, result.processes, result.counts["rows"]) == (24, 1, 12)
    assert result.tokens_per_second is not None


def test_a_damaged_result_is_told(tmp_path: Path) -> None:
    (tmp_path / "trial.json").write_text(json.dumps({"trial": {}}))
    with pytest.raises(RuntimeError, match=r"trial\.json cannot be read .*: another version wrote it, or it is damaged; delete"):
        read_result(tmp_path)


@pytest.mark.parametrize(
    ("device", "packs", "changes", "num_trials", "expected"),
    [
        ("cuda", True, {}, 10, "graphs"),
        ("cuda", False, {}, 10, "layers"),
        ("cuda", True, {}, 2, "auto"),  # 200 steps in all: the trainer decides by its own
        ("cuda", True, {"compile": "off"}, 10, "off"),
        ("cuda", True, ADAPTED, 10, "auto"),  # the model does not stay
        ("cuda", True, {"zero_stage": 1}, 10, "auto"),
        ("cpu", True, {}, 10, "auto"),
    ],
)
def test_compiling_is_worth_its_time_by_the_steps_of_all_trials(
    monkeypatch: pytest.MonkeyPatch, device: str, packs: bool, changes: dict[str, Any], num_trials: int, expected: str
) -> None:
    monkeypatch.setattr(trials, "can_pack", lambda *_: packs)
    world = World(0, 1, torch.device(device))
    run = trials.TrialRunner(INPUTS, world, seed=0, metric="text", batch_size=8, num_trials=num_trials, open_tracker=tracker)
    config = StudentConfig.model_validate({**STUDENT, **changes})
    steps: Any = SimpleNamespace(num_steps=100, text_format=None)
    assert run._compile(config, SimpleNamespace(model=None), steps) == expected  # type: ignore[arg-type]
