"""Files of few bits whose weights were trained through the rounding, as a user makes them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file

from launch.rundir import read_stages

pytestmark = pytest.mark.slow
Start = Callable[..., subprocess.Popen[str]]
CONFIG: dict[str, Any] = {
    "name": "recovered",
    "task": {
        "train": "builtin:arithmetic",
        "validation": "builtin:arithmetic",
        "test": "builtin:arithmetic",
        "metric": "number",
        "arithmetic": {"train_rows": 200, "validation_rows": 20, "test_rows": 40, "min_steps": 1, "max_steps": 1, "max_number": 3},
    },
    "teacher": {"source": "recorded", "label": "{label}", "rationale": "{rationale}"},
    "student": {
        "model": {"from_scratch": "llama", "d_model": 64, "layers": 2, "heads": 2, "d_ff": 192},
        "epochs": 12,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "max_input_tokens": 64,
        "max_label_tokens": 8,
        "max_rationale_tokens": 48,
    },
    "evaluate": {"timed_examples": 4},
    "launch": {"device": "cpu"},
    "tracking": {"wandb": "disabled"},
}


WIDE = {"model": {"from_scratch": "llama", "d_model": 256, "layers": 2, "heads": 4, "d_ff": 256}, "epochs": 8, "learning_rate": 1e-3}
"""Rows that the blocks of ternary files divide."""


def ran(start: Start, folder: Path, targets: list[str], *, recover: dict[str, Any], **student: Any) -> tuple[dict[str, Path], str]:
    config = {**CONFIG, "student": {**CONFIG["student"], **student}, "deploy": {"targets": targets, "recover": recover}}
    (folder / "recovered.yaml").write_text(yaml.safe_dump(config))
    process = start(folder, "run", "recovered.yaml")
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    return read_stages(folder / "runs" / "recovered"), output


def artifact(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "artifact.json").read_text())


TARGETS = ["onnx-int8", "onnx-int4", "gguf-tq2_0", "compressed-tensors-w2a16"]


def test_files_hold_what_was_trained_and_recovery_wins_where_rounding_breaks(tmp_path: Path, start: Start) -> None:
    stages, _ = ran(start, tmp_path, TARGETS, recover={"epochs": 8, "learning_rate": 2e-3}, **WIDE)
    rungs = ["teacher", "step_by_step", "onnx-int8"]
    rungs += [name for target in TARGETS[1:] for name in (target, f"{target}-recovered")]
    report = json.loads((tmp_path / "runs" / "recovered" / "report.json").read_text())
    assert [rung["measured"]["rung"] for rung in report["rungs"]] == rungs
    assert "recover.onnx-int8" not in stages
    for target in TARGETS[1:]:
        rounded, recovered = (artifact(stages[f"deploy.{target}{end}"]) for end in ("", "-recovered"))
        assert recovered["target"] == rounded["target"] == target
        assert recovered["bits_a_weight"] == pytest.approx(rounded["bits_a_weight"])
        # Compared with the model that was trained through the rounding: only embedding, head and inputs are rounded on top.
        assert recovered["error_nats"] < 0.1
    exact = {rung["measured"]["rung"]: rung["measured"]["num_correct"] for rung in report["rungs"]}
    assert exact["step_by_step"] > 20, exact
    assert exact["gguf-tq2_0-recovered"] > exact["gguf-tq2_0"] + 8, exact
    card = (stages["deploy.gguf-tq2_0-recovered"] / "model" / "README.md").read_text()
    assert "# recovered: gguf-tq2_0-recovered" in card
    assert "trained through the rounding" in card


def test_pruned_twice_over_and_recovered_at_four_bits(tmp_path: Path, start: Start) -> None:
    """The whole join: recorded teacher, step by step, a third of the neurons out, 4 bits with recovery."""
    prune = {"method": "neuron", "fraction": 0.3334, "round_to": 32}
    stages, _ = ran(start, tmp_path, ["gguf-q4_0"], recover={}, epochs=1, prune=prune)
    report = json.loads((tmp_path / "runs" / "recovered" / "report.json").read_text())
    rungs = ["teacher", "step_by_step", "pruned", "gguf-q4_0", "gguf-q4_0-recovered"]
    assert [rung["measured"]["rung"] for rung in report["rungs"]] == rungs
    small, made = artifact(stages["prune"]), artifact(stages["deploy.gguf-q4_0-recovered"])
    assert made["num_parameters"] == small["num_parameters"] < artifact(stages["train.step_by_step"])["num_parameters"]
    assert json.loads((stages["recover.gguf-q4_0"] / "model" / "config.json").read_text())["intermediate_size"] == 128
    assert made["weight_bytes"] < small["weight_bytes"] / 3


def test_masked_zeros_are_zero_in_the_packed_file_after_recovery(tmp_path: Path, start: Start) -> None:
    prune = {"method": "magnitude", "fraction": 0.5}
    stages, _ = ran(start, tmp_path, ["gguf-q4_0"], recover={"loss": {"label": 0.5, "rationale": 0.5}}, epochs=1, prune=prune)
    before = load_file(stages["prune"] / "model" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    after = load_file(stages["recover.gguf-q4_0"] / "model" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    held = {tensor.name: tensor for tensor in GGUFReader(stages["deploy.gguf-q4_0-recovered"] / "model" / "model.gguf").tensors}
    tensor = held["blk.0.ffn_up.weight"]
    values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).view(before.shape)
    out = before == 0
    assert 0.45 < float(out.float().mean()) < 0.55
    assert not values[out].any()
    assert torch.equal(values, after), "the file holds what was trained"
    assert not torch.allclose(after, before, atol=1e-4), "it has learnt since"
