"""`kill -9` of the whole process group in every stage, then the same command: nothing lost, nothing doubled, the same weights."""

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
from safetensors.numpy import load_file

from data.store import read_records
from launch.rundir import read_stages

Start = Callable[..., subprocess.Popen[str]]


def resumable(kind: str) -> Callable[[Path], bool]:
    """A training that has saved a checkpoint and not ended."""
    return lambda runs: any(not (p.parents[1] / "artifact.json").exists() for p in runs.glob(f"*/{kind}-*/state/resume.json"))


def begun(pattern: str) -> Callable[[Path], bool]:
    """A stage's folder that is there without an artifact."""
    return lambda runs: any(not (p / "artifact.json").exists() for p in runs.glob(pattern))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "task": begun("tiny/task-*"),
    "tune": resumable("tune"),
    "teach": lambda runs: begun("shared/teach-*")(runs) and any(runs.glob("shared/teach-*/train-000000.parquet")),
    "train.labels_only": resumable("train.labels_only"),
    "train.step_by_step_soft": resumable("train.step_by_step_soft"),
    "deploy": begun("tiny/deploy.*"),
    "evaluate.teacher": begun("tiny/evaluate.teacher-*"),
    "evaluate": begun("tiny/evaluate.ctranslate2-int8-*"),
}


def wait_for(process: subprocess.Popen[str], folder: Path, moment: Callable[[Path], bool]) -> None:
    deadline = time.monotonic() + 300
    while not moment(folder / "runs"):
        assert process.poll() is None, f"ended before the moment came: {process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill_when(start: Start, folder: Path, moment: Callable[[Path], bool]) -> None:
    process = start(folder, "run", "tiny.yaml")
    wait_for(process, folder, moment)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def weights(folder: Path) -> dict[str, Any]:
    stages = read_stages(folder / "runs" / "tiny")
    found = {}
    for name, path in stages.items():
        for file in (path / "model").glob("*.safetensors"):
            found |= {f"{name}/{tensor}": values for tensor, values in load_file(file).items()}
        for file in (path / "model").glob("model.bin"):
            found[name] = file.read_bytes()
    assert len(found) > 20
    return found


def losses(folder: Path) -> dict[str, list[Any]]:
    """Every line of every training's log, but for its speed, which no two runs share."""
    found: dict[str, list[Any]] = {}
    for name, path in read_stages(folder / "runs" / "tiny").items():
        if name.startswith(("tune", "train")):
            lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
            assert any("tokens_per_second" in line for line in lines)
            found[name] = [{key: value for key, value in line.items() if key not in ("tokens_per_second", "memory_gib")} for line in lines]
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "stages",
    [("teach", "train.step_by_step_soft"), pytest.param(tuple(MOMENTS), marks=pytest.mark.slow)],
    ids=["two stages", "every stage"],
)
def test_killed_in_a_stage_it_goes_on_to_the_same_end(
    stages: tuple[str, ...], finished: Path, tmp_path: Path, tiny: dict[str, Any], start: Start
) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    for stage in stages:
        kill_when(start, tmp_path, MOMENTS[stage])
    process = start(tmp_path, "run", "tiny.yaml")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output

    expected, found = weights(finished), weights(tmp_path)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value == found[name] if isinstance(value, bytes) else (value == found[name]).all(), name
    assert losses(tmp_path) == losses(finished)
    for split, rows in (("train", 300), ("test", 32)):
        before, after = (read_records(read_stages(f / "runs" / "tiny")["teach"], split) for f in (finished, tmp_path))
        assert len({r.id for r in after}) == len(after) == rows
        assert [(r.id, r.text, r.label) for r in after] == [(r.id, r.text, r.label) for r in before]
    for stage in ("evaluate.teacher", "evaluate.step_by_step_soft", "evaluate.ctranslate2-int8"):
        answers = [(read_stages(f / "runs" / "tiny")[stage] / "answers.jsonl").read_text() for f in (finished, tmp_path)]
        assert answers[0] == answers[1]
    assert "done before" in output and (tmp_path / "runs" / "tiny" / "report.html").is_file()


def started_until(start: Start, folder: Path, tiny: dict[str, Any], moment: str) -> subprocess.Popen[str]:
    """A run of a long tuning that has reached a moment."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    process = start(folder, "run", "tiny.yaml", "teacher.tune.epochs=500")
    wait_for(process, folder, MOMENTS[moment])
    return process


def test_ctrl_c_ends_it_in_one_line(tmp_path: Path, tiny: dict[str, Any], start: Start) -> None:
    process = started_until(start, tmp_path, tiny, "tune")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output.splitlines()[-1] == "stopped; what is done is kept: the same command goes on from there"
    assert "Traceback" not in output


def child_of(pid: int) -> int:
    """The process that `pid` started."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def test_a_worker_that_is_killed_is_told(tmp_path: Path, tiny: dict[str, Any], start: Start) -> None:
    process = started_until(start, tmp_path, tiny, "tune")
    os.kill(child_of(child_of(process.pid)), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.splitlines()[-2:] == [
        "error: worker 0 was ended by SIGKILL (out of memory, or killed by hand)",
        "what is done is kept: the same command goes on from there",
    ]
