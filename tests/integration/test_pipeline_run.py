"""The tiny pipeline as a user runs it: the ladder, what is skipped, what is shared, and the commands that read a run."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.records import TeacherRecord
from data.store import read_records
from data.tasks import read_task
from launch.rundir import read_stages

Start = Callable[..., subprocess.Popen[str]]
RUNGS = ["teacher", "labels_only", "step_by_step_soft", "ctranslate2-int8"]


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def output_of(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def test_it_ends_with_the_ladder_and_where_things_are(finished: Path) -> None:
    output = (finished / "output.txt").read_text()
    for rung in RUNGS:
        assert rung in output
    assert "report: runs/tiny/report.html" in output
    assert "to ship: runs/tiny/deploy.ctranslate2-int8-" in output
    assert "Traceback" not in output and "Warning:" not in output.replace("Warning: ", "", 100)


def test_the_report_counts_what_was_trained_on(finished: Path) -> None:
    report = json.loads((finished / "runs" / "tiny" / "report.json").read_text())
    assert [rung["measured"]["rung"] for rung in report["rungs"]] == RUNGS
    assert report["trained"]["labels_only"]["counts"]["label_rows"] == 300
    assert report["trained"]["labels_only"]["counts"]["rationale_rows"] == 0
    soft = report["trained"]["step_by_step_soft"]["counts"]
    assert soft["label_rows"] == 300
    assert 0 < soft["rationale_rows"] <= 300
    assert soft["soft_label_rows"] >= 300
    assert report["records"]["rows"] == {"train": 300, "test": 32}
    for name in ("report.md", "report.html"):
        assert all(rung in (finished / "runs" / "tiny" / name).read_text() for rung in RUNGS)


def test_the_report_shows_what_each_stage_held(finished: Path) -> None:
    memory = json.loads((finished / "runs" / "tiny" / "report.json").read_text())["memory"]
    assert [peak["stage"] for peak in memory] == ["tune", "teach", "train.labels_only", "train.step_by_step_soft"]
    assert all((peak["device"], peak["processes"], peak["planned_bytes"]) == ("cpu", 1, None) for peak in memory)
    # Python with torch, DeepSpeed and transformers takes hundreds of megabytes, these models next to none.
    assert all(2e8 < peak["measured_bytes"] < 3e9 for peak in memory)


def test_the_same_command_again_skips_every_stage(folder: Path, start: Start) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*/artifact.json")}
    output = output_of(start(folder, "run", "tiny.yaml"))
    assert output.count("(done before)") == len(before)
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*/artifact.json")} == before


def test_a_changed_key_reruns_from_the_stage_it_touches_and_another_run_shares_the_teacher(folder: Path, start: Start) -> None:
    output = output_of(start(folder, "run", "tiny.yaml", "name=other", "student.learning_rate=1e-3", "student.baselines=[]"))
    lines = {
        line.split(":")[0]: line
        for line in output.splitlines()
        if line.startswith(("task", "tune", "teach", "train.", "deploy.", "evaluate."))
    }
    assert all("(done before)" in lines[stage] for stage in ("tune", "teach"))
    assert all(
        "(done before)" not in lines[stage] for stage in ("train.step_by_step_soft", "deploy.ctranslate2-int8", "evaluate.ctranslate2-int8")
    )
    stages = [read_stages(folder / "runs" / name) for name in ("tiny", "other")]
    assert stages[0]["teach"].resolve() == stages[1]["teach"].resolve()
    compared = output_of(start(folder, "compare", "tiny", "other"))
    assert "McNemar" in compared


def test_what_a_changed_key_keeps_and_begins_anew_is_told(folder: Path, start: Start) -> None:
    output = output_of(start(folder, "train", "tiny.yaml", "student.learning_rate=1e-3"))
    assert [line for line in output.splitlines() if "changed since" in line] == [
        "changed since the last run here: student.learning_rate 0.0005 -> 0.001. Runs anew: train.*; kept: task, tune, teach. "
        "Nothing made before is deleted."
    ]
    again = output_of(start(folder, "train", "tiny.yaml", "student.learning_rate=1e-3"))
    assert "changed since" not in again and again.count("(done before)") == 5


def test_predict_answers_with_the_deployed_model(folder: Path, start: Start) -> None:
    question = next(iter((read_stages(folder / "runs" / "tiny")["task"] / "test.jsonl").read_text().splitlines()))
    answers = (read_stages(folder / "runs" / "tiny")["evaluate.ctranslate2-int8"] / "answers.jsonl").read_text().splitlines()
    output = output_of(start(folder, "predict", "tiny", json.loads(question)["input"]))
    assert output.rstrip("\n") == json.loads(answers[0])["answer"]
    assert "has no deployed file" not in output
    missing = output_of(start(folder, "predict", "tiny", "x", "--target", "gguf-q8_0"), status=1)
    assert missing == "error: --target is gguf-q8_0, but runs/tiny has ctranslate2-int8\n"


def test_a_run_in_use_is_refused(folder: Path, start: Start) -> None:
    import fcntl

    with (folder / "runs" / "tiny" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        output = output_of(start(folder, "run", "tiny.yaml"), status=1)
    assert output == "error: runs/tiny is in use by another stepdown process: wait for it to end, or give this run another name\n"


def test_what_a_worker_refuses_reaches_the_user_in_one_line(folder: Path, start: Start) -> None:
    (folder / "broken").mkdir(exist_ok=True)
    output = output_of(start(folder, "run", "tiny.yaml", "student.model=broken", "name=bad"), status=1)
    *_, error, last = output.splitlines()
    assert error.startswith("error: student.model is 'broken', a folder without a tokenizer")
    assert last == "what is done is kept: the same command goes on from there"
    assert "Traceback" not in output


def test_soft_labels_of_another_vocabulary_are_refused(folder: Path, start: Start) -> None:
    output = output_of(start(folder, "run", "tiny.yaml", "student.model.vocabulary=320", "student.baselines=[]", "name=bad"), status=1)
    assert "error: student.loss.soft needs one vocabulary" in output
    assert "Traceback" not in output


def records_of(folder: Path, split: str) -> list[TeacherRecord]:
    return read_records(read_stages(folder / "runs" / "tiny")["teach"], split)


def counts_of(folder: Path) -> dict[str, int]:
    """What the student really trained on."""
    trained = read_stages(folder / "runs" / "tiny")["train.step_by_step_soft"]
    counts: dict[str, int] = json.loads((trained / "artifact.json").read_text())["counts"]
    return counts


def answering(config: dict[str, Any], family: str, **rationales: Any) -> dict[str, Any]:
    """The configuration with a teacher that is tuned until it mostly closes with an answer."""
    chosen = deepcopy(config)
    chosen["teacher"] |= {
        "model": {"from_scratch": family, "d_model": 32, "layers": 1, "heads": 2, "vocabulary": 300},
        "tune": {"epochs": 12, "batch_size": 16, "learning_rate": 1e-2},
        "rationales": {"max_new_tokens": 32, **rationales},
    }
    chosen["student"] |= {"baselines": []}
    chosen["evaluate"] = {"timed_examples": 1}
    return chosen


def test_a_student_of_another_family_learns_the_answers_its_teacher_drew(tmp_path: Path, tiny: dict[str, Any], start: Start) -> None:
    config = answering(tiny, "llama", samples=3, rationalize=True)
    config["task"]["arithmetic"] |= {"train_rows": 150, "test_rows": 8}
    config["teacher"]["soft_labels"] = {"format": "answers"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    output = output_of(start(tmp_path, "train", "tiny.yaml"))
    assert "teach: 158 records" in output

    records = records_of(tmp_path, "train")
    drawn = [record for record in records if record.answers is not None]
    assert len(drawn) > 50
    assert all(sum(record.answers.probabilities) == pytest.approx(1.0) for record in drawn if record.answers is not None)
    assert all(record.agrees and record.rationale for record in records if record.rationalized)
    assert not any(record.rationalized or record.answers is not None for record in records_of(tmp_path, "test"))
    counts = counts_of(tmp_path)
    assert (counts["label_rows"], counts["soft_label_rows"]) == (150, len(drawn))
    assert counts["answer_rows"] == sum(len(record.answers.answers) for record in drawn if record.answers is not None)


@pytest.mark.slow
def test_drawn_tokens_become_a_student(tmp_path: Path, tiny: dict[str, Any], start: Start) -> None:
    config = answering(tiny, "llama", samples=3, rationalize=True)
    config["teacher"]["soft_labels"] = {"on": "both", "format": "sampled", "draws": 10}
    config["student"]["model"] = {"cut_from": "teacher", "layers": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    output_of(start(tmp_path, "run", "tiny.yaml", "launch.cpu_processes=2"))
    records = records_of(tmp_path, "train")
    hinted = [record for record in records if record.rationalized]
    assert hinted
    assert all(record.rationale_soft is not None and record.label_soft is None for record in hinted)
    assert all(record.label_soft is not None for record in records if not record.rationalized)
    counts = counts_of(tmp_path)
    assert counts["soft_label_rows"] == 300 - len(hinted) + counts["rationale_rows"]


@pytest.mark.slow
def test_probabilities_of_choices_become_a_student_of_another_family(tmp_path: Path, tiny: dict[str, Any], start: Start) -> None:
    words = ["apple", "river", "stone", "cloud", "horse"]
    rows = [{"q": f"{a} or {b}?", "choices": [a, b], "label": a, "why": f"It is {a}."} for a in words for b in words if a != b]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = answering(tiny, "llama")
    fields = {"input": "{q}", "label": "{label}", "rationale": "{why}", "choices": "choices", "metric": "choice"}
    config["task"] = {"train": "rows.jsonl", "test": "rows.jsonl", **fields}
    config["teacher"]["soft_labels"] = {"format": "choices", "likelihood": "mean"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    output_of(start(tmp_path, "run", "tiny.yaml"))
    records = records_of(tmp_path, "train")
    task = read_task(read_stages(tmp_path / "runs" / "tiny")["task"])
    choices = {example.id: list(example.choices) for example in task.train}
    assert len(records) == 18
    assert [list(record.answers.answers) if record.answers else None for record in records] == [choices[record.id] for record in records]
    counts = counts_of(tmp_path)
    assert (counts["soft_label_rows"], counts["label_rows"]) == (18, 18)


@pytest.mark.slow
def test_two_processes_run_the_whole_pipeline(tmp_path: Path, tiny: dict[str, Any], start: Start) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    output = output_of(start(tmp_path, "run", "tiny.yaml", "launch.cpu_processes=2", "student.zero_stage=2", "teacher.sharding=zero3"))
    assert "ctranslate2-int8" in output
    records = json.loads((read_stages(tmp_path / "runs" / "tiny")["teach"] / "artifact.json").read_text())
    assert (records["sharding"], records["processes"], records["rows"]) == ("zero3", 2, {"train": 300, "test": 32})


def test_serving_is_measured_from_another_place_after_the_run_was_moved(finished: Path, tmp_path: Path, start: Start) -> None:
    shutil.copytree(finished / "runs", tmp_path / "moved")
    output = output_of(start(tmp_path, "bench", str(tmp_path / "moved" / "tiny"), "--rung", RUNGS[-1], "--rounds", "1", "--threads", "1"))
    assert "medians of 1 rounds, 1 CPU threads" in output
    [row] = json.loads((tmp_path / "moved" / "tiny" / "bench.json").read_text())["rungs"]
    assert row["rung"] == RUNGS[-1]
    assert row["examples_per_second"]["32"] > 0 < row["first_token_seconds"]
    assert not (finished / "runs" / "tiny" / "bench.json").exists()
