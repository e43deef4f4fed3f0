"""A student's forward with its losses: packed, padded and by transformers' own logits the same; heads of every kind; a live teacher."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    T5Config,
)

from data.batches import collate
from data.prompts import TextFormat
from data.rows import TrainSequence
from data.soft_labels import TopK
from train.learner import Learner, LiveTeacher, can_pack, tensors_of
from train.losses import Divergence

T5 = TextFormat("encoder_decoder", eos_id=1, pad_id=0, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=16)
PLAIN = dataclasses.replace(T5, family="decoder_only")
SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "granite": GraniteConfig(**SMALL, logits_scaling=4.0, attention_multiplier=0.3),
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),
    "gemma2": Gemma2Config(**SMALL, final_logit_softcapping=2.0, sliding_window=3),
    "mistral, short window": MistralConfig(**SMALL, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=64),
    "t5": T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0),
    "t5, untied": T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0, tie_word_embeddings=False
    ),
}
PACK = {"llama", "llama, tied", "qwen2", "granite", "cohere", "gpt2"}
FORWARD_KL = Divergence("forward_kl")


def model_of(name: str, seed: int = 0) -> PreTrainedModel:
    config = CONFIGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_config(config).float().eval()
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return model


def sequences(top_k: bool = True) -> list[TrainSequence]:
    draw = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return [int(n) for n in draw.integers(3, 40, length)]

    soft = TopK(np.array([[5, 6], [7, 8]], np.int32), np.log(np.array([[0.5, 0.3], [0.9, 0.05]], np.float32)), np.zeros(2, np.float32))
    return [
        TrainSequence(ids(7), [*ids(2), 1], True, soft if top_k else None),
        TrainSequence(ids(3), [*ids(6), 1], False),
        TrainSequence(ids(1), [1], True),
        TrainSequence(ids(9), [*ids(3), 1], False, weight=0.25),
    ]


def form_of(model: PreTrainedModel) -> TextFormat:
    return T5 if model.config.is_encoder_decoder else PLAIN


def own_cross_entropies(model: PreTrainedModel, sequence: TrainSequence) -> Tensor:
    """Of a sequence's target tokens, by transformers alone."""
    target = torch.tensor(sequence.target_ids)
    if model.config.is_encoder_decoder:
        decoder = torch.tensor([[0, *sequence.target_ids[:-1]]])
        logits = model(input_ids=torch.tensor([sequence.input_ids]), decoder_input_ids=decoder).logits[0]
    else:
        logits = model(input_ids=torch.tensor([sequence.input_ids + sequence.target_ids])).logits[0, len(sequence.input_ids) - 1 : -1]
    return F.cross_entropy(logits, target, reduction="none")


@pytest.mark.parametrize("name", CONFIGS)
def test_what_can_be_packed_is_found_by_trying(name: str) -> None:
    model = model_of(name)
    assert can_pack(model, form_of(model), "student.model") == (name in PACK)
    assert can_pack(model, form_of(model), "student.model") == (name in PACK)
    assert "forward" not in vars(model.get_output_embeddings()) or model.get_output_embeddings().forward.__func__ is not None


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_of_each_sequence_alone(name: str, packed: bool) -> None:
    if packed and name not in PACK:
        pytest.skip("this model's sequences are padded")
    model, given = model_of(name), sequences(top_k=False)
    scale = torch.tensor([0.5, 0.3, 0.2])
    learner = Learner(model, divergence=FORWARD_KL)
    batch = collate(given, form_of(model), 0, packed=packed)
    if packed:
        with learner.packed():
            total, sums = learner(scale, **tensors_of(batch))
            found = torch.autograd.grad(total, list(model.parameters()))
    else:
        total, sums = learner(scale, **tensors_of(batch))
        found = torch.autograd.grad(total, list(model.parameters()))
    learner.release()
    each = [own_cross_entropies(model, s).sum() for s in given]
    expected = torch.stack([each[0] + each[2], each[1], 0.25 * each[3]])
    torch.testing.assert_close(sums, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.detach(), (scale * expected).sum().detach(), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(found, torch.autograd.grad((scale * expected).sum(), list(model.parameters())), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5", "gemma2"])
def test_matches_are_where_the_most_probable_token_is_the_target(name: str) -> None:
    model, given = model_of(name), sequences(top_k=False)
    learner = Learner(model, divergence=FORWARD_KL)
    batch = collate(given, form_of(model), 0, packed=False)
    with torch.no_grad():
        # The target of the third sequence becomes what the model says.
        ids = (
            {"input_ids": torch.tensor([given[2].input_ids]), "decoder_input_ids": torch.tensor([[0]])}
            if name == "t5"
            else {"input_ids": torch.tensor([given[2].input_ids])}
        )
        said = int(model(**ids).logits[0, -1].argmax())
        given[2] = dataclasses.replace(given[2], target_ids=[said])
        batch = collate(given, form_of(model), 0, packed=False)
        sums, right = learner(torch.ones(3), matching=True, **tensors_of(batch))
    assert right[batch.sequence == 2].tolist() == [True]
    assert not right.all()
    expected = sum(own_cross_entropies(model, given[n]).sum() for n in (0, 2))
    torch.testing.assert_close(sums[0], expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_live_teacher_is_compared_at_every_target_of_labels_and_rationales(packed: bool) -> None:
    model, teacher, given = model_of("llama"), model_of("llama, tied", seed=1), sequences(top_k=False)
    for kind in ("forward_kl", "reverse_kl"):
        learner = Learner(model, divergence=Divergence(kind, temperature=2.0), live=LiveTeacher(teacher), vocabulary=38)
        batch = collate(given, PLAIN, 0, packed=packed, soft="live")
        if packed:
            with learner.packed():
                _, sums = learner(torch.ones(3), **tensors_of(batch))
        else:
            _, sums = learner(torch.ones(3), **tensors_of(batch))
        learner.release()
        expected = 0.25 * own_cross_entropies(model, given[3]).sum()
        for s in given[:3]:
            ids = torch.tensor([s.input_ids + s.target_ids])
            p, q = (m(input_ids=ids).logits[0, len(s.input_ids) - 1 : -1, :38].div(2.0).log_softmax(-1) for m in (teacher, model))
            a, b = (q, p) if kind == "forward_kl" else (p, q)
            expected = expected + 4.0 * F.kl_div(a, b, reduction="sum", log_target=True)
        torch.testing.assert_close(sums[2], expected.detach(), rtol=1e-5, atol=1e-5)


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient() -> None:
    model, teacher = model_of("llama"), model_of("llama")
    learner = Learner(model, divergence=Divergence("jsd"), live=LiveTeacher(teacher))
    batch = collate(sequences(top_k=False)[:3], PLAIN, 0, packed=True, soft="live")
    with learner.packed():
        total, sums = learner(torch.tensor([0.0, 0.0, 1.0]), **tensors_of(batch))
        gradients = torch.autograd.grad(total, list(model.parameters()))
    assert float(sums[2]) == pytest.approx(0.0, abs=1e-5)
    assert max(float(g.abs().max()) for g in gradients) < 1e-5
    assert {p.grad for p in teacher.parameters()} == {None}
    assert not any("teacher" in name or "_live" in name for name, _ in learner.named_parameters())


def test_activation_checkpointing_and_dropout_change_nothing_and_something() -> None:
    model = model_of("llama").train()
    batch = collate(sequences(top_k=False), PLAIN, 0, packed=True)

    def gradient(learner: Learner) -> Tensor:
        with learner.packed():
            total, _ = learner(torch.ones(3), **tensors_of(batch))
            (found,) = torch.autograd.grad(total, [model.get_input_embeddings().weight])
        return found

    learner = Learner(model, divergence=FORWARD_KL)
    plain = gradient(learner)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradient(learner), plain)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    torch.manual_seed(0)
    first = gradient(learner)
    assert not torch.allclose(first, plain)
    torch.manual_seed(0)
    torch.testing.assert_close(gradient(learner), first)


def test_a_model_with_another_tail_is_refused() -> None:
    model = model_of("llama")
    own = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.logits = 2.0 * output.logits
        return output

    model.forward = doubled
    with pytest.raises(ValueError, match=r"student\.model is a LlamaForCausalLM, whose logits are not its head's product.*another family"):
        can_pack(model, PLAIN, "student.model")
