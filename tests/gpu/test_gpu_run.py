"""The tiny pipeline on GPUs, up to the trained students: NCCL, bf16, fused AdamW.

python -m pytest tests/gpu -m "gpu or multi_gpu"
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.store import read_records
from launch.config import RESOLVED, load_config
from launch.hardware import detect
from launch.peaks import stage_peaks
from launch.pipeline import Stage
from launch.rundir import read_stages
from train.artifacts import ARTIFACT

Start = Callable[..., subprocess.Popen[str]]
NUM_GPUS = len(detect())


def train(start: Start, folder: Path, tiny: dict[str, Any], *overrides: str) -> dict[str, list[dict[str, float]]]:
    """The logs of all trainings."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    process = start(folder, "train", "tiny.yaml", *overrides)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    stages = read_stages(folder / "runs" / "tiny")
    assert len(read_records(stages["teach"], "train")) == 300
    return {
        name: [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        for name, path in stages.items()
        if name.startswith(("tune", "train."))
    }


@pytest.mark.gpu
@pytest.mark.skipif(NUM_GPUS < 1, reason="needs a GPU")
def test_one_gpu_trains_in_bf16(tmp_path: Path, tiny: dict[str, Any], start: Start) -> None:
    logs = train(start, tmp_path, tiny, "launch.gpus_per_node=1")
    for log in logs.values():
        losses = [line["loss"] for line in log if "loss" in line]
        assert sum(losses[-3:]) < sum(losses[:3])
    run = tmp_path / "runs" / "tiny"
    done = {name: Stage(name, "", path, "worker") for name, path in read_stages(run).items() if (path / ARTIFACT).is_file()}
    peaks = stage_peaks(load_config(run / RESOLVED), done)
    assert [peak.stage for peak in peaks] == ["tune", "teach", "train.labels_only", "train.step_by_step_soft"]
    for peak in peaks:
        assert (peak.device, peak.processes) == (detect()[0].name, 1)
        # Plans are upper bounds: the sequences of this task are far shorter than the configuration lets them be.
        assert peak.ratio is not None and 0 < peak.ratio < 1.1


@pytest.mark.multi_gpu
@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sharding", ["replica", "zero3", "tensor"])
def test_two_gpus_give_the_losses_of_one_in_fp32(sharding: str, tmp_path: Path, tiny: dict[str, Any], start: Start) -> None:
    stage = {"replica": 1, "zero3": 3, "tensor": 2}[sharding]
    exact = ("teacher.tune.precision=fp32", "student.precision=fp32")
    (tmp_path / "one").mkdir()
    one = train(start, tmp_path / "one", tiny, *exact, "launch.gpus_per_node=1")
    zero = (f"teacher.tune.zero_stage={stage}", f"student.zero_stage={stage}", f"teacher.sharding={sharding}")
    two = train(start, tmp_path, tiny, *exact, *zero, "launch.gpus_per_node=2")
    for line, other in zip(one["tune"], two["tune"], strict=True):
        assert other.get("loss", 0.0) == pytest.approx(line.get("loss", 0.0), abs=1e-3)
