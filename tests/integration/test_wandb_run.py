"""What W&B holds of a pipeline that was killed in the middle of its student and started again, offline: everything, and each step once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.config import load_config
from launch.rundir import read_stages
from train.tracking import by_step, read_log, read_run

Start = Callable[..., subprocess.Popen[str]]
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def kill_in_student(start: Start, folder: Path) -> None:
    """Kills the command, and all it started, when some of the student's steps have reached W&B's file."""
    process = start(folder, "run", "tiny.yaml", "tracking.wandb=offline")
    deadline = time.monotonic() + 300
    pattern = "tiny/train.step_by_step_soft-*/wandb/offline-run-*/run-*.wandb"
    while not any(path.stat().st_size > 5000 for path in (folder / "runs").glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Any], start: Start) -> Path:
    folder = tmp_path_factory.mktemp("tracked")
    prune = {"method": "magnitude", "fraction": 0.3, "schedule": "cubic", "epochs": 1}
    config = {**tiny, "student": {**tiny["student"], "epochs": 12, "prune": prune}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    kill_in_student(start, folder)
    process = start(folder, "run", "tiny.yaml", "tracking.wandb=offline")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def stages(tracked: Path) -> dict[str, Path]:
    """The folders that W&B's files lie in, by job type."""
    found = {name: path for name, path in read_stages(tracked).items() if not name.startswith(("task", "evaluate"))}
    [evaluated] = (tracked / "evaluate").iterdir()
    return {**found, "evaluate": evaluated}


@pytest.fixture(scope="module")
def records(stages: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """What the files of each job type hold, in the order in which they are sent."""
    return {
        name: [line for file in sorted(path.glob("wandb/offline-run-*/run-*.wandb")) for line in read_run(file)]
        for name, path in stages.items()
    }


def rows_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [line["history"]["item"] for line in lines if line["type"] == "history"]
    return [{name: value for name, value in row.items() if name[0] != "_"} for row in rows if "step" in row]


def test_every_stage_is_a_run_of_the_pipelines_group(stages: dict[str, Path], records: dict[str, list[dict[str, Any]]]) -> None:
    for name, lines in records.items():
        runs = [line["run"] for line in lines if line["type"] == "run"]
        assert {(run["run_group"], run["job_type"], run["project"]) for run in runs} == {("tiny", name, "stepdown")}
        noted = json.loads((stages[name] / "tracking.json").read_text())
        assert {run["run_id"] for run in runs} == {noted["id"]}, "one id for all starts"
        assert runs[0]["config"]["update"]["config"]["student"]["epochs"] == 12
    killed = [file for file in stages["train.step_by_step_soft"].glob("wandb/offline-run-*/run-*.wandb") if rows_of(read_run(file))]
    assert len(killed) == 2, "it was killed and went on"


def test_each_step_is_there_once_with_the_numbers_of_the_log(stages: dict[str, Path], records: dict[str, list[dict[str, Any]]]) -> None:
    for name, lines in records.items():
        logged = by_step(read_log(stages[name] / "log.jsonl"))
        rows = rows_of(lines)
        assert [row["step"] for row in rows] == list(logged), name
        for row in rows:  # a step that was taken again after the kill was as fast as it was
            same = {key: value for key, value in logged[row["step"]].items() if key not in ("tokens_per_second", "memory_gib")}
            assert {key: row[key] for key in same} == pytest.approx(same), (name, row["step"])


def test_every_figure_is_there(records: dict[str, list[dict[str, Any]]]) -> None:
    keys = {name: {key for row in rows_of(lines) for key in row} for name, lines in records.items()}
    trained = {"loss", "loss_label", "learning_rate", "gradient_norm", "tokens_per_second", "memory_gib", "validation_exact_match"}
    assert trained | {"loss_rationale", "loss_soft"} <= keys["train.step_by_step_soft"]
    assert trained | {"sparsity"} <= keys["prune"]
    assert {"loss", "validation_loss"} <= keys["tune"]
    assert {"records_per_second", "tokens_per_second", "seconds_left", "unparseable"} <= keys["teach"]
    assert {"bits_a_weight", "weight_bytes"} <= keys["deploy.ctranslate2-int8"]
    assert {"teacher/accuracy", "ctranslate2-int8/accuracy", "ctranslate2-int8/examples_per_second_batch_1"} <= keys["evaluate"]
    summary = {item["nested_key"][0] if "nested_key" in item else item["key"] for item in summary_items(records["evaluate"])}
    assert "validation_exact_match" in summary
    for lines in records.values():
        assert any(line["type"] == "stats" for line in lines), "what the machine does"


def summary_items(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"key": key} for line in lines if line["type"] == "summary" for key in line["summary"]["update"]]


def test_samples_and_lineage_are_there(stages: dict[str, Path], records: dict[str, list[dict[str, Any]]]) -> None:
    assert table_of(stages["teach"], "records")["columns"] == ["input", "gold", "teacher", "agrees", "rationale", "votes", "hinted"]
    predictions = table_of(stages["evaluate"], "predictions")
    assert {row[0] for row in predictions["data"]} >= {"teacher", "pruned", "ctranslate2-int8"}
    read, made = lineage(records, used=True), lineage(records, used=False)
    assert made["teach"] == {("tiny-teach", "records")}
    assert ("tiny-task", "task") in read["teach"] and ("tiny-tune", "model") in read["teach"]
    assert read["train.step_by_step_soft"] == {("tiny-task", "task"), ("tiny-teach", "records")}
    assert made["train.step_by_step_soft"] == {("tiny-train.step_by_step_soft", "model")} < read["prune"]
    assert made["prune"] == {("tiny-prune", "model")} == read["deploy.ctranslate2-int8"]
    assert made["deploy.ctranslate2-int8"] == {("tiny-deploy.ctranslate2-int8", "deployed")} < read["evaluate"]
    assert made["evaluate"] == {("tiny-report", "report")}


def table_of(folder: Path, name: str) -> dict[str, Any]:
    [file] = folder.glob(f"wandb/offline-run-*/files/media/table/{name}_*.table.json")
    table: dict[str, Any] = json.loads(file.read_text())
    return table


def lineage(records: dict[str, list[dict[str, Any]]], *, used: bool) -> dict[str, set[tuple[str, str]]]:
    found: dict[str, set[tuple[str, str]]] = {}
    for name, lines in records.items():
        artifacts = [line["artifact"] for line in lines if line["type"] == "artifact" and line["artifact"]["type"] != "run_table"]
        found[name] = {(a["name"], a["type"]) for a in artifacts if bool(a.get("use_after_commit")) == used}
    return found


def test_tracking_took_no_time_to_speak_of(stages: dict[str, Path]) -> None:
    noted = [json.loads((path / "tracking.json").read_text()) for path in stages.values()]
    assert {entry["mode"] for entry in noted} == {"offline"}
    assert sum(entry["seconds"] for entry in noted) < 6, "three seconds for each of two starts"


def test_the_sweep_file_drives_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load((ROOT / "configs" / "wandb" / "sweep.yaml").read_text())
    chosen = {"student.learning_rate": {"value": 0.0025}, "student.batch_size": {"value": 64}}
    assert chosen.keys() == sweep["parameters"].keys()
    macros = create_sweep_command_args({"args": chosen, "program": sweep["program"]})
    command = [word for part in sweep["command"] for word in (macros[part[2:-1]] if part.startswith("${") else [part])]
    assert command[:3] == ["stepdown", "run", "configs/quickstart.yaml"]
    config = load_config(Path(command[2]), command[3:])
    assert (config.student.learning_rate, config.student.batch_size) == (0.0025, 64)
