"""Published models by their config.json: parameters and linear layers against what transformers builds without memory."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from launch.architecture import architecture_of, assumed_architecture
from launch.parameters import count_parameters


def llama(width: int, neurons: int, layers: int, heads: int, groups: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": neurons, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": "llama", **sizes, "num_key_value_heads": groups, "vocab_size": vocabulary, **more}


def t5(width: int, neurons: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    sizes = {"d_model": width, "d_kv": 64, "d_ff": neurons, "num_layers": layers, "num_heads": heads, "vocab_size": 32128}
    return {"model_type": "t5", **sizes, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": tied}


# As each model's config.json on the hub has it, and the number of parameters that its page tells, rounded.
PUBLISHED: dict[str, tuple[dict[str, Any], str]] = {
    "Llama-2-7B": (llama(4096, 11008, 32, 32, 32, 32000), "6.74B"),
    "Llama-2-70B": (llama(8192, 28672, 80, 64, 8, 32000), "68.98B"),
    "Llama-3.1-8B": (llama(4096, 14336, 32, 32, 8, 128256), "8.03B"),
    "Llama-3.2-1B": (llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True), "1.24B"),
    "SmolLM2-135M": (llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True), "0.13B"),
    "SmolLM2-1.7B": (llama(2048, 8192, 24, 32, 32, 49152, tie_word_embeddings=True), "1.71B"),
    "Mistral-7B-v0.1": (llama(4096, 14336, 32, 32, 8, 32000, model_type="mistral"), "7.24B"),
    "Mixtral-8x7B": (llama(4096, 14336, 32, 32, 8, 32000, model_type="mixtral", num_local_experts=8), "46.70B"),
    "Qwen2.5-0.5B": (llama(896, 4864, 24, 14, 2, 151936, model_type="qwen2", tie_word_embeddings=True), "0.49B"),
    "Qwen2.5-7B": (llama(3584, 18944, 28, 28, 4, 152064, model_type="qwen2"), "7.62B"),
    "Qwen3-0.6B": (llama(1024, 3072, 28, 16, 8, 151936, model_type="qwen3", head_dim=128, tie_word_embeddings=True), "0.60B"),
    "Qwen3-8B": (llama(4096, 12288, 36, 32, 8, 151936, model_type="qwen3", head_dim=128), "8.19B"),
    "Gemma-2-2B": (llama(2304, 9216, 26, 8, 4, 256000, model_type="gemma2", head_dim=256), "2.61B"),
    "Gemma-3-1B": (llama(1152, 6912, 26, 4, 1, 262144, model_type="gemma3_text", head_dim=256), "1.00B"),
    "Phi-3-mini": (llama(3072, 8192, 32, 32, 32, 32064, model_type="phi3"), "3.82B"),
    "T5-v1.1-base": (t5(768, 2048, 12, 12, tied=False), "0.25B"),
    "Flan-T5-large": (t5(1024, 2816, 24, 16, tied=False), "0.78B"),
    "Flan-T5-small": (t5(512, 1024, 8, 6, tied=False), "0.08B"),
}  # fmt: skip


def built(sizes: dict[str, Any]) -> Any:
    """The model without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    values = dict(sizes)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    auto = AutoModelForSeq2SeqLM if config.model_type == "t5" else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_the_parameters_that_transformers_builds(name: str) -> None:
    sizes, told = PUBLISHED[name]
    model = built(sizes)
    saved = json.loads(model.config.to_json_string())
    assert count_parameters(saved) == sum(p.numel() for p in model.parameters())
    # transformers 5 builds a T5 with one embedding, whatever config.json says; a checkpoint of v1.1 holds a second, which is counted.
    assert f"{count_parameters(sizes) / 1e9:.2f}B" == told


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.startswith(("Mixtral", "Phi"))])
def test_its_linear_layers_are_those_that_transformers_builds(name: str) -> None:
    """But the head; Phi-3 joins some of them in one matrix, Mixtral's experts are tensors of their own."""
    from torch import nn

    model = built(PUBLISHED[name][0])
    linears = {full: m for full, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()}
    expected = Counter((full.rpartition(".")[2], m.in_features, m.out_features) for full, m in linears.items())
    shape = architecture_of(json.loads(model.config.to_json_string()))
    assert {(kind, *sizes[:2]): sizes[2] for kind, sizes in shape.linears.items()} == dict(expected)


def test_experts_that_a_token_does_not_meet_are_idle() -> None:
    mixtral = architecture_of(PUBLISHED["Mixtral-8x7B"][0])
    assert f"{mixtral.active / 1e9:.1f}B" == "12.9B", "as Mistral's paper says"
    mistral = architecture_of(PUBLISHED["Mistral-7B-v0.1"][0])
    assert mistral.active == mistral.parameters


@pytest.mark.parametrize(("parameters", "layers", "width"), [(175 * 10**9, 96, 12288), (8 * 10**9, 32, 4096), (1000, 1, 128)])
def test_a_number_of_parameters_has_the_shape_of_its_size(parameters: int, layers: int, width: int) -> None:
    assumed = assumed_architecture(parameters)
    assert (assumed.parameters, assumed.layers, assumed.width, assumed.assumed) == (parameters, layers, width, True)
    assert assumed.heads % assumed.key_value_heads == 0
