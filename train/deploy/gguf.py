"""GGUF files for llama.cpp and what is built on it (Ollama, LM Studio): decoder-only models of the Llama and Qwen families.

The only module that imports the library gguf to write. It has numpy's quantizers, ggml.py the others; the file is read here again tensor
by tensor.
Names, permutation and metadata are those that llama.cpp reads; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from numpy.typing import NDArray

from data.prompts import FORMAT_FILE, TextFormat
from train.deploy.ggml import CODED, block_of, coded, quantize
from train.deploy.targets import GGUF_FILE, TOKENIZER, Sample, Stored, Target, fallback_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from train.grids import Leveled

Array = NDArray[Any]
_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Of transformers' model types, the architectures whose tensors map one to one."""
_HEAD = "Q8_0"
"""Of embeddings and head, where a target has fewer bits: they are read once a token, and a tied one is both."""
_PRE_TOKENIZERS = {
    "smollm": ("Digits", "ByteLevel"),
    "gpt-2": ("ByteLevel",),
}
"""Of tokenizers whose texts are cut without a pattern of their own: the steps, as tokenizer.json names them."""
_PATTERNS = {r"\p{N}{1,3}": "llama-bpe", r"\p{N}": "qwen2"}
"""What a pattern says about digits tells Llama 3's from Qwen's; they agree otherwise."""
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"


def make(source: Path, out: Path, target: Target, calibration: Sequence[Sample]) -> None:
    """Writes `model.gguf`, tokenizer.json, stepdown.json and an Ollama `Modelfile`.

    Args:
        source: a model folder of this project.
        out: the folder to make.
        target: its type is one of llama.cpp's.
        calibration: not read: these quantizers look at weights only, which may stand on a grid already, with the headers of its blocks
            beside the model (train/calibration.py).

    Raises:
        ValueError: if llama.cpp's form of such a model, or of its tokenizer, is not known here.
    """
    import torch

    from train.grids import read_scales
    from train.models import load_folder

    del calibration
    model, tokenizer, form = load_folder(source, dtype=torch.float32)
    config = model.config
    architecture = _architecture(config, target)
    out.mkdir(parents=True)
    writer = gguf.GGUFWriter(out / GGUF_FILE, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture]])
    _describe(writer, config, target)
    _add_vocabulary(writer, json.loads((source / TOKENIZER).read_text(encoding="utf-8")), form, _num_rows(model), target)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    for name, values, header in _tensors(model, architecture, read_scales(source)):
        kind = type_of(name, values.shape, mixed(name, target, config))
        packed = _packed(values, kind) if header is None else coded(values, header, kind)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in (TOKENIZER, FORMAT_FILE):
        shutil.copyfile(source / name, out / name)
    (out / "Modelfile").write_text(modelfile(form), encoding="utf-8")


def grids(model: PreTrainedModel, target: Target) -> dict[str, Leveled]:
    """How each matrix is rounded, by its name; those that fall back to 8 bits or a float are left out.

    Raises:
        ValueError: if llama.cpp's form of such a model is not known here.
    """
    from train.deploy.blocks import Blocks
    from train.grids import Grid, matrices

    config = model.config
    place = _places(config, _architecture(config, target))
    ternary = Grid("ternary", 2, block_of("TQ2_0"))
    signed = {type: Grid("signed", bits, block_of(type)) for type, bits in (("Q5_0", 5), ("Q4_0", 4))}
    known: dict[str, Leveled] = {type: Blocks(type) for type in CODED}
    known |= {**signed, "TQ2_0": ternary, "TQ1_0": ternary, "Q1_0": Grid("binary", 1, block_of("Q1_0"))}
    types = {
        name: type_of(place(name), linear.weight.shape, mixed(place(name), target, config)) for name, linear in matrices(model).items()
    }
    return {name: known[type] for name, type in types.items() if type in known}


def stored(folder: Path) -> list[Stored]:
    """What the file holds, tensor by tensor."""
    return [
        Stored(t.name, int(t.n_elements), int(t.n_bytes), t.tensor_type.name, t.name.startswith("blk.") and len(t.shape) == 2)
        for t in gguf.GGUFReader(folder / GGUF_FILE).tensors
    ]


def mixed(name: str, target: Target, config: PreTrainedConfig) -> str:
    """The type that llama.cpp's recipe of a target's name gives a matrix, where its rows allow it.

    Source: `llama_tensor_get_type` of llama.cpp's src/llama-quant.cpp, without an importance matrix.
    """
    if not target.mixed_with or not name.startswith("blk."):
        return target.type
    layer, layers, part = int(name.split(".")[1]), config.num_hidden_layers, name.split(".")[2]
    if target.type == "Q4_K":
        ends = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        return "Q6_K" if part in ("attn_v", "ffn_down") and ends else "Q4_K"
    if target.type == "Q3_K":
        first = {"attn_v": 2, "ffn_down": layers // 16}
        if part in first:
            return "Q5_K" if layer < first[part] else "Q4_K"
        return "Q4_K" if part == "attn_output" else "Q3_K"
    if part == "attn_v" and config.num_attention_heads >= 4 * config.num_key_value_heads:
        return "Q4_K"
    return "Q3_K" if part in ("attn_v", "attn_output", "ffn_down") else "Q2_K"


def type_of(name: str, shape: Sequence[int], type: str) -> str:
    """What a tensor is stored as where the target's type is `type`: vectors in F32, embeddings and head in no fewer than 8 bits."""
    if len(shape) == 1:
        return "F32"
    if name.startswith(("token_embd", "output")) and type != "F16" and _bits(type) < _bits(_HEAD):
        type = _HEAD
    while type != "F16" and shape[-1] % block_of(type):
        type = fallback_of(type)
    return type


def modelfile(form: TextFormat) -> str:
    """How Ollama is to call the model: the student's own prompt, greedily."""
    prompt = form.prompt(form.part, "{{ .Prompt }}")
    return (
        f'FROM ./{GGUF_FILE}\nTEMPLATE """{prompt}"""\nPARAMETER temperature 0\nPARAMETER num_predict {form.max_answer_tokens}\n'
        f"PARAMETER num_ctx {form.max_input_tokens + form.max_answer_tokens}\n"
    )


def _packed(values: NDArray[np.float32], type: str) -> Array:
    """A tensor's blocks as bytes; gguf has no quantizers of its own for K-quants and Q1_0."""
    if type.endswith("_K"):
        return quantize(values, type)
    if type != "Q1_0":
        packed: Array = gguf.quants.quantize(values, gguf.GGMLQuantizationType[type])
        return packed
    # block_q1_0 of ggml-common.h: a scale, then a bit a weight from the lowest on, 1 for +scale and 0 for -scale.
    blocks = values.reshape(-1, block_of(type))
    used = np.count_nonzero(blocks, axis=1, keepdims=True).clip(min=1)
    scales = (np.abs(blocks).sum(1, keepdims=True, dtype=np.float64) / used).astype(np.float16)
    bits = np.packbits(blocks >= 0, axis=1, bitorder="little")
    return np.concatenate([scales.view(np.uint8), bits], axis=1).reshape(*values.shape[:-1], -1)


def _bits(type: str) -> float:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    return 8 * float(size) / float(block)


def _architecture(config: PreTrainedConfig, target: Target) -> str:
    if config.model_type not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ValueError(f"deploy.targets holds {target.name}, but the student's type is {config.model_type}: gguf takes {known}")
    return _ARCHITECTURES[config.model_type]


def _places(config: PreTrainedConfig, architecture: str) -> Callable[[str], str]:
    """From transformers' names of parameters, and of layers, to llama.cpp's."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], config.num_hidden_layers)

    def place(name: str) -> str:
        found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, f"{name} has no place in a file of {architecture}"
        return found

    return place


def _describe(writer: Any, config: PreTrainedConfig, target: Target) -> None:
    """Sizes and rotary embeddings."""
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{target.name.removeprefix('gguf-').upper()}"]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind not in ("default", "llama3"):
        raise ValueError(
            f"deploy.targets holds {target.name}, but the student's rope_type is {kind}, which gguf does not take: use a ctranslate2 target"
        )


def _num_rows(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _tensors(
    model: PreTrainedModel, architecture: str, headers: Mapping[str, Tensor]
) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.uint8] | None]]:
    """Each tensor of the file by llama.cpp's name, in fp32, and the headers of its blocks where they have been chosen (`NAME.header`).

    A head that is the embedding is left out, as llama.cpp expects.
    """
    config = model.config
    place, factors = _places(config, architecture), _frequency_factors(config)
    # llama.cpp rotates neighbours in this architecture, transformers the two halves of a head.
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads} if architecture == "LLAMA" else {}
    if factors is not None:
        yield "rope_freqs.weight", factors, None
    for name, value in model.named_parameters():
        renamed, header = place(name), headers.get(f"{name.removesuffix('.weight')}.header")
        arrays = [value.detach().float().numpy(), None if header is None else header.numpy()]
        for part in (part for part in heads if part in renamed):
            arrays = [None if array is None else _interleaved(array, heads[part]) for array in arrays]
        values, blocks = arrays
        yield renamed, np.ascontiguousarray(values), blocks


def _interleaved(rows: Array, heads: int) -> Array:
    """The rows of each head in the order first, middle, second, middle + 1, ... of its halves."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _frequency_factors(config: PreTrainedConfig) -> NDArray[np.float32] | None:
    """By what Llama 3.1 and later divide each rotary frequency: long waves by `factor`, short ones by 1, those between by a blend.

    Source: `_compute_llama3_parameters` of transformers, solved for the quotient.
    """
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = rope["rope_theta"] ** -(np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    waves = 2 * math.pi / frequencies
    context, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((context / waves - low) / (high - low), 0.0, 1.0)
    factors: NDArray[np.float32] = (1.0 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)
    return factors


def _add_vocabulary(writer: Any, tokenizer: Mapping[str, Any], form: TextFormat, num_rows: int, target: Target) -> None:
    """The tokenizer as llama.cpp reads it; our own runtime reads tokenizer.json instead."""
    model = tokenizer["model"]
    if model["type"] != "BPE" or "ByteLevel" not in _steps(tokenizer.get("pre_tokenizer")):
        raise ValueError(
            f"deploy.targets holds {target.name}, but the student's tokenizer is no byte-level BPE (as those of Llama 3, Qwen, SmolLM and "
            "models from scratch are): use a ctranslate2 target"
        )
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    texts = {index: text for text, index in model["vocab"].items()} | {index: token["content"] for index, token in added.items()}
    kinds = {index: gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED for index, token in added.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_of(tokenizer.get("pre_tokenizer")))
    # Where the tokenizer leaves gaps, or the embedding has more rows, each row needs a name.
    writer.add_token_list([texts.get(index, f"<unused_{index}>") for index in range(num_rows)])
    unused = gguf.TokenType.UNUSED
    writer.add_token_types([kinds.get(index, gguf.TokenType.NORMAL if index in texts else unused) for index in range(num_rows)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(form.eos_id)
    writer.add_pad_token_id(form.pad_id)
    if form.prefix_ids:
        writer.add_bos_token_id(form.prefix_ids[0])
    writer.add_add_bos_token(bool(form.prefix_ids))


def pre_tokenizer_of(steps: Mapping[str, Any] | None) -> str:
    """llama.cpp's name of how a text is cut before it is encoded; `default` where it knows no such way, and token ids should be given.

    Args:
        steps: the section pre_tokenizer of a tokenizer.json.
    """
    listed, kinds = _listed(steps), _steps(steps)
    for name, known in _PRE_TOKENIZERS.items():
        if kinds == known:
            return name
    patterns = [step["pattern"].get("Regex", "") for step in listed if step["type"] == "Split"]
    if len(patterns) == 1 and _CONTRACTIONS in patterns[0]:
        return next((name for digits, name in _PATTERNS.items() if digits in patterns[0]), "default")
    return "default"


def _listed(steps: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    return [] if steps is None else steps.get("pretokenizers", [steps])


def _steps(steps: Mapping[str, Any] | None) -> tuple[str, ...]:
    return tuple(step["type"] for step in _listed(steps))
