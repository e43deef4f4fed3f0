"""A student that is pruned and recovers, as a user runs it: the rungs, the sizes, and zeros that are there in the file."""

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
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from launch.rundir import read_stages

pytestmark = pytest.mark.slow
Start = Callable[..., subprocess.Popen[str]]
SIZES = {"d_model": 32, "layers": 2, "heads": 4, "d_ff": 48}
CONFIG: dict[str, Any] = {
    "name": "pruned",
    "task": {
        "train": "builtin:arithmetic",
        "validation": "builtin:arithmetic",
        "test": "builtin:arithmetic",
        "metric": "number",
        "arithmetic": {"train_rows": 120, "validation_rows": 20, "test_rows": 24, "min_steps": 1, "max_steps": 1, "max_number": 4},
    },
    "teacher": {"source": "recorded", "label": "{label}", "rationale": "{rationale}"},
    "student": {
        "model": {"from_scratch": "t5", **SIZES},
        "epochs": 1,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "max_input_tokens": 64,
        "max_label_tokens": 8,
        "max_rationale_tokens": 48,
    },
    "deploy": {"targets": ["ctranslate2-int8"]},
    "evaluate": {"timed_examples": 4},
    "launch": {"device": "cpu"},
    "tracking": {"wandb": "disabled"},
}


def started(start: Start, folder: Path, command: str, prune: dict[str, Any], targets: list[str] | None = None, **student: Any) -> str:
    config = {**CONFIG, "student": {**CONFIG["student"], **student, "prune": prune}}
    config["deploy"] = {"targets": targets or CONFIG["deploy"]["targets"]}
    (folder / "pruned.yaml").write_text(yaml.safe_dump(config))
    process = start(folder, command, "pruned.yaml")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def artifact(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "artifact.json").read_text())


def test_neurons_go_step_by_step_and_the_smaller_model_is_shipped(tmp_path: Path, start: Start) -> None:
    prune = {"method": "neuron", "fraction": 0.33, "round_to": 8, "schedule": "cubic", "every": 2, "until": 0.5, "epochs": 2}
    output = started(start, tmp_path, "run", prune)
    stages = read_stages(tmp_path / "runs" / "pruned")
    report = json.loads((tmp_path / "runs" / "pruned" / "report.json").read_text())
    assert [rung["measured"]["rung"] for rung in report["rungs"]] == ["teacher", "step_by_step", "pruned", "ctranslate2-int8"]
    assert "prune: " in output
    assert "What was pruned: pruned" in (tmp_path / "runs" / "pruned" / "report.md").read_text()
    model = AutoModelForSeq2SeqLM.from_pretrained(stages["prune"] / "model")
    assert model.config.d_ff == 32
    dense, small = artifact(stages["train.step_by_step"]), artifact(stages["prune"])
    # Four layers lose 16 neurons of three matrices (two lead in, as the feed-forward layers are gated).
    assert dense["num_parameters"] - small["num_parameters"] == 4 * 16 * 3 * 32
    assert small["weight_bytes"] < dense["weight_bytes"]
    assert 8 <= small["best_step"] <= small["steps"] == 16
    assert artifact(stages["deploy.ctranslate2-int8"])["num_parameters"] == small["num_parameters"]
    by_rung = {rung["measured"]["rung"]: rung for rung in report["rungs"]}
    assert by_rung["pruned"]["before"]["against"] == "step_by_step"
    assert list(report["trained"]) == ["step_by_step", "pruned"]


LLAMA = {"model": {"from_scratch": "llama", **SIZES}}
WIDE = {"model": {"from_scratch": "llama", **SIZES, "heads": 2, "d_ff": 96}}
EVERYWHERE = ["ctranslate2-int8", "gguf-q8_0", "onnx-int8", "compressed-tensors-w8a16"]


def test_a_llama_without_a_third_of_its_neurons_answers_in_every_runtime(tmp_path: Path, start: Start) -> None:
    started(start, tmp_path, "run", {"method": "neuron", "fraction": 0.33, "round_to": 32}, EVERYWHERE, **WIDE)
    stages = read_stages(tmp_path / "runs" / "pruned")
    assert AutoModelForCausalLM.from_pretrained(stages["prune"] / "model").config.intermediate_size == 64
    expected = [answer["answer"] for answer in answers(stages["evaluate.pruned"])]
    for target in EVERYWHERE:
        assert artifact(stages[f"deploy.{target}"])["num_parameters"] == artifact(stages["prune"])["num_parameters"]
        found = [answer["answer"] for answer in answers(stages[f"evaluate.{target}"])]
        assert sum(ours == theirs for ours, theirs in zip(found, expected, strict=True)) >= 0.8 * len(expected), target
    assert any(expected), "answers that were never learnt could agree by all being empty"


def test_zeros_stay_zero_in_a_packed_file(tmp_path: Path, start: Start) -> None:
    started(start, tmp_path, "deploy", {"method": "magnitude", "fraction": 0.6}, ["gguf-q8_0", "gguf-q4_0"], **WIDE)
    stages = read_stages(tmp_path / "runs" / "pruned")
    before = weights(stages["prune"])["model.layers.0.mlp.up_proj.weight"] == 0
    assert 0.55 < float(before.float().mean()) < 0.65
    for target in ("gguf-q8_0", "gguf-q4_0"):
        held = {tensor.name: tensor for tensor in GGUFReader(stages[f"deploy.{target}"] / "model" / "model.gguf").tensors}
        tensor = held["blk.0.ffn_up.weight"]
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).view(before.shape)
        assert not values[before].any()
        assert values[~before].any()


PRUNINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "magnitude": ({"method": "magnitude", "fraction": 0.6}, LLAMA),
    "global cubic": ({"method": "magnitude", "fraction": 0.5, "scope": "global", "schedule": "cubic", "every": 3, "epochs": 2}, LLAMA),
    "wanda 2:4": ({"method": "wanda", "pattern": "2:4", "exclude": ["*.o_proj"]}, LLAMA),
    "wanda under ZeRO 2": ({"method": "wanda", "fraction": 0.5, "schedule": "cubic", "every": 4}, {**LLAMA, "zero_stage": 2}),
}


@pytest.mark.parametrize("name", PRUNINGS)
def test_weights_that_are_out_are_zero_in_the_file_after_recovery(name: str, tmp_path: Path, start: Start) -> None:
    prune, student = PRUNINGS[name]
    started(start, tmp_path, "deploy", prune, **student)
    stages = read_stages(tmp_path / "runs" / "pruned")
    before, after = weights(stages["train.step_by_step"]), weights(stages["prune"])
    matrices = [key for key in after if "_proj" in key and not (name == "wanda 2:4" and "o_proj" in key)]
    total, zeros = sum(after[key].numel() for key in matrices), sum(int((after[key] == 0).sum()) for key in matrices)
    assert abs(zeros - total * prune.get("fraction", 0.5)) <= len(matrices)
    assert not any((after[key] == 0).any() for key in after if key not in matrices)
    made = artifact(stages["prune"])
    assert sum(made["sparsity"][key.split(".")[-2]][1] for key in matrices if ".0." in key) == zeros
    assert made["compressed_bytes"] < made["weight_bytes"]
    if name == "wanda 2:4":
        assert all(((after[key].view(-1, 4) != 0).sum(dim=1) == 2).all() for key in matrices)
    # It has learnt since.
    assert all(not torch.equal(after[key][after[key] != 0], before[key][after[key] != 0]) for key in matrices)


def test_a_student_pruned_by_layers_learns_from_what_it_was(tmp_path: Path, start: Start) -> None:
    loss = {"label": 0.5, "rationale": 0.5, "soft": 0.5, "teacher": "live"}
    started(start, tmp_path, "deploy", {"method": "layer", "fraction": 0.5, "loss": loss}, **LLAMA)
    stages = read_stages(tmp_path / "runs" / "pruned")
    model = AutoModelForCausalLM.from_pretrained(stages["prune"] / "model")
    assert (model.config.num_hidden_layers, len(model.model.layers)) == (1, 1)
    assert all("loss_soft" in line for line in map(json.loads, (stages["prune"] / "log.jsonl").read_text().splitlines()) if "loss" in line)


def test_heads_go_without_recovery(tmp_path: Path, start: Start) -> None:
    output = started(start, tmp_path, "deploy", {"method": "head", "fraction": 0.5, "epochs": 0}, **LLAMA)
    stages = read_stages(tmp_path / "runs" / "pruned")
    assert AutoModelForCausalLM.from_pretrained(stages["prune"] / "model").config.num_attention_heads == 2
    assert "parameters, not trained" in output
