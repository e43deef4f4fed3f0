"""GGUF files of small models, in llama.cpp itself."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from data.prompts import TextFormat
from train.deploy import ggml, gguf, stage
from train.deploy.blocks import Blocks
from train.deploy.ggml import quantize
from train.deploy.llama_cpp import LlamaCppRuntime
from train.deploy.targets import GGUF_FILE, TARGETS
from train.grids import Grid, put_on_grids, write_scales
from train.models import load_folder, save_model
from train.runtimes import TransformersRuntime, model_bytes
from train.tokenization import text_format, train_tokenizer

TEXTS = [f"what is {a} plus {b}? it isn't {a}, it's {a + b}.\n  So: {a * b}" for a in range(12) for b in range(12)]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}  # fmt: skip


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE that cuts texts as models of a kind do."""
    if kind == "own":
        return train_tokenizer(TEXTS, 400)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt-2", "smollm"))
    split = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated")],
        "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated")],
    }[kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level]) if split else level
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def model_of(kind: str, rows: int, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=rows, **(SIZES | settings)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As trained ones are not: of a norm of ones and a bias of zeros nobody would see whether it is written.
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(3.0)
    return model.float().eval()


def made(folder: Path, target: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    form = text_format(tokenizer, "decoder_only", max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32)
    save_model(model, tokenizer, form, folder / "model")
    gguf.make(folder / "model", folder / target, TARGETS[target], [])
    return folder / target


def error(folder: Path, model: PreTrainedModel, runtime: LlamaCppRuntime | None = None, text: str = TEXTS[17]) -> float:
    """||logits - reference|| / ||reference|| of what follows a text, logits less their mean."""
    runtime = runtime or LlamaCppRuntime(folder, threads=1)
    ids = runtime.encode(text)
    prompt, target = ids[:20], ids[20:26]
    with torch.inference_mode():
        reference = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1].double().numpy()

    def centred(values: NDArray[Any]) -> NDArray[Any]:
        return values - values.mean(axis=1, keepdims=True)

    found, wanted = centred(runtime.logits(prompt, target).astype(np.float64)[:, : reference.shape[1]]), centred(reference)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16, "rope_theta": 500.0,
                }
            },
        ),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32}),
    ],
)  # fmt: skip
def test_llama_cpp_computes_what_transformers_does(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tokenizer_of("own")
    model = model_of(kind, len(tokenizer) + 3, **settings)
    assert error(made(tmp_path, "gguf-f16", model, tokenizer), model) < 0.005


@pytest.mark.parametrize(
    ("target", "most"),
    [("gguf-q8_0", 0.05), ("gguf-q6_k", 0.1), ("gguf-q5_1", 0.2), ("gguf-q5_0", 0.2), ("gguf-q4_k_m", 0.35), ("gguf-q4_0", 0.35)],
)
def test_the_error_of_each_type_is_bounded(target: str, most: float, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("own")
    model = model_of("llama", len(tokenizer))
    with torch.no_grad():  # as at random, without what makes the other test see everything
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.div_(3.0)
    assert error(made(tmp_path, target, model, tokenizer), model) < most


@pytest.mark.parametrize(
    ("target", "kinds", "bits"),
    [
        ("gguf-q4_0", {"Q4_0": 14, "F32": 5, "Q8_0": 2}, {4.5}),
        ("gguf-tq2_0", {"TQ2_0": 14, "F32": 5, "Q8_0": 2}, {2.0625}),
        ("gguf-tq1_0", {"TQ1_0": 14, "F32": 5, "Q8_0": 2}, {1.6875}),
        ("gguf-q1_0", {"Q1_0": 14, "F32": 5, "Q8_0": 2}, {1.125}),
        ("gguf-q6_k", {"Q6_K": 14, "F32": 5, "Q8_0": 2}, {6.5625}),
        ("gguf-q4_k_m", {"Q4_K": 12, "Q6_K": 2, "F32": 5, "Q8_0": 2}, {4.5, 6.5625}),
        ("gguf-q3_k_m", {"Q3_K": 8, "Q4_K": 4, "Q5_K": 2, "F32": 5, "Q8_0": 2}, {3.4375, 4.5, 5.5}),
        ("gguf-q2_k", {"Q2_K": 8, "Q3_K": 6, "F32": 5, "Q8_0": 2}, {2.625, 3.4375}),
    ],
)
def test_what_a_file_holds(target: str, kinds: dict[str, int], bits: set[float], tmp_path: Path) -> None:
    tokenizer = tokenizer_of("own")
    folder = made(tmp_path, target, model_of("llama", len(tokenizer)), tokenizer)
    tensors = gguf.stored(folder)
    assert Counter(tensor.type for tensor in tensors) == kinds
    assert {tensor.bits for tensor in tensors if tensor.is_matrix} == bits
    assert sum(tensor.num_bytes for tensor in tensors) < model_bytes(folder)[0] == (folder / "model.gguf").stat().st_size
    written = gguf.gguf.GGUFReader(folder / "model.gguf").fields["general.file_type"]
    assert gguf.gguf.LlamaFileType(int(written.parts[-1][0])).name == f"MOSTLY_{target.removeprefix('gguf-').upper()}"


def test_a_recipe_mixes_types_as_llama_cpp_does() -> None:
    config = AutoConfig.for_model("llama", **(SIZES | {"num_hidden_layers": 32, "num_attention_heads": 8, "num_key_value_heads": 2}))

    def layers(target: str, part: str, type: str) -> list[int]:
        found = (gguf.mixed(f"blk.{i}.{part}.weight", TARGETS[target], config) for i in range(32))
        return [i for i, kind in enumerate(found) if kind == type]

    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert layers("gguf-q4_k_m", "ffn_down", "Q6_K") == layers("gguf-q4_k_m", "attn_v", "Q6_K") == more
    assert layers("gguf-q4_k_m", "attn_q", "Q4_K") == list(range(32))
    assert layers("gguf-q3_k_m", "ffn_down", "Q5_K") == layers("gguf-q3_k_m", "attn_v", "Q5_K") == [0, 1]
    assert layers("gguf-q2_k", "attn_v", "Q4_K") == list(range(32)), "one value head serves four"
    assert gguf.mixed("output.weight", TARGETS["gguf-q4_k_m"], config) == "Q4_K"


def test_quantizers_of_llama_cpp_lose_what_their_bits_say() -> None:
    values = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    for type, most in (("Q6_K", 0.02), ("Q5_K", 0.04), ("Q4_K", 0.08), ("Q3_K", 0.16), ("Q2_K", 0.3)):
        read = gguf.gguf.quants.dequantize(quantize(values, type), gguf.gguf.GGMLQuantizationType[type])
        assert 0.8 * most < np.linalg.norm(read - values) / np.linalg.norm(values) < most, type


def test_one_bit_is_packed_with_the_mean_size_of_what_is_not_zero() -> None:
    values = np.zeros((1, 128), np.float32)
    values[0, :4] = [0.5, -1.0, 1.5, -1.0]
    packed = gguf._packed(values, "Q1_0")
    assert packed.shape == (1, 18)
    assert packed[0, :2].view(np.float16)[0] == 1.0
    # From the lowest bit on, 1 for plus: of the four -, + is 1 and 0 counts as plus.
    assert packed[0, 2:].tolist() == [0b11110101, *[255] * 15]


def test_few_bits_are_rounded_on_training_rows_unless_they_have_recovered(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("own")
    model, source = model_of("llama", len(tokenizer)), tmp_path / "trained" / "model"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3 if parameter.dim() > 1 else 1.0)
    form = text_format(tokenizer, "decoder_only", max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32)
    save_model(model, tokenizer, form, source)
    rows = [([3 + n, 50, 7 + n], [60 + n, 61]) for n in range(24)]

    def first_matrix(name: str) -> NDArray[np.float32]:
        folder = tmp_path / name
        stage.deploy(TARGETS["gguf-q4_0"], source, folder, rows, rows[:4], TransformersRuntime(source, device="cpu"))
        assert {path.name for path in folder.iterdir()} == {"artifact.json", "model", "verified.json", "verify.json"}
        tensors = {tensor.name: tensor for tensor in gguf.gguf.GGUFReader(folder / "model" / GGUF_FILE).tensors}
        found = tensors["blk.0.ffn_down.weight"]
        return gguf.gguf.quants.dequantize(found.data, found.tensor_type)

    weight = model.model.layers[0].mlp.down_proj.weight.detach()
    nearest = Grid("signed", 4, 32).rounded(weight).numpy()
    calibrated = first_matrix("calibrated")
    assert np.mean(calibrated == nearest) < 0.95
    assert np.linalg.norm(calibrated - weight.numpy()) < 2 * np.linalg.norm(nearest - weight.numpy())
    write_scales({"some.scale": torch.ones(1)}, source.parent)
    assert np.mean(first_matrix("recovered") == nearest) > 0.99  # gguf's own rounding, which takes the other side of a tie


def calibrated(folder: Path, target: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple[Path, PreTrainedModel]:
    """The file, its matrices rounded on texts, and the model in fp32 that it should be."""
    form = text_format(tokenizer, "decoder_only", max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32)
    save_model(model, tokenizer, form, folder / "model")
    encode = TransformersRuntime(folder / "model", device="cpu").encode
    rows = [(ids[:-6], ids[-6:]) for ids in map(encode, TEXTS[::2])]
    with stage._calibrated(TARGETS[target], folder / "model", folder, rows) as rounded:
        gguf.make(rounded, folder / target, TARGETS[target], rows)
        return folder / target, load_folder(rounded, dtype=torch.float32)[0]


@pytest.mark.parametrize(
    ("kind", "target", "types", "settings"),
    [
        ("llama", "gguf-q6_k", {"Q6_K"}, {}),
        ("llama", "gguf-q5_1", {"Q5_1"}, {}),
        ("llama", "gguf-q4_k_m", {"Q4_K", "Q6_K"}, {}),
        ("llama", "gguf-q3_k_m", {"Q3_K", "Q4_K", "Q5_K"}, {}),
        ("llama", "gguf-q2_k", {"Q2_K", "Q3_K"}, {}),
        ("qwen2", "gguf-q4_k_m", {"Q4_K", "Q6_K"}, {"tie_word_embeddings": True}),
        ("llama", "gguf-q4_k_m", {"Q4_K", "Q5_0", "Q6_K", "Q8_0"}, {"hidden_size": 288}),
    ],
)
def test_blocks_with_scales_of_their_own_are_rounded_on_training_rows(
    kind: str, target: str, types: set[str], settings: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = tokenizer_of("own")
    model = model_of(kind, len(tokenizer) + 3, **settings)
    folder, rounded = calibrated(tmp_path / "calibrated", target, model, tokenizer)
    assert {tensor.type for tensor in gguf.stored(folder) if tensor.is_matrix} == types
    # llama.cpp rounds its inputs, embedding and head to 8 bits, and nothing besides what was chosen.
    assert error(folder, rounded) < 0.06
    nearest = made(tmp_path / "nearest", target, model, tokenizer)
    texts = TEXTS[1:60:6]
    found, before = (
        [error(of, model, runtime, text) for text in texts]
        for of, runtime in ((f, LlamaCppRuntime(f, threads=1)) for f in (folder, nearest))
    )
    assert np.mean(found) < 0.7 * np.mean(before)


def test_matrices_are_rounded_as_the_recipe_mixes_them() -> None:
    model = model_of("llama", 400)
    found = gguf.grids(model, TARGETS["gguf-q4_k_m"])
    assert len(found) == 14
    assert found["model.layers.1.mlp.down_proj"] == found["model.layers.1.self_attn.v_proj"] == Blocks("Q6_K")
    assert found["model.layers.0.mlp.down_proj"] == found["model.layers.1.self_attn.q_proj"] == Blocks("Q4_K")
    narrow = gguf.grids(model_of("llama", 400, hidden_size=288), TARGETS["gguf-q4_k_m"])
    assert narrow["model.layers.0.mlp.up_proj"] == Grid("signed", 5, 32)
    assert "model.layers.1.self_attn.v_proj" not in narrow, "it falls back to Q8_0"
    with pytest.raises(ValueError, match=r"gguf-q4_k_m, but the student's type is gemma2: gguf takes llama, mistral, qwen2, qwen3"):
        gguf.grids(model_of("gemma2", 400, head_dim=32), TARGETS["gguf-q4_k_m"])


def test_a_library_without_quantizers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ggml._quantizer.cache_clear()
    monkeypatch.setattr(ggml.ctypes, "CDLL", lambda _: object())
    with pytest.raises(
        ValueError, match=r"does not show llama.cpp's quantizers, which K-quants are made by, and gguf-q5_1 on training rows: install"
    ):
        quantize(np.zeros((1, 256), np.float32), "Q4_K")
    ggml._quantizer.cache_clear()


@pytest.mark.parametrize("target", ["gguf-q4_0", "gguf-tq2_0", "gguf-tq1_0", "gguf-q1_0"])
def test_llama_cpp_reads_weights_on_a_grid_as_they_are(target: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("own")
    model = model_of("llama", len(tokenizer))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    put_on_grids(model, gguf.grids(model, TARGETS[target]))
    assert not torch.allclose(before["model.layers.0.mlp.up_proj.weight"], model.get_submodule("model.layers.0.mlp.up_proj").weight)
    # What is left is what llama.cpp rounds its inputs, embedding and head to: 8 bits.
    assert error(made(tmp_path, target, model, tokenizer), model) < 0.06


def test_rows_that_the_blocks_do_not_divide_fall_back_and_are_seen() -> None:
    assert gguf.type_of("blk.0.ffn_up.weight", (1536, 576), "TQ2_0") == "Q4_0"
    assert gguf.type_of("blk.0.ffn_down.weight", (576, 1536), "TQ2_0") == "TQ2_0"
    assert gguf.type_of("blk.0.ffn_up.weight", (64, 48), "Q8_0") == "F16"
    assert gguf.type_of("token_embd.weight", (64, 576), "Q4_0") == "Q8_0"
    assert gguf.type_of("blk.0.attn_norm.weight", (576,), "Q8_0") == "F32"
    assert gguf.type_of("output.weight", (64, 576), "F16") == "F16"


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind)
    runtime = LlamaCppRuntime(made(tmp_path, "gguf-q8_0", model_of("llama", len(tokenizer)), tokenizer), threads=1)
    assert all(runtime.cuts_as_trained(text) for text in (*TEXTS[::7], "x12345 </s> y", "Don't\r\n\r\n stop"))


def test_a_way_of_cutting_that_llama_cpp_does_not_know_is_its_default() -> None:
    assert gguf.pre_tokenizer_of(None) == "default"
    assert gguf.pre_tokenizer_of({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": r"\d"}}]}) == "default"


def test_answers_are_those_of_transformers_in_any_batch(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("own")
    folder = made(tmp_path, "gguf-f16", model_of("llama", len(tokenizer), tie_word_embeddings=True), tokenizer)
    runtime, reference = LlamaCppRuntime(folder, threads=1), TransformersRuntime(tmp_path / "model", device="cpu")
    prompts = [runtime.format.prompt_ids("predict", text, runtime.encode)[0] for text in TEXTS[:100:9]]
    prompts += [prompt[:7] for prompt in prompts]
    together, alone = runtime.answer(prompts, 8), [answer for prompt in prompts for answer in runtime.answer([prompt], 8)]
    # Of random weights near-ties may fall the other way in 16 bits.
    for other in (alone, reference.answer(prompts, 8)):
        assert sum(ours == theirs for ours, theirs in zip(together, other, strict=True)) >= 0.85 * len(prompts)
    assert runtime.answer([], 8) == []
    assert all(map(math.isfinite, runtime.log_probs(prompts[0], prompts[1][:3])))


def test_the_end_of_sequence_token_ends_an_answer(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("own")
    model = model_of("llama", len(tokenizer))
    with torch.no_grad():
        model.get_output_embeddings().weight[1] *= 50.0
    runtime = LlamaCppRuntime(made(tmp_path, "gguf-f16", model, tokenizer), threads=1)
    found = runtime.answer([runtime.encode(text) for text in TEXTS[:24]], 6)
    assert any(len(answer) < 6 for answer in found)
    assert not any(1 in answer for answer in found)


def test_what_gguf_does_not_take_is_told(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("own")
    gemma = model_of("gemma2", len(tokenizer), head_dim=32)
    with pytest.raises(ValueError, match=r"gguf-f16, but the student's type is gemma2: gguf takes llama, mistral, qwen2, qwen3"):
        made(tmp_path / "gemma", "gguf-f16", gemma, tokenizer)
    long = model_of("llama", len(tokenizer), rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(ValueError, match=r"the student's rope_type is dynamic, which gguf does not take: use a ctranslate2 target"):
        made(tmp_path / "long", "gguf-f16", long, tokenizer)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2}, unk_token="<pad>"))
    plain = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    with pytest.raises(ValueError, match=r"the student's tokenizer is no byte-level BPE .*: use a ctranslate2 target"):
        made(tmp_path / "words", "gguf-f16", model_of("llama", 3), plain)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )
    with pytest.raises(ValueError, match=r"the student's type is t5"):
        made(tmp_path / "t5", "gguf-f16", t5, plain)


def test_a_damaged_file_and_a_missing_one(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("own")
    folder = made(tmp_path, "gguf-f16", model_of("llama", len(tokenizer)), tokenizer)
    path = folder / "model.gguf"
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(RuntimeError, match=r"llama.cpp cannot load .*model.gguf .*: run deploy again"):
        LlamaCppRuntime(folder, threads=1)
    path.unlink()
    with pytest.raises(ValueError, match=r"has no model.gguf: run deploy"):
        LlamaCppRuntime(folder, threads=1)


def test_ollama_is_told_the_prompt() -> None:
    form = TextFormat("decoder_only", 1, 0, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32)
    assert gguf.modelfile(form) == (
        'FROM ./model.gguf\nTEMPLATE """predict: {{ .Prompt }}\nAnswer:"""\n'
        "PARAMETER temperature 0\nPARAMETER num_predict 8\nPARAMETER num_ctx 72\n"
    )
