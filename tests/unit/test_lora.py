from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from train import models
from train.config import LoraConfig
from train.lora import attach_lora, merged_weights, plain_name
from train.tokenization import train_tokenizer

TOKENIZER = train_tokenizer(["one two three four five"], 300)
CONFIG = LoraConfig(rank=3, alpha=5.0)
SIZES = {"vocab_size": 300, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
SPECIAL = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}


def llama(**sizes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **SPECIAL, **sizes))


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=300, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu", decoder_start_token_id=0
        )
    )


KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-untied": lambda: llama(tie_word_embeddings=False, attention_bias=True),
    "t5": t5,
}
EACH = pytest.mark.parametrize("kind", KINDS)


def build(kind: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return KINDS[kind]().eval()


def forward(model: PreTrainedModel, **arguments: Any) -> Any:
    ids = torch.tensor([[5, 90, 17, 260, 33, 1]])
    return model(input_ids=ids, labels=ids[:, :4] if model.config.is_encoder_decoder else ids, **arguments)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    logits: Tensor = forward(model).logits
    return logits


def randomize(model: PreTrainedModel) -> None:
    """Adapters start at no effect."""
    draw = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)


# Arithmetic


def test_merging_adds_alpha_over_rank_times_b_a() -> None:
    state = {
        "m.q.base_layer.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        "m.q.base_layer.bias": torch.tensor([7.0, 8.0, 9.0]),
        "m.q.lora_A.default.weight": torch.tensor([[1.0, -1.0], [0.0, 2.0]]),
        "m.q.lora_B.default.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]]),
        "m.norm.weight": torch.tensor([1.5]),
    }
    before = {name: value.clone() for name, value in state.items()}
    merged = merged_weights(state, LoraConfig(rank=2, alpha=3.0))
    # B A = [[1, -1], [0, 2], [2, 4]], times 3 / 2.
    assert merged["m.q.weight"].tolist() == [[2.5, 0.5], [3.0, 7.0], [8.0, 12.0]]
    assert (merged["m.q.bias"].tolist(), merged["m.norm.weight"].tolist()) == ([7.0, 8.0, 9.0], [1.5])
    assert merged.keys() == {"m.q.weight", "m.q.bias", "m.norm.weight"}
    assert all(torch.equal(state[name], value) for name, value in before.items()) and state.keys() == before.keys()


def test_the_sum_is_rounded_once_to_the_weights_precision() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=draw).to(torch.bfloat16) for shape in ((6, 5), (2, 5), (6, 2)))
    state = {"x.base_layer.weight": weight, "x.lora_A.default.weight": a, "x.lora_B.default.weight": b}
    merged = merged_weights(state, LoraConfig(rank=2, alpha=1.0))["x.weight"]
    assert torch.equal(merged, (weight.double() + 0.5 * (b.double() @ a.double())).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("model.layers.0.self_attn.q_proj.base_layer.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("encoder.block.0.layer.0.SelfAttention.q.lora_A.default.weight", None),
        ("encoder.block.0.layer.0.SelfAttention.q.lora_B.default.weight", None),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_plain_names(name: str, plain: str | None) -> None:
    assert plain_name(name) == plain


@EACH
def test_merged_weights_are_those_of_peft(kind: str) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    wrapped = get_peft_model(build(kind), PeftConfig(r=3, lora_alpha=5, target_modules="all-linear"))
    randomize(wrapped)
    ours = merged_weights({name: value.clone() for name, value in wrapped.base_model.model.state_dict().items()}, CONFIG)
    theirs = wrapped.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys() == build(kind).state_dict().keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)
    assert any(not torch.equal(theirs[name], value) for name, value in build(kind).state_dict().items())


# Adapters in place


@EACH
def test_the_model_stays_itself_and_only_adapters_learn(kind: str) -> None:
    model = build(kind)
    before, kept = logits(model), copy.deepcopy(model.state_dict())
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    assert attach_lora(model, CONFIG, "student.lora") is model
    assert torch.equal(torch.rand(1), expected), "the global generator must be left as it was"
    assert torch.equal(logits(model), before)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {f"{name}.lora_{side}.default.weight" for name in linears for side in "AB"}
    assert all(model.get_parameter(name).shape[0 if "lora_A" in name else 1] == 3 for name in learning)
    state = {plain: value for name, value in model.state_dict().items() if (plain := plain_name(name)) is not None}
    assert state.keys() == kept.keys() and all(torch.equal(state[name], kept[name]) for name in kept)


def test_the_seed_decides_where_adapters_start() -> None:
    starts = [attach_lora(build("t5"), CONFIG, "student.lora", seed=seed).state_dict() for seed in (0, 0, 1)]
    name = "encoder.block.0.layer.0.SelfAttention.q.lora_A.default.weight"
    assert torch.equal(starts[0][name], starts[1][name])
    assert not torch.equal(starts[0][name], starts[2][name])


@pytest.mark.parametrize("training", [False, True])
def test_dropout_acts_in_training_alone(training: bool) -> None:
    model = build("llama-tied").train(training)
    attach_lora(model, LoraConfig(rank=3, alpha=5.0, dropout=0.5), "student.lora")
    randomize(model)
    assert {module.training for module in model.modules()} == {training}
    assert torch.equal(logits(model), logits(model)) is not training


def test_only_the_layers_named_are_adapted() -> None:
    model = attach_lora(build("llama-tied"), LoraConfig(rank=2, modules=["q_proj", "layers.1.mlp.up_proj"]), "student.lora")
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_A" in name}
    layers = ["0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"]
    assert learning == {f"model.layers.{layer}.lora_A.default.weight" for layer in layers}


@pytest.mark.parametrize(
    ("kind", "modules", "message"),
    [
        (
            "llama-tied",
            ["q_proj", "query"],
            r"student\.lora\.modules names 'query', which is no linear layer of a model of type llama: "
            r"name some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj$",
        ),
        ("t5", ["shared"], r"names 'shared', which is no linear layer of a model of type t5: name some of k, o, q, v, wi_0, wi_1, wo$"),
        ("llama-tied", ["proj"], r"names 'proj', which is no linear layer"),
        ("llama-untied", ["lm_head"], r"student\.lora\.modules names 'lm_head', the model's head, which cannot be adapted: remove it"),
    ],
)
def test_modules_that_cannot_be_adapted_are_refused(kind: str, modules: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach_lora(build(kind), LoraConfig(modules=modules), "student.lora")


def test_a_model_without_linear_layers_is_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    with pytest.raises(ValueError, match=r"student\.lora has no linear layers to adapt in a model of type gpt2: remove lora"):
        attach_lora(gpt2, CONFIG, "student.lora")


# From training to a folder


@EACH
def test_a_trained_model_is_saved_merged_and_loads_in_plain_transformers(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    untrained = logits(model)
    attach_lora(model, CONFIG, "student.lora")
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.03)
    for _ in range(3):
        forward(model).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted = logits(model)
    form = models.text_format(TOKENIZER, models.family_of(model), max_input_tokens=8, max_label_tokens=8, max_rationale_tokens=8)
    # As gathered weights come: apart from the live ones, and with a copy for each tied name.
    gathered = {name: value.clone() for name, value in model.state_dict().items()}
    models.save_model(model, TOKENIZER, form, tmp_path, state_dict=merged_weights(gathered, CONFIG))
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.dtype == torch.float32
    torch.testing.assert_close(logits(loaded), adapted, rtol=0, atol=1e-5)
    assert (adapted - untrained).abs().max() > 1e-2
    assert models.num_parameters(loaded) == models.num_parameters(build(kind))
    assert torch.equal(logits(model), adapted), "training goes on with the adapters"


def test_weights_of_adapters_are_not_saved_for_plain_ones(tmp_path: Path) -> None:
    model = attach_lora(build("t5"), CONFIG, "student.lora")
    form = models.text_format(TOKENIZER, "encoder_decoder", max_input_tokens=8, max_label_tokens=8, max_rationale_tokens=8)
    with pytest.raises(AssertionError, match="a model with adapters is saved by merged weights"):
        models.save_model(model, TOKENIZER, form, tmp_path)
    with pytest.raises(AssertionError, match="the gathered weights lack"):
        models.save_model(model, TOKENIZER, form, tmp_path, state_dict=model.state_dict())
