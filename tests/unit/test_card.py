"""The model card of a file to ship, from a report's figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.prompts import TextFormat
from launch.card import card, write_card
from launch.ladder import Paired, Report, Rung
from train.artifacts import DeployedModel, EvalResult

CONFIG: dict[str, Any] = {
    "name": "mine",
    "task": {"train": "rows.jsonl", "metric": "choice"},
    "teacher": {"source": "deepspeed", "model": "big/teacher"},
    "student": {"model": {"from_scratch": "llama"}, "prune": {"method": "neuron", "fraction": 0.25}},
    "deploy": {"targets": ["gguf-q8_0"], "license": "apache-2.0"},
}
FORM = TextFormat("decoder_only", 1, 0, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32)


def rung(name: str, correct: int) -> Rung:
    result = EvalResult(name, "x", 200, correct, 0, None, 22, 100, 100, None, None, "cpu", 0.1)
    test = Paired("step_by_step", -0.05, 3, 13, 0.021)
    return Rung(result, correct / 200, (0.4, 0.6), None, None, None, [], None if name == "step_by_step" else test, None)


def report(target: str, config: dict[str, Any], **made: Any) -> tuple[Report, Rung]:
    kind = {"gguf": "llama_cpp", "compressed": "compressed_tensors"}.get(target.partition("-")[0], target.partition("-")[0])
    file = DeployedModel(target, kind, "decoder_only", 25, 30, 100, 22, 64, 8)
    file = dataclasses.replace(
        file, bits_a_parameter=8.51, bits_a_weight=8.5, error_nats=0.059, types={"Q8_0": 3, "F32": 2}, num_tokens=15499, **made
    )
    rungs = [rung("step_by_step", 110), rung(target, 100), rung("ctranslate2-int8", 99)]
    deployed = {target: file, "ctranslate2-int8": file}
    found = Report("mine", "runs/mine", [], [], rungs, [], 1.0, [], None, {}, {}, deployed, [], [], [], config, {"started": "2026-11-23"})
    return found, rungs[1]


def test_a_card_says_what_it_is_and_what_it_is_worth(tmp_path: Path) -> None:
    FORM.save(tmp_path)
    text = write_card(*report("gguf-q8_0", CONFIG, fallbacks=["blk.0.x"]), tmp_path).read_text()
    assert (tmp_path / "README.md").read_text() == text
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "base_model": "llama from scratch",
        "tags": ["stepdown", "distillation", "llama_cpp"],
    }
    for said in (
        "a student (llama from scratch) that learnt the task mine (rows: rows.jsonl) from big/teacher, pruned (neuron 0.25).",
        "200 test items, scored once by metric choice.",
        "| step_by_step | 55.0 % | 40.0 to 60.0 % |",
        "| gguf-q8_0 | 50.0 % | 40.0 to 60.0 % |",
        "Against step_by_step: -5.0 points, 3 gained, 13 lost, exact McNemar p = 0.021: significant at 5 %.",
        "25.0 % of the fp32 file; 22 parameters, 15,499 tokens.",
        "Read from the file: 8.51 bits a parameter, 8.50 a weight of the layers' matrices (3 tensors Q8_0, 2 tensors F32).",
        "Stored as another type than the name says: blk.0.x.",
        "0.059 nats a token from those of the fp32 model",
        r"It is asked `'predict: INPUT\nAnswer:'`, greedily, for at most 8 tokens.",
        "ollama create my-model -f Modelfile",
        'runtime = open_runtime("llama_cpp", Path("."))',
        "`apache-2.0`, as the configuration says.",
        "The licences of the student's base model, llama from scratch and of the teacher, big/teacher",
    ):
        assert said in body, said
    assert "ctranslate2-int8" not in body, "another file's figures"
    assert "Their own tokenizer cuts texts otherwise" in body
    assert "Their own tokenizer" not in card(*report("gguf-q8_0", CONFIG, cuts_as_trained=True), FORM)


def test_a_licence_that_nobody_stated_is_not_made_up() -> None:
    bare = {**CONFIG, "teacher": {"source": "recorded"}, "student": {"model": {"cut_from": "teacher"}}, "deploy": {"targets": []}}
    text = card(*report("onnx-int4", bare), FORM)
    assert "license: other" in text
    assert "Not stated: set `deploy.license` to an SPDX id." in text
    assert "whoever wrote the teacher's records, may bind it, too." in text
    assert "a student (a part of its teacher)" in text
    assert "from records that a teacher had written." in text


@pytest.mark.parametrize(("target", "said"), [("w4a16", "vllm serve ."), ("w2a16", "vLLM has no kernels for so few bits")])
def test_it_says_who_serves_it(target: str, said: str) -> None:
    text = card(*report(f"compressed-tensors-{target}", CONFIG), FORM)
    assert said in text
    assert 'AutoModelForCausalLM.from_pretrained(".")' in text
