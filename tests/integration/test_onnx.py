"""From a model folder to ONNX files and their answers, for both families.

The students of the first half are trained here, on adding two digits, until their answers are sure: on a model with random weights the
best token leads by so little that rounding decides it. The others are random, and their logits are compared.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LongT5Config,
    LongT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from data.examples import TaskExample
from data.prompts import TextFormat
from train.artifacts import DeployedModel, Family
from train.config import ScratchModel
from train.models import encoder, load_model, save_model, text_format
from train.runtimes import TransformersRuntime, answers
from train.tokenization import train_tokenizer

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime_genai")

from train.deploy import stage
from train.deploy.onnx import make, stored
from train.deploy.onnx_decoder import DECODER
from train.deploy.onnx_graph import WEIGHTS, quantize
from train.deploy.onnx_runtime import OnnxRuntime
from train.deploy.onnx_t5 import ENCODER
from train.deploy.targets import SLACK_BITS, TARGETS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PAIRS = [
    (f"{opening} {a} plus {b} ?", str(a + b))
    for opening in ("what is", "say", "now add")
    for a, b in itertools.product(range(10), repeat=2)
]
PAIRS += [("say nothing ?", "")] * 3
WRITTEN = [text for text, _ in PAIRS] + [label for _, label in PAIRS]
TOKENIZER = train_tokenizer(WRITTEN * 3, 512)
TYPES = ("float32", "int8", "int4")
ERRORS = {"float32": 1e-5, "int8": 0.05, "int4": 0.35}


def _deploy(source: Path, type: str) -> Path:
    out = source.with_name(f"{source.name}-{type}")
    make(source, out, TARGETS[f"onnx-{type}"], [])
    return out


# ----- trained students -----


def _batch(layout: TextFormat, encode: Any) -> dict[str, torch.Tensor]:
    prompts = [layout.prompt_ids("predict", text, encode)[0] for text, _ in PAIRS]
    labels = [layout.label_ids(label, encode)[0] for _, label in PAIRS]

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    if layout.family == "decoder_only":
        rows = [p + t for p, t in zip(prompts, labels, strict=True)]
        labels = [[-100] * len(p) + t for p, t in zip(prompts, labels, strict=True)]
        prompts = rows
    return {"input_ids": padded(prompts, 0), "attention_mask": padded([[1] * len(p) for p in prompts], 0), "labels": padded(labels, -100)}


def _train(architecture: str, folder: Path) -> None:
    family: Family = "encoder_decoder" if architecture == "t5" else "decoder_only"
    layout = text_format(TOKENIZER, family, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32)
    source = ScratchModel(from_scratch=architecture, d_model=64, layers=2, heads=4, d_ff=128)  # type: ignore[arg-type]
    model = load_model(source, TOKENIZER, seed=0, dtype=torch.float32).train()
    batch = _batch(layout, encoder(TOKENIZER))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    order = torch.Generator().manual_seed(0)
    for step in range(320):
        rows = torch.randperm(len(PAIRS), generator=order)[:48]
        loss = model(**{name: value[rows] for name, value in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 20, (320 - step) / 80)
        optimizer.step()
        optimizer.zero_grad()
    save_model(model.eval(), TOKENIZER, layout, folder)


@pytest.fixture(scope="module", params=["t5", "llama"])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained model's folder under "source", and those of its deployed forms by type."""
    source = tmp_path_factory.mktemp(request.param) / "model"
    _train(request.param, source)
    return {"source": source, **{type: _deploy(source, type) for type in TYPES}}


def _predictions(runtime: Any) -> list[str]:
    return answers(runtime, [text for text, _ in PAIRS], "predict", batch_size=32, max_new_tokens=8)


def test_answers_are_those_of_transformers(student: dict[str, Path]) -> None:
    reference = _predictions(TransformersRuntime(student["source"], device="cpu"))
    right = sum(answer == label for answer, (_, label) in zip(reference, PAIRS, strict=True))
    assert right >= 0.9 * len(PAIRS), f"the toy student learnt too little ({right} of {len(PAIRS)}) for this test to mean something"
    assert reference[-1] == "", "an answer of no tokens is part of the comparison"
    for type, least in (("float32", 1.0), ("int8", 0.98), ("int4", 0.6)):
        same = sum(a == b for a, b in zip(_predictions(OnnxRuntime(student[type])), reference, strict=True))
        assert same >= least * len(PAIRS), (type, same)


@pytest.mark.parametrize("type", TYPES)
def test_a_batch_of_unequal_lengths_answers_as_one_by_one(student: dict[str, Path], type: str) -> None:
    runtime = OnnxRuntime(student[type], threads=1)
    prompts = [runtime.format.prompt_ids("predict", text, runtime.encode)[0] for text, _ in PAIRS[::9]]
    assert len(set(map(len, prompts))) > 1
    # Ten tokens and no label before them: answers that end early and answers that are cut stand in one batch.
    prompts += [prompt[: len(prompt) // 2] for prompt in prompts]
    assert runtime.answer(prompts, 10) == [runtime.answer([prompt], 10)[0] for prompt in prompts]


def test_an_answer_is_cut_at_its_most_tokens_as_in_transformers(student: dict[str, Path]) -> None:
    reference, deployed = TransformersRuntime(student["source"], device="cpu"), OnnxRuntime(student["float32"])
    prompts = [reference.format.prompt_ids("predict", text, reference.encode)[0] for text, label in PAIRS if len(label) == 2]
    prompt, whole = next((p, w) for p, w in zip(prompts, deployed.answer(prompts, 8), strict=True) if len(deployed.decode(w)) == 2)
    for limit in range(1, 5):
        assert deployed.answer([prompt], limit) == reference.answer([prompt], limit) == [whole[:limit]]
    assert deployed.answer([], 8) == []
    assert deployed.answer([prompt], 0) == [[]]


def test_log_probabilities_are_those_of_torch(student: dict[str, Path]) -> None:
    reference, deployed = TransformersRuntime(student["source"], device="cpu"), OnnxRuntime(student["float32"])
    for text, label in PAIRS[:5]:
        prompt = reference.format.prompt_ids("predict", text, reference.encode)[0]
        target = reference.format.label_ids(label, reference.encode)[0]
        rows = torch.tensor(_torch_logits(reference._model, prompt, target)).log_softmax(-1)
        expected = [float(row[token]) for row, token in zip(rows, target, strict=True)]
        np.testing.assert_allclose(deployed.log_probs(prompt, target), expected, atol=2e-4)


def test_tokens_are_those_of_training(student: dict[str, Path]) -> None:
    reference, deployed = TransformersRuntime(student["source"], device="cpu"), OnnxRuntime(student["int8"])
    for text in ("predict: what is 12 + 30 ?", "  spaces  and\nlines ", "naïve café 中文", "it spells </s> and <pad> out", ""):
        ids = reference.encode(text)
        assert deployed.encode(text) == ids
        assert deployed.decode([*ids, 1]) == reference.decode([*ids, 1]) == text.strip()


def test_serving_imports_no_torch_and_prints_nothing(student: dict[str, Path]) -> None:
    program = (
        "import sys; from pathlib import Path; from train.deploy.onnx_runtime import OnnxRuntime;"
        "runtime = OnnxRuntime(Path(sys.argv[1]), device='cpu', threads=1); prompt = runtime.encode('say 1 plus 2 ?');"
        "runtime.answer([prompt], 3), runtime.log_probs(prompt, prompt); print(*sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(student["int8"])], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    loaded = set(done.stdout.split())
    assert "onnxruntime" in loaded
    assert not {"torch", "transformers", "onnx", "onnxruntime_genai"} & loaded


def test_a_damaged_file_is_told_in_one_line(student: dict[str, Path], tmp_path: Path) -> None:
    for path in student["int8"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: 5000 if path.name == WEIGHTS else None])
    with pytest.raises(RuntimeError, match=r"^ONNX Runtime cannot load .* on device 'cpu' \(.*\): run deploy again$"):
        OnnxRuntime(tmp_path)


def _with_another_head(source: Path, out: Path) -> Path:
    """The same model but for what its head gives: a T5's last states scaled otherwise, a Llama's rows of the head shifted by one."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    if config["model_type"] == "t5":
        config["scale_decoder_outputs"] = not config["scale_decoder_outputs"]
    else:
        assert config["tie_word_embeddings"]
        config["tie_word_embeddings"] = False
        weights = load_file(out / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].roll(1, dims=0)
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_a_wrong_head_is_caught_before_it_ships(student: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = _with_another_head(student["source"], tmp_path / "wrong")

    def deployed(maker: Callable[..., None], folder: Path) -> DeployedModel:
        monkeypatch.setattr(stage, "module_of", lambda target: SimpleNamespace(make=maker))
        reference = TransformersRuntime(student["source"], device="cpu")
        rows = [TaskExample(str(n), text, label) for n, (text, label) in enumerate(PAIRS[:16])]
        samples = list(stage.samples_of(rows, {}, reference.format, reference.encode))
        return stage.deploy(TARGETS["onnx-float32"], student["source"], folder, samples, samples, reference)

    error = deployed(make, tmp_path / "right").error_nats
    assert error is not None
    assert error < 1e-3
    with pytest.raises(RuntimeError, match=r"onnx-float32 (is \d+.\d+ nats a token away|gives log-probabilities [\d.]+ times)"):
        deployed(lambda source, out, *rest: make(wrong, out, *rest), tmp_path / "other")
    assert not (tmp_path / "other" / "model").exists()


def test_what_cannot_be_served_is_told(student: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^device is cuda, but these ONNX files are for ONNX Runtime on a CPU: choose cpu or auto$"):
        OnnxRuntime(student["int8"], device="cuda")
    (tmp_path / "stepdown.json").write_text((student["source"] / "stepdown.json").read_text())
    with pytest.raises(ValueError, match=r"is not an ONNX model \(it lacks decoder.onnx and weights.bin and .*\): run deploy$"):
        OnnxRuntime(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer.json, which the deployed model needs: give the student a fast tokenizer$"):
        make(tmp_path, tmp_path / "out", TARGETS["onnx-int8"], [])


# ----- random models -----


def _random_decoder(folder: Path, model_type: str = "llama", rows: int = 12, **settings: Any) -> Any:
    """The embedding has `rows` rows more than the tokenizer has tokens, as Qwen's."""
    defaults = {
        "vocab_size": len(TOKENIZER) + rows, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**defaults, **settings})).eval()
    _vary(model)
    save_model(model, TOKENIZER, _layout("decoder_only"), folder)
    return model


def _random_t5(folder: Path, **settings: Any) -> Any:
    defaults = {
        "vocab_size": len(TOKENIZER) + 12, "d_model": 64, "d_kv": 16, "d_ff": 160, "num_layers": 2, "num_decoder_layers": 3,
        "num_heads": 4, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**{**defaults, **settings})).eval()
    if not settings.get("tie_word_embeddings", True):  # transformers 5.17 ties them all the same, unless a checkpoint holds another head
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
    _vary(model)
    save_model(model, TOKENIZER, _layout("encoder_decoder"), folder)
    return model


def _vary(model: torch.nn.Module) -> None:
    # New norms are all ones and new biases zeros: a graph that left them out would not be noticed.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "relative_attention_bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))


def _layout(family: Family) -> TextFormat:
    return text_format(TOKENIZER, family, max_input_tokens=200, max_label_tokens=8, max_rationale_tokens=8)


def _torch_logits(model: Any, prompt: list[int], target: list[int]) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            # Without a cache: transformers 5.17 makes one of as many layers as the encoder has.
            decoder_ids = torch.tensor([[model.config.decoder_start_token_id, *target[:-1]]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_ids, use_cache=False).logits[0]
        else:
            logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    return np.asarray(logits)


def _greedy(model: Any, prompt: list[int], length: int) -> list[int]:
    ids: list[int] = []
    for _ in range(length):
        ids.append(int(_torch_logits(model, prompt, [*ids, 0])[-1].argmax()))
    return ids


def _ids(length: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(2, len(TOKENIZER), length)]


DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "width of no multiple of a block": {"hidden_size": 48, "intermediate_size": 100},
    "turned by llama 3's rule": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
}  # fmt: skip
T5S: dict[str, dict[str, Any]] = {
    "t5": {},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "silu, near distances": {"feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
    "width of no multiple of a block": {"d_model": 48, "feed_forward_proj": "gelu"},
}


@pytest.mark.parametrize("name", [*DECODERS, *(f"T5 {name}" for name in T5S)])
def test_logits_of_random_models(name: str, tmp_path: Path) -> None:
    source = tmp_path / "model"
    model = _random_decoder(source, **DECODERS[name]) if name in DECODERS else _random_t5(source, **T5S[name.removeprefix("T5 ")])
    for type in TYPES:
        runtime = OnnxRuntime(_deploy(source, type), threads=1)
        # Lengths on both sides of T5's distances of one bucket.
        for length in (1, 5, 180):
            prompt, target = _ids(length), _ids(150, seed=1)
            expected, found = _torch_logits(model, prompt, target), runtime.logits(prompt, target)
            assert found.shape == expected.shape
            assert found.dtype == np.float32
            assert np.linalg.norm(found - expected) <= ERRORS[type] * np.linalg.norm(expected), (type, length)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-float32", "model-int4", "model-int8"]


@pytest.mark.parametrize("family", ["decoder_only", "encoder_decoder"])
def test_step_by_step_is_the_same_as_at_once(family: str, tmp_path: Path) -> None:
    """What the cache holds, and where each row of a batch stands, against a model that reads everything anew for each token."""
    # Weights so large, and a head of its own, for answers that hang on all that was read: a tied one of small weights repeats itself.
    model = (
        _random_decoder(tmp_path / "model", tie_word_embeddings=False, initializer_range=0.4)
        if family == "decoder_only"
        else _random_t5(tmp_path / "model", initializer_factor=3.0)
    )
    runtime = OnnxRuntime(_deploy(tmp_path / "model", "float32"), threads=1)
    runtime.format = dataclasses.replace(runtime.format, eos_id=-1)
    prompts = [_ids(length, seed=length) for length in (3, 17, 60, 1)]
    found = runtime.answer(prompts, 12)
    assert len(set(itertools.chain(*found))) > 20
    assert found == [_greedy(model, prompt, 12) for prompt in prompts]


def test_a_row_of_a_quantized_batch_does_not_depend_on_the_others(tmp_path: Path) -> None:
    """Scales of a whole batch of activations, as dynamic quantization takes them, would let one row change another's answer."""
    _random_decoder(tmp_path / "model")
    for type in ("int8", "int4"):
        runtime = OnnxRuntime(_deploy(tmp_path / "model", type), threads=1)
        runtime.format = dataclasses.replace(runtime.format, eos_id=-1)
        prompts = [_ids(length, seed=length) for length in (9, 33, 90)]
        assert runtime.answer(prompts, 10) == [runtime.answer([prompt], 10)[0] for prompt in prompts]


def test_a_bfloat16_source_is_the_same_model(tmp_path: Path) -> None:
    model = _random_decoder(tmp_path / "model").to(torch.bfloat16)
    save_model(model, TOKENIZER, _layout("decoder_only"), tmp_path / "half")
    runtime = OnnxRuntime(_deploy(tmp_path / "half", "float32"), threads=1)
    prompt, target = _ids(9), _ids(9, seed=1)
    expected = _torch_logits(model.float(), prompt, target)
    assert np.linalg.norm(runtime.logits(prompt, target) - expected) <= 1e-5 * np.linalg.norm(expected)


# ----- what the files hold -----


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_and_scales_are_those_worked_out_by_hand(bits: int) -> None:
    weight = np.zeros((1, 40), np.float32)
    weight[0, :4] = [-16.0, 2.0, 16.0, 7.0]
    weight[0, 32] = 8.0
    codes, scales = quantize(weight, bits)
    half = 2 ** (bits - 1)
    # The first of the largest becomes the most negative code; the same number of the other sign is cut to the most positive one.
    assert scales.tolist() == [[16.0 / half, -8.0 / half]]
    opened = codes[0] if bits == 8 else np.stack([codes[0] & 15, codes[0] >> 4], -1).reshape(2, 32)
    assert opened.shape == (2, 32)
    assert opened[0, :5].tolist() == [0, half + round(2 * half / 16), 2 * half - 1, half + round(7 * half / 16), half]
    assert opened[1, :2].tolist() == [0, half]


@pytest.mark.parametrize("weight", [np.zeros((2, 32)), np.full((2, 32), 1e-12)])
def test_blocks_without_weights_stay_zero(weight: Any) -> None:
    codes, scales = quantize(weight.astype(np.float32), 8)
    assert (codes == 128).all()
    assert (scales == 0).all()


@pytest.mark.parametrize("family", ["decoder_only", "encoder_decoder"])
def test_what_is_stored_is_what_the_target_says(family: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 256} if family == "decoder_only" else {"d_model": 128, "d_ff": 256}
    model = (_random_decoder if family == "decoder_only" else _random_t5)(tmp_path / "model", **wide)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and not any(k in n for k in ("embed", "shared", "bias")))
    for type in TYPES:
        out, target = _deploy(tmp_path / "model", type), TARGETS[f"onnx-{type}"]
        entries = stored(out)
        assert sum(entry.num_weights for entry in entries if entry.is_matrix) == matrices
        for entry in entries:
            if entry.is_matrix:
                assert entry.type == target.type, entry
                assert target.bits <= entry.bits <= target.bits + SLACK_BITS * target.quantizes, entry
            elif entry.name in ("embedding", "lm_head"):
                assert entry.type == ("int8" if target.quantizes else "float32"), entry
            else:
                assert entry.type == "float32", entry
        assert len({entry.name for entry in entries}) == len(entries)
        assert sum(entry.num_bytes for entry in entries) <= (out / WEIGHTS).stat().st_size + 1024
        assert (out / WEIGHTS).stat().st_size <= sum(entry.num_bytes for entry in entries) + 64 * len(entries)
        graphs = [path for path in (out / DECODER, out / ENCODER) if path.exists()]
        assert len(graphs) == (1 if family == "decoder_only" else 2)
        assert all(path.stat().st_size < 100_000 for path in graphs), "arrays belong into the one file"


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("family", ["decoder_only", "encoder_decoder"])
def test_a_tied_matrix_is_stored_once(family: str, type: str, tmp_path: Path) -> None:
    sizes, names = [], []
    for tied in (True, False):
        source = tmp_path / str(tied)
        settings: dict[str, Any] = {"tie_word_embeddings": tied}
        model = _random_decoder(source, **settings) if family == "decoder_only" else _random_t5(source, **settings)
        out = _deploy(source, type)
        sizes.append((out / WEIGHTS).stat().st_size)
        names.append({entry.name for entry in stored(out)})
    rows, width = model.get_input_embeddings().weight.shape
    bits = {"float32": 32, "int8": 8.5, "int4": 8.5}[type]
    assert ("embedding" in names[0], "lm_head" in names[0]) == (True, False)
    if family == "decoder_only":
        assert "lm_head" in names[1]
        assert abs(sizes[1] - sizes[0] - rows * width * bits / 8) < 200


def test_int8_is_under_a_third_of_fp32_and_int4_under_a_quarter(student: dict[str, Path]) -> None:
    source = (student["source"] / "model.safetensors").stat().st_size
    sizes = {type: (student[type] / WEIGHTS).stat().st_size for type in TYPES}
    assert sizes["int8"] < 0.33 * source
    assert sizes["int4"] < 0.25 * source
    assert sizes["float32"] < 1.1 * source


# ----- what is refused -----


def test_a_prompt_beyond_the_places_of_the_file_is_refused(tmp_path: Path) -> None:
    _random_decoder(tmp_path / "model")
    runtime = OnnxRuntime(_deploy(tmp_path / "model", "int8"), threads=1)
    most = 2 * (200 + 8)
    assert len(runtime.answer([_ids(most - 3)], 4)[0]) <= 4
    message = r"^a prompt and its answer of 417 tokens are longer than the ONNX file has places for \(416\): shorten the prompt"
    with pytest.raises(ValueError, match=message):
        runtime.answer([_ids(most - 3), _ids(3)], 5)
    with pytest.raises(ValueError, match=message):
        runtime.log_probs(_ids(most), _ids(2))


def test_architectures_without_a_graph_are_refused(tmp_path: Path) -> None:
    config = LongT5Config(
        vocab_size=len(TOKENIZER), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    save_model(LongT5ForConditionalGeneration(config), TOKENIZER, _layout("encoder_decoder"), tmp_path / "long")
    with pytest.raises(
        ValueError, match=r"^deploy.targets: there is no ONNX graph for an encoder-decoder of type 'longt5' .*: choose a t5"
    ):
        _deploy(tmp_path / "long", "int8")
    _random_decoder(tmp_path / "narrow", head_dim=8)
    with pytest.raises(ValueError, match=r"^deploy.targets: a head of the student has 8 numbers, .* takes multiples of 16: choose"):
        _deploy(tmp_path / "narrow", "int8")
    config = AutoConfig.for_model("gpt2", vocab_size=len(TOKENIZER), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    save_model(AutoModelForCausalLM.from_config(config), TOKENIZER, _layout("decoder_only"), tmp_path / "gpt")
    with pytest.raises(ValueError, match=r"^deploy.targets: onnxruntime-genai cannot build a graph of the student \(.*\); choose"):
        _deploy(tmp_path / "gpt", "int8")
