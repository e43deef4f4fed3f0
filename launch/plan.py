"""How much memory each model needs, and how a teacher is laid over the GPUs. Arithmetic only: imports no torch, loads no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from train.config import CutModel, ScratchModel

Precision = Literal["fp32", "bf16", "fp16", "int8", "int4"]

_BITS: dict[Precision, int] = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_RELATIVE_BUCKETS = 32


# ----- how many parameters -----


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

    Exact for T5 and mT5 (relu and gated), Llama, Mistral, Qwen2 and Qwen3, the dense causal or conditional-generation model of each.

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
    head = _either(config, "head_dim", 128 if kind == "qwen3" else width // heads)
    queries, keys = heads * head, _either(config, "num_key_value_heads", heads) * head
    attention = 2 * width * queries + 2 * width * keys
    if kind == "qwen2":
        attention += queries + 2 * keys
    elif kind in ("llama", "qwen3") and config.get("attention_bias", False):
        attention += queries + 2 * keys + width
    if kind == "qwen3":
        attention += 2 * head
    feed_forward = 3 * width * config["intermediate_size"]
    if kind == "llama" and config.get("mlp_bias", False):
        feed_forward += 2 * config["intermediate_size"] + width
    layers = config["num_hidden_layers"] * (attention + feed_forward + 2 * width)
    embeddings = config["vocab_size"] * width * (1 if config.get("tie_word_embeddings", False) else 2)
    return int(embeddings + layers + width)


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
}


def parameters_of(
    model: str | ScratchModel | CutModel, *, vocabulary: int, teacher: str | ScratchModel | CutModel | None = None
) -> int | None:
    """Parameters of a model as the configuration names it, without loading it.

    Args:
        model: what stands under `model`.
        vocabulary: tokens of the tokenizer of a model from scratch, or of the teacher that it is cut from, where that one is from scratch.
        teacher: the model that a `{cut_from: teacher}` is cut from.

    Returns:
        The number; None where only reading the weights would tell: a hub id, a GGUF file, a package's file, an unknown architecture.
    """
    config = _config_of(teacher if isinstance(model, CutModel) else model, vocabulary)
    if config is None or config.get("model_type") not in _COUNTERS:
        return None
    if isinstance(model, CutModel):
        config = _cut(config, model)
    return count_parameters(config)


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
        width = _either(cut, "head_dim", 128 if cut["model_type"] == "qwen3" else cut["hidden_size"] // heads)
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


# ----- how many bytes, on how many GPUs -----


def weight_bytes(num_parameters: int, precision: Precision) -> int:
    """Bytes of the weights alone: 2 GB a billion parameters in 16 bits. Scales and zero points of int8 and int4 are not counted."""
    return (num_parameters * _BITS[precision] + 7) // 8


def fewest_gpus(num_bytes: int, gpu_memory_bytes: int) -> int:
    """How many GPUs hold that many bytes between them."""
    return -(-num_bytes // gpu_memory_bytes)


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """How a teacher that only generates and scores lies on the devices."""

    sharding: Literal["replica", "tensor", "zero3"]
    tensor_degree: int
    """Processes that hold one copy between them, each a slice of every matrix; 1 unless `sharding` is tensor."""
    replicas: int
    """Whole copies that work side by side."""
    weight_bytes_per_gpu: int
    """On a CPU: per process."""
    fits: bool
    why: str


def teacher_plan(
    num_parameters: int,
    gpu_memory_bytes: int,
    gpus_per_node: int,
    nodes: int,
    *,
    precision: Precision = "bf16",
    reserve: float = 0.1,
    margin: float = 0.2,
) -> TeacherPlan:
    """The cheapest way to hold a teacher: a replica on each GPU, else tensor parallel inside a node, else ZeRO-3 over all.

    Measured on two H200 with an 8B teacher: a replica a GPU writes 10,907 tokens/s (64 prompts each), two-way tensor parallel 7,523
    (64 prompts in all), ZeRO-3 651 (64 each). So a step down this list is taken only where memory forces it.

    Args:
        num_parameters: of the teacher.
        gpu_memory_bytes: of one GPU.
        gpus_per_node: GPUs of one node; tensor parallel stays inside a node, in a power of two that divides this.
        nodes: nodes of the job.
        precision: of the weights.
        reserve: share of a GPU's memory kept free for the CUDA context and fragmentation.
        margin: room for activations and the key-value cache, as a share of the weights.
    """
    gpus = gpus_per_node * nodes
    weights = weight_bytes(num_parameters, precision)
    needed, usable = int(weights * (1 + margin)), int(gpu_memory_bytes * (1 - reserve))
    room = f"of {_gigabytes(usable)} usable on a GPU"
    if needed <= usable:
        return TeacherPlan("replica", 1, gpus, weights, True, f"a whole copy with its working memory takes {_gigabytes(needed)} {room}")
    degree = 2
    while degree <= gpus_per_node:
        if gpus_per_node % degree == 0 and needed <= degree * usable:
            why = f"one copy over {degree} GPUs of a node takes {_gigabytes(needed // degree)} {room}; on fewer it does not fit"
            return TeacherPlan("tensor", degree, gpus // degree, -(-weights // degree), True, why)
        degree *= 2
    share, fits = -(-weights // gpus), needed <= gpus * usable
    if fits:
        why = (
            f"one copy over all {gpus} GPUs takes {_gigabytes(needed // gpus)} {room}; a node does not hold it in slices of a power of two"
        )
    else:
        why = (
            f"{num_parameters:,} parameters in {precision} take {_gigabytes(needed)} with their working memory, but {gpus} GPUs have "
            f"{_gigabytes(gpus * usable)} usable: use at least {fewest_gpus(needed, usable)} such GPUs, larger ones, or a smaller teacher"
        )
    return TeacherPlan("zero3", 1, 1, share, fits, why)


def cpu_teacher_plan(
    num_parameters: int,
    memory_bytes: int | None,
    processes: int = 1,
    *,
    precision: Precision = "fp32",
    reserve: float = 0.1,
    margin: float = 0.2,
) -> TeacherPlan:
    """A teacher without a GPU: a replica in each process, in the machine's memory.

    Args:
        num_parameters: of the teacher.
        memory_bytes: of the machine; None where it is not known.
        processes: that share the machine, each with its copy.
        precision: of the weights.
        reserve: share of the memory kept for everything else.
        margin: room for activations and the key-value cache, as a share of the weights.
    """
    weights = weight_bytes(num_parameters, precision)
    if memory_bytes is None:
        return TeacherPlan("replica", 1, processes, weights, True, "the memory of this machine is not known; nothing was compared with it")
    needed, usable = int(processes * weights * (1 + margin)), int(memory_bytes * (1 - reserve))
    copies = f"{processes} copies" if processes > 1 else "a copy"
    if needed <= usable:
        why = f"{copies} with working memory: {_gigabytes(needed)} of {_gigabytes(usable)} usable on this machine"
        return TeacherPlan("replica", 1, processes, weights, True, why)
    why = (
        f"{num_parameters:,} parameters in {precision}, {copies} with working memory, take {_gigabytes(needed)}, but this machine has "
        f"{_gigabytes(usable)} usable: use fewer processes, a smaller teacher, or GPUs"
    )
    return TeacherPlan("replica", 1, processes, weights, False, why)


@dataclass(frozen=True, slots=True)
class StudentPlan:
    """Bytes that training holds in each process, without activations."""

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    host_bytes: int = 0
    """Optimizer states that lie in the host's memory in place of the GPU's."""

    @property
    def total_bytes(self) -> int:
        """Weights, gradients and optimizer states of one process, those in the host's memory apart."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def student_plan(
    num_parameters: int,
    zero_stage: Literal[0, 1, 2, 3],
    processes: int,
    precision: Literal["fp32", "bf16"],
    *,
    offload_optimizer: bool = False,
) -> StudentPlan:
    """Bytes a process of a model under AdamW: 16 a parameter before anything is sharded.

    bf16: 2 for the weight, 2 for its gradient, 12 for the fp32 master copy and Adam's two moments. fp32: 4, 4 and 8. ZeRO-1 shards the
    optimizer states over the processes, ZeRO-2 also the gradients, ZeRO-3 also the weights. Offloaded, the optimizer states (with the
    master copy) lie in the host's memory.

    Source: Rajbhandari et al., ZeRO (arXiv 1910.02054), section 3.1 and figure 1.
    """
    weight, gradient, optimizer = (4, 4, 8) if precision == "fp32" else (2, 2, 12)

    def share(bytes_each: int, sharded_from: int) -> int:
        return -(-num_parameters // (processes if zero_stage >= sharded_from else 1)) * bytes_each

    states = share(optimizer, 1)
    device_states, host_states = (0, states) if offload_optimizer else (states, 0)
    return StudentPlan(share(weight, 3), share(gradient, 2), device_states, host_states)


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"
