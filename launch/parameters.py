"""How many parameters a model has, from its config.json or from how a configuration names it. Imports no torch, loads no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from train.artifacts import Family
from train.config import CutModel, ModelSource, ScratchModel

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_RELATIVE_BUCKETS = 32


def parse_parameters(text: str) -> int:
    """A number of parameters as people write it: `175B`, `1.5b`, `135M`, `10k`, `220000`.

    Raises:
        ValueError: if it is not of that form, or not a whole number of parameters.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMBT]?)", text.strip().upper())
    number = Decimal(found[1]) * _UNITS[found[2]] if found else Decimal(0)
    if number <= 0 or number != int(number):
        raise ValueError(f"{text!r} is not a number of parameters: write 175B, 1.5B, 135M, 10K or a whole number above 0")
    return int(number)


def count_parameters(config_json: Mapping[str, Any]) -> int:
    """Parameters of the model that a `config.json` describes; tied embeddings count once.

    Exact for T5 and mT5 (relu and gated), Llama, Mistral, Mixtral, Qwen2, Qwen3, Gemma 2 and 3 (its text model) and Phi-3, the causal or
    conditional-generation model of each.

    Raises:
        ValueError: for another architecture, or where a size is missing.
    """
    kind = config_json.get("model_type")
    if kind not in _COUNTERS:
        raise ValueError(f"config.json has model_type {kind!r}, whose parameters cannot be counted: known are {', '.join(_COUNTERS)}")
    try:
        return _COUNTERS[kind](config_json)
    except KeyError as missing:
        raise ValueError(f"config.json of model_type {kind!r} has no {missing.args[0]!r}: its parameters cannot be counted") from None


def largest_module(config_json: Mapping[str, Any]) -> int:
    """Parameters of the module that holds most by itself: an embedding, a linear layer, or the experts of a layer, which are one tensor.

    Raises:
        ValueError: as `count_parameters`.
    """
    count_parameters(config_json)  # whose errors are these
    config, kind = config_json, config_json["model_type"]
    if kind in ("t5", "mt5"):
        return int(config["d_model"] * max(config["vocab_size"], config["d_ff"], config["num_heads"] * config["d_kv"]))
    width, neurons, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head, groups = head_width(config), _either(config, "num_key_value_heads", heads)
    queries, keys = heads * head, groups * head
    if kind == "phi3":  # gate and up are one matrix, and queries, keys and values are
        return int(width * max(config["vocab_size"], 2 * neurons, queries + 2 * keys))
    if kind == "mixtral":
        return int(max(width * config["vocab_size"], 3 * config["num_local_experts"] * width * neurons))
    biases = {
        "attention": queries if kind == "qwen2" or config.get("attention_bias") else 0,
        "mlp": neurons if config.get("mlp_bias") else 0,
    }
    return int(max(width * config["vocab_size"], width * neurons + biases["mlp"], width * queries + biases["attention"]))


def buffer_bytes(config_json: Mapping[str, Any]) -> int:
    """Of what is not trained and not saved: rotary frequencies in fp32, twice, and Gemma's scale of its embedding."""
    kind = config_json.get("model_type")
    if kind in ("t5", "mt5"):
        return 0
    rotary = 4 * head_width(config_json)
    return {"gemma2": rotary + 4, "gemma3_text": 2 * rotary + 4}.get(str(kind), rotary)


def _count_t5(config: Mapping[str, Any]) -> int:
    width, heads = config["d_model"], config["num_heads"]
    attention = 4 * width * heads * config["d_kv"]
    matrices = 3 if config.get("feed_forward_proj", "relu").startswith("gated-") else 2
    feed_forward = matrices * width * config["d_ff"]
    encoder = config["num_layers"] * (attention + feed_forward + 2 * width)
    decoder = _either(config, "num_decoder_layers", config["num_layers"]) * (2 * attention + feed_forward + 3 * width)
    # Each stack has a last norm, and one relative bias that its layers share.
    stacks = 2 * (width + config.get("relative_attention_num_buckets", _RELATIVE_BUCKETS) * heads)
    # transformers 5 calls every T5 tied, yet keeps the second matrix of a checkpoint whose config.json says otherwise (v1.1, mT5).
    embeddings = config["vocab_size"] * width * (1 if config.get("tie_word_embeddings", True) else 2)
    return int(embeddings + encoder + decoder + stacks)


def _count_llama(config: Mapping[str, Any]) -> int:
    kind, width, heads = config["model_type"], config["hidden_size"], config["num_attention_heads"]
    is_gemma = kind.startswith("gemma")
    head = head_width(config)
    queries, keys = heads * head, _either(config, "num_key_value_heads", heads) * head
    attention = 2 * width * queries + 2 * width * keys
    if kind == "qwen2":
        attention += queries + 2 * keys
    elif kind in ("llama", "qwen3", "gemma2", "gemma3_text") and config.get("attention_bias", False):
        attention += queries + 2 * keys + width
    if kind in ("qwen3", "gemma3_text"):
        attention += 2 * head
    feed_forward = 3 * width * config["intermediate_size"]
    if kind == "mixtral":
        feed_forward = config["num_local_experts"] * (feed_forward + width)  # the router has a row for each
    if kind == "llama" and config.get("mlp_bias", False):
        feed_forward += 2 * config["intermediate_size"] + width
    layers = config["num_hidden_layers"] * (attention + feed_forward + (4 if is_gemma else 2) * width)
    embeddings = config["vocab_size"] * width * (1 if config.get("tie_word_embeddings", is_gemma) else 2)
    return int(embeddings + layers + width)


def head_width(config: Mapping[str, Any]) -> int:
    """Of one attention head of a decoder-only model."""
    by_kind = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256}
    return _either(config, "head_dim", by_kind.get(config["model_type"], config["hidden_size"] // config["num_attention_heads"]))


def _either(config: Mapping[str, Any], key: str, otherwise: int) -> int:
    value = config.get(key)
    return otherwise if value is None else int(value)


_COUNTERS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "t5": _count_t5,
    "mt5": _count_t5,
    "llama": _count_llama,
    "mistral": _count_llama,
    "qwen2": _count_llama,
    "qwen3": _count_llama,
    "mixtral": _count_llama,
    "gemma2": _count_llama,
    "gemma3_text": _count_llama,
    "phi3": _count_llama,
}


def is_known(config_json: Mapping[str, Any]) -> bool:
    """The parameters of its architecture can be counted."""
    return config_json.get("model_type") in _COUNTERS


def config_of(model: ModelSource, *, vocabulary: int, teacher: ModelSource | None = None) -> dict[str, Any] | None:
    """The config.json of a model as the configuration names it, without loading it.

    Args:
        model: what stands under `model`.
        vocabulary: tokens of the tokenizer of a model from scratch, or of the teacher that it is cut from, where that one is from scratch.
        teacher: the model that a `{cut_from: teacher}` is cut from.

    Returns:
        The mapping; None where only its files would tell: a hub id, a GGUF file, a package's file.
    """
    config = _config_of(teacher if isinstance(model, CutModel) else model, vocabulary)
    return _cut(config, model) if config is not None and isinstance(model, CutModel) and is_known(config) else config


def family_of(model: ModelSource, teacher: ModelSource | None) -> Family | None:
    """Of a model as the configuration names it, without loading it; None where only its files would tell.

    Args:
        model: what stands under `model`.
        teacher: the model that a `{cut_from: teacher}` is cut from.
    """
    config = _config_of(teacher if isinstance(model, CutModel) else model, vocabulary=1)
    return None if config is None else family_of_config(config)


def family_of_config(config_json: Mapping[str, Any]) -> Family:
    """Of the model that a config.json describes."""
    both = config_json.get("is_encoder_decoder", config_json.get("model_type") in ("t5", "mt5"))
    return "encoder_decoder" if both else "decoder_only"


def _cut(config: Mapping[str, Any], model: CutModel) -> dict[str, Any]:
    """The teacher's config.json as it reads for the student cut from it."""
    cut = dict(config)
    if model.layers is not None:
        layers = model.layers if isinstance(model.layers, int) else len(model.layers)
        cut |= {"num_layers": layers, "num_decoder_layers": layers, "num_hidden_layers": layers}
    if model.neurons is not None:
        cut |= {"d_ff": model.neurons, "intermediate_size": model.neurons}
    if model.heads is not None and "num_attention_heads" in cut:
        heads = cut["num_attention_heads"]
        groups = _either(cut, "num_key_value_heads", heads)
        # A head stays as wide as it was, and groups that share keys and values go whole.
        width = head_width(cut)
        cut |= {"num_attention_heads": model.heads, "num_key_value_heads": model.heads * groups // heads, "head_dim": width}
    elif model.heads is not None:
        cut["num_heads"] = model.heads
    return cut


def _config_of(model: str | ScratchModel | CutModel | None, vocabulary: int) -> dict[str, Any] | None:
    if isinstance(model, ScratchModel):
        return _scratch_config(model, vocabulary)
    if not isinstance(model, str) or not (path := Path(model) / "config.json").is_file():
        return None
    return dict(json.loads(path.read_text()))


def _scratch_config(model: ScratchModel, vocabulary: int) -> dict[str, Any]:
    neurons = model.d_ff or 4 * model.d_model
    if model.from_scratch == "t5":
        sizes = {"d_model": model.d_model, "d_kv": model.d_model // model.heads, "num_heads": model.heads, "d_ff": neurons}
        return {"model_type": "t5", **sizes, "num_layers": model.layers, "vocab_size": vocabulary, "feed_forward_proj": model.feed_forward}
    sizes = {"hidden_size": model.d_model, "num_attention_heads": model.heads, "intermediate_size": neurons}
    return {"model_type": "llama", **sizes, "num_hidden_layers": model.layers, "vocab_size": vocabulary, "tie_word_embeddings": True}
