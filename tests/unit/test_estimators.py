"""The public estimators' own code, on models that transformers builds without memory."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launch.estimators import Size, accelerate_training, estimates, zero2_bytes, zero3_bytes
from launch.parameters import buffer_bytes, count_parameters, largest_module

A100_40, A100_80 = 40, 80
LLAMA_2_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "Llama-3.2-1B": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
    },
    "Gemma-2-2B": {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
    },
    "Gemma-3-1B": {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
    },
    "Phi-3-mini": {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32064,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Flan-T5-large": {
        "model_type": "t5", "d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16, "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
}  # fmt: skip


def built(name: str) -> tuple[Any, dict[str, Any]]:
    """The model without memory for its weights, and its config.json."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    values = dict(MODELS[name])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    auto = AutoModelForSeq2SeqLM if config.model_type == "t5" else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config), json.loads(config.to_json_string())


def size_of(config: dict[str, Any]) -> Size:
    return Size(count_parameters(config), largest_module(config), buffer_bytes(config))


@pytest.mark.parametrize("name", MODELS)
def test_both_libraries_count_what_these_rules_count(name: str) -> None:
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils.modeling import calculate_maximum_sizes
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs, model_to_params
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    model, config = built(name)
    size = size_of(config)
    total, _ = calculate_maximum_sizes(model)
    rows = {estimate.what: estimate for estimate in estimates("accelerate", size)}
    assert [rows[f"inference, {precision}"].total_bytes for precision in ("fp32", "bf16", "int8", "int4")] == [
        total // by for by in (1, 2, 4, 8)
    ]
    for dtype, precision in (("float32", "fp32"), ("bfloat16", "bf16")):
        usage = estimate_training_usage(total, dtype)
        assert accelerate_training(total, mixed=precision == "bf16") == usage
        assert rows[f"training, {precision}"].total_bytes == max(usage.values())

    assert sum(parameter.numel() for parameter in model.parameters()) == size.parameters
    assert model_to_params(model)[1] == size.largest_module  # its first figure goes by addresses, which a model without memory has none of
    for nodes, gpus in ((1, 1), (1, 8), (4, 8)):
        theirs = {"num_gpus_per_node": gpus, "num_nodes": nodes, "cpu_offload": False}
        assert estimate_zero2_model_states_mem_needs(size.parameters, **theirs)[1] == zero2_bytes(size, nodes * gpus)
        assert estimate_zero3_model_states_mem_needs(size.parameters, size.largest_module, **theirs)[1] == zero3_bytes(size, nodes * gpus)


def fewest(rule: Any, size: Size, what: str, gigabytes: int) -> int | None:
    return next(estimate for estimate in estimates(rule, size) if estimate.what == what).fewest_gpus(gigabytes)


def test_the_well_known_figures() -> None:
    gpt3, llama = Size(175 * 10**9, 0, 0), size_of(LLAMA_2_70B)
    assert estimates("simple", gpt3)[1].total_bytes == 350 * 10**9
    assert fewest("simple", gpt3, "inference, bf16", A100_80) == 5
    assert llama.parameters == 68_976_648_192
    assert fewest("simple", llama, "inference, bf16", A100_40) == 4
    assert fewest("accelerate", llama, "inference, bf16", A100_40) == 4
    assert fewest("accelerate", llama, "training, bf16", A100_40) == 13
    assert fewest("deepspeed", llama, "training, all added up", A100_40) == 29
    assert fewest("deepspeed", llama, "training, all added up", A100_80) == 15


def test_what_no_number_of_gpus_holds_is_none() -> None:
    assert fewest("deepspeed", size_of(LLAMA_2_70B), "training, ZeRO-2", A100_80) is None, "the weights alone are 138 GB on each"
    assert fewest("deepspeed", size_of(LLAMA_2_70B), "training, ZeRO-3", A100_80) == 15
