"""Rungs measured in turn, and what the table says of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from launch.bench import bench
from launch.rundir import locked, write_stages
from train.artifacts import EvalResult
from train.evaluate import REQUEST, EvalRequest
from train.serving import Latency, Serving

RUNGS = {"teacher": "records", "step_by_step": "transformers", "gguf-q8_0": "llama_cpp"}
MADE = {"teacher": "teach", "step_by_step": "train.step_by_step", "gguf-q8_0": "deploy.gguf-q8_0"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of a recorded teacher, a student and a file, evaluated."""
    stages = {}
    for i, (rung, runtime) in enumerate(RUNGS.items()):
        folder, made = tmp_path / f"evaluate.{rung}-0", tmp_path / f"made-{rung}"
        (made / "model").mkdir(parents=True)
        (made / "model" / "model.safetensors").write_bytes(bytes(4000 if i == 1 else 1000))
        stages[MADE[rung]] = made
        EvalRequest(
            rung=rung,
            runtime=runtime,  # type: ignore[arg-type]
            model_folder="elsewhere",  # the run was moved since
            records_folder="records" if runtime == "records" else None,
            task_folder="elsewhere",
            metric="number",
            part="predict",
            max_new_tokens=4,
            batch_size=2,
            timed_examples=8,
            out_folder=str(folder),
        ).write(folder / REQUEST)
        EvalResult(rung, runtime, 1, 1, 0, None, None, None, None, None, None, "cpu", None).write(folder)
        stages[f"evaluate.{rung}"] = folder
    write_stages(tmp_path, {"task": tmp_path / "task", **stages})
    return tmp_path


def test_rungs_are_measured_in_turn_and_told_by_their_medians(run: Path) -> None:
    asked: list[tuple[str, int, str]] = []

    def time(request: EvalRequest) -> Serving:
        asked.append((request.rung, request.threads, request.device))
        assert request.task_folder == str(run / "task")
        assert request.model_folder == str(run / f"made-{request.rung}" / "model")
        seconds = {"step_by_step": 0.08, "gguf-q8_0": 0.02}[request.rung] * (1 + len(asked) // 5)
        return Serving("cpu", seconds, {"1": 1 / seconds, "32": 2 / seconds}, 10**9, Latency(seconds, seconds / 2))

    console = Console(record=True, width=160, file=io.StringIO())
    served = bench(run, [], rounds=3, threads=1, device="cpu", console=console, time=time)
    assert asked == [("step_by_step", 1, "cpu"), ("gguf-q8_0", 1, "cpu")] * 3, "a recorded teacher serves nothing"
    assert [row.first_token_seconds for row in served] == [0.08, 0.02]
    assert [row.weight_bytes for row in served] == [4000, 1000]
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    # Figures, and below them how they compare with transformers: 25 tokens a second after the first, 12.5 items at batch 1.
    assert "step_by_step 0.0 0.08 80.0 25.0 12.50 25.00 1,000" in lines
    at = lines.index("gguf-q8_0 0.0 0.02 20.0 100.0 50.00 100.00 1,000")
    assert lines[at + 1] == "(25.0%) (0.25x) (0.25x) (4x) (4x) (4x) (1x)"
    written = json.loads((run / "bench.json").read_text())
    assert written["threads"] == 1
    assert [row["rung"] for row in written["rungs"]] == ["step_by_step", "gguf-q8_0"]


def serving(device: str = "cpu", seconds: float = 1.0) -> Serving:
    return Serving(device, seconds, {"1": 1.0, "32": 1.0}, None, Latency(0.5, None))


def test_only_the_rungs_that_are_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    quiet = Console(quiet=True)
    served = bench(run, ["gguf-q8_0"], rounds=1, threads=0, device="auto", console=quiet, time=lambda _: serving())
    assert [(row.rung, row.token_seconds, row.peak_memory_bytes) for row in served] == [("gguf-q8_0", None, None)]
    assert json.loads((run / "bench.json").read_text())["threads"] == 3


def test_no_ratio_is_given_of_two_devices(run: Path) -> None:
    console = Console(record=True, width=160, file=io.StringIO())
    asked = []

    def time(request: EvalRequest) -> Serving:
        asked.append(request.device)
        return serving("cuda" if request.runtime == "transformers" else "cpu")

    bench(run, [], rounds=1, threads=1, device="cuda", console=console, time=time)
    assert asked == ["cuda", "auto"], "llama.cpp is mostly built for CPUs"
    text = console.export_text()
    assert "x)" not in text
    assert "cuda: step_by_step, cpu: gguf-q8_0" in text


def test_a_rung_that_fails_leaves_the_others(run: Path) -> None:
    def time(request: EvalRequest) -> Serving:
        if request.rung == "gguf-q8_0":
            raise RuntimeError("the file is damaged")
        return serving()

    with pytest.raises(RuntimeError, match="gguf-q8_0: the file is damaged"):
        bench(run, [], rounds=2, threads=1, device="cpu", console=Console(quiet=True), time=time)
    assert [row["rung"] for row in json.loads((run / "bench.json").read_text())["rungs"]] == ["step_by_step"]


def test_what_cannot_be_measured_is_told(run: Path, tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    with pytest.raises(ValueError, match=r"--rung is gguf-q4_0, but .* has step_by_step, gguf-q8_0"):
        bench(run, ["gguf-q4_0"], rounds=1, threads=0, device="cpu", console=quiet)
    with pytest.raises(RuntimeError, match=r"^step_by_step: .*has no stepdown.json"):
        bench(run, ["step_by_step"], rounds=1, threads=0, device="cpu", console=quiet)
    with locked(run), pytest.raises(RuntimeError, match="in use"):
        bench(run, [], rounds=1, threads=0, device="cpu", console=quiet)
    (tmp_path / "empty").mkdir()
    write_stages(tmp_path / "empty", {})
    with pytest.raises(ValueError, match="has no evaluated model yet: run `stepdown run`"):
        bench(tmp_path / "empty", [], rounds=1, threads=0, device="cpu", console=quiet)
