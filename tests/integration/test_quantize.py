"""`stepdown quantize` on a plain transformers folder."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from launch.quantizing import quantize
from train.artifacts import DeployedModel
from train.deploy.request import QuantizeRequest
from train.deploy.targets import TARGETS
from train.runtimes import open_runtime
from train.tokenization import train_tokenizer

Start = Callable[..., subprocess.Popen[str]]
TEXTS = [f"the sum of {a} and {b} is {a + b}, not {a * b + 1}." for a in range(9) for b in range(9)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that this project did not make, of a width that ternary blocks do not divide; and texts beside it."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(TEXTS, 320)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def test_a_target_that_fails_leaves_the_others(model: Path, tmp_path: Path, start: Start) -> None:
    targets = ["ctranslate2-int8", "gguf-tq2_0", "gguf-q8_0"]
    options = [part for target in targets for part in ("--target", target)]
    process = start(tmp_path, "quantize", str(model), "made", *options, "--texts", str(model / "texts.jsonl"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert (
        "error: deploy.targets: gguf-tq2_0 holds 3.96 bits a weight of the layers' matrices, its name says 2 (12 of 14 as Q4_0)" in output
    )
    assert "error: not made: gguf-tq2_0 (the reason stands above)" in output
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["ctranslate2-int8", "gguf-q8_0", "gguf-tq2_0", "request.json"]
    assert sorted(path.name for path in (tmp_path / "made" / "gguf-tq2_0").iterdir()) == ["verify.json"]
    for target in ("ctranslate2-int8", "gguf-q8_0"):
        folder = tmp_path / "made" / target
        made = DeployedModel.read(folder)
        assert (made.target, made.fallbacks) == (target, [])
        assert made.error_nats is not None
        assert made.error_nats < 0.05
        assert f"{made.bits_a_weight:.2f}" in output
        runtime = open_runtime(TARGETS[target].runtime, folder / "model", device="cpu", threads=1)
        assert not target.startswith("gguf") or (folder / "model" / "Modelfile").read_text() == "FROM ./model.gguf\n"
        assert len(runtime.answer([runtime.encode(TEXTS[0])], 4)[0]) <= 4


def test_what_cannot_be_made_is_told(model: Path, tmp_path: Path) -> None:
    def asked(*targets: str, out: Path = tmp_path) -> None:
        quantize(str(model), out, targets, model / "texts.jsonl", Console(quiet=True))

    with pytest.raises(ValueError, match=r"--target is gguf-q3: give one of ctranslate2-float32, .*gguf-tq1_0"):
        asked("gguf-q8_0", "gguf-q3")
    DeployedModel("gguf-q8_0", "llama_cpp", "decoder_only", 1, 1, 4, 1, 1, 1).write(tmp_path / "gguf-q8_0")
    asked("gguf-q8_0")
    assert not (tmp_path / "gguf-q8_0" / "model").exists(), "what is done is not made again"
    QuantizeRequest("another", ["gguf-q8_0"], "texts", str(tmp_path)).write(tmp_path / "request.json")
    with pytest.raises(ValueError, match=r"holds files of another model \(another\): give another folder"):
        asked("gguf-q8_0")
