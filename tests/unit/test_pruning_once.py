"""A whole model pruned: what goes, what is left, and that plain transformers loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from train.config import PruneConfig, StudentConfig, StudentPruneConfig
from train.pruning.once import mean_loss, prune
from train.pruning.scores import neuron_norm, neuron_taylor
from train.pruning.sizes import FileSizes, file_sizes, layer_sparsities, sparsities

SMALL = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
T5_SMALL = {"vocab_size": 60, "d_model": 24, "d_kv": 4, "d_ff": 20, "num_layers": 3, "num_heads": 6, "decoder_start_token_id": 0}
KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "llama-biases": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, mlp_bias=True, attention_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=4, query_pre_attn_scalar=4)),
    "t5-gated": lambda: T5ForConditionalGeneration(T5Config(**T5_SMALL, feed_forward_proj="gated-gelu")),
    "t5-plain": lambda: T5ForConditionalGeneration(T5Config(**T5_SMALL, feed_forward_proj="relu")),
}
EACH = pytest.mark.parametrize("kind", KINDS)
SAMPLES = [([5, 40, 17, 26], [33, 1]), ([44, 50, 9], [7, 12, 1])]


def model_of(kind: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = KINDS[kind]().eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.tensor([[5, 40, 17, 26, 33, 1]])
    extra = {"decoder_input_ids": torch.tensor([[0, 44, 50]])} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **extra).logits


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    return [*model.encoder.block, *model.decoder.block] if model.config.is_encoder_decoder else list(model.model.layers)


def feed_forward(layer: nn.Module) -> tuple[list[nn.Linear], nn.Linear]:
    named = {name.rpartition(".")[2]: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    inner = [named[name] for name in ("gate_proj", "up_proj", "wi", "wi_0", "wi_1") if name in named]
    return inner, named["down_proj"] if "down_proj" in named else named["wo"]


# Neurons


def scores_by_hand(inner: list[nn.Linear], outer: nn.Linear) -> list[float]:
    return [
        sum(float(value) ** 2 for linear in inner for value in linear.weight[n].detach())
        + sum(float(value) ** 2 for value in outer.weight[:, n].detach())
        for n in range(outer.in_features)
    ]


@EACH
def test_neurons_zeroed_by_hand_and_removed_give_the_same_logits(kind: str, tmp_path: Path) -> None:
    zeroed, pruned = model_of(kind), model_of(kind)
    for layer in layers_of(zeroed):
        inner, outer = feed_forward(layer)
        scores = scores_by_hand(inner, outer)
        for n in sorted(range(20), key=lambda n: (scores[n], -n))[:7]:
            for linear in (*inner,):
                linear.weight.data[n] = 0
                if linear.bias is not None:
                    linear.bias.data[n] = 0
            outer.weight.data[:, n] = 0
    assert prune(pruned, PruneConfig(method="neuron", fraction=0.35), SAMPLES, "prune") == {}
    torch.testing.assert_close(logits(pruned), logits(zeroed), rtol=1e-5, atol=1e-5)
    loaded = reloaded(pruned, tmp_path)
    assert torch.equal(logits(loaded), logits(pruned))
    assert {feed_forward(layer)[1].in_features for layer in layers_of(loaded)} == {13}
    assert not torch.allclose(logits(pruned), logits(model_of(kind)), atol=1e-3)


@pytest.mark.parametrize(
    ("fraction", "round_to", "width"), [(0.0, 1, 20), (0.33, 1, 13), (0.33, 4, 12), (0.3, 8, 16), (0.99, 8, 8), (0.05, 16, 16)]
)
def test_widths_are_rounded_as_asked(fraction: float, round_to: int, width: int) -> None:
    model = model_of("llama")
    prune(model, PruneConfig(method="neuron", fraction=fraction, round_to=round_to), SAMPLES, "prune")
    assert (model.config.intermediate_size, model.model.layers[2].mlp.down_proj.in_features) == (width, width)


@EACH
def test_taylor_scores_are_those_of_plain_autograd(kind: str) -> None:
    model, plain = model_of(kind).train(), model_of(kind)
    losses = []
    for inputs, targets in SAMPLES:
        row = torch.tensor([[*inputs, *targets]])
        if plain.config.is_encoder_decoder:
            found = plain(input_ids=torch.tensor([inputs]), decoder_input_ids=torch.tensor([[0, *targets[:-1]]])).logits[0]
        else:
            found = plain(input_ids=row).logits[0, len(inputs) - 1 : -1]
        losses += list(nn.functional.cross_entropy(found, torch.tensor(targets), reduction="none"))
    (sum(losses) / len(losses)).backward()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    prune(model, PruneConfig(method="neuron_taylor", fraction=0.5), SAMPLES, "prune")
    for mine, theirs in zip(layers_of(model), layers_of(plain), strict=True):
        inner, outer = feed_forward(theirs)
        *changes, last = [(linear.weight.detach() * linear.weight.grad).abs() for linear in (*inner, outer)]
        scores = [sum(float(change[n].sum()) for change in changes) + float(last[:, n].sum()) for n in range(20)]
        kept = sorted(sorted(range(20), key=lambda n: -scores[n])[:10])
        assert torch.equal(feed_forward(mine)[1].weight, outer.weight[:, kept])
    assert model.training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


# Heads and layers


@pytest.mark.parametrize(("kind", "fraction", "heads"), [("qwen2", 0.3, 4), ("qwen2", 0.6, 2), ("t5-gated", 0.5, 3), ("llama", 0.4, 4)])
def test_heads_go_in_groups_to_the_nearest_number(kind: str, fraction: float, heads: int, tmp_path: Path) -> None:
    model = model_of(kind)
    prune(model, PruneConfig(method="head", fraction=fraction), SAMPLES, "prune")
    assert model.config.num_attention_heads == heads
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(model))


@pytest.mark.parametrize(("fraction", "layers"), [(0.0, 3), (0.4, 2), (0.9, 1)])
@pytest.mark.parametrize("kind", ["llama", "t5-plain"])
def test_layers_go_to_the_nearest_number(kind: str, fraction: float, layers: int, tmp_path: Path) -> None:
    model = model_of(kind)
    prune(model, PruneConfig(method="layer", fraction=fraction), SAMPLES, "prune")
    loaded = reloaded(model, tmp_path)
    assert loaded.config.num_hidden_layers == layers
    assert torch.equal(logits(loaded), logits(model))


# Weights


def pruned_weights(kind: str, **knobs: Any) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    model = model_of(kind)
    return model, prune(model, PruneConfig(**knobs), SAMPLES, "prune")


@EACH
@pytest.mark.parametrize("knobs", [{"method": "magnitude", "fraction": 0.6}, {"method": "wanda", "fraction": 0.6}], ids=str)
def test_masks_are_of_the_layers_matrices_only_and_their_weights_are_zero(kind: str, knobs: dict[str, Any], tmp_path: Path) -> None:
    model, masks = pruned_weights(kind, **knobs)
    before = dict(model_of(kind).named_parameters())
    assert masks.keys() == {
        name for name, p in before.items() if p.dim() == 2 and not any(part in name for part in ("embed", "shared", "lm_head", "bias"))
    }
    for name, parameter in reloaded(model, tmp_path).named_parameters():
        if name not in masks:
            assert torch.equal(parameter, before[name])
            continue
        assert int(masks[name].sum()) == masks[name].numel() - round(0.6 * masks[name].numel())
        assert torch.equal(parameter, before[name] * masks[name])


def test_wanda_goes_by_what_comes_in() -> None:
    model = model_of("llama")
    first = model.model.layers[0].self_attn.q_proj
    seen: list[torch.Tensor] = []
    hook = first.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0].detach()))
    for inputs, targets in SAMPLES:
        model(input_ids=torch.tensor([[*inputs, *targets]]))
    hook.remove()
    scores = first.weight.detach().abs() * torch.cat(seen).square().mean(dim=0).sqrt()
    masks = prune(model, PruneConfig(method="wanda", fraction=0.5), SAMPLES, "prune")
    for row, mask in zip(scores, masks["model.layers.0.self_attn.q_proj.weight"], strict=True):
        assert set(mask.nonzero()[:, 0].tolist()) == set(row.topk(12).indices.tolist())


def test_together_some_matrices_lose_more_than_others(tmp_path: Path) -> None:
    model, masks = pruned_weights("llama", method="magnitude", fraction=0.5, scope="global")
    total, out = sum(m.numel() for m in masks.values()), sum(int((~m).sum()) for m in masks.values())
    assert out == round(0.5 * total)
    assert len({round(float(m.float().mean()), 3) for m in masks.values()}) > 3
    model.save_pretrained(tmp_path)
    assert [s.zeros for s in sparsities(tmp_path) if s.kind == "embed_tokens"] == [0]


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_n_of_m_holds_in_every_group(method: str) -> None:
    _, masks = pruned_weights("llama", method=method, pattern="2:4")
    assert all((mask.view(-1, 4).sum(dim=1) == 2).all() for mask in masks.values())


def test_excluded_matrices_are_left_alone() -> None:
    _, masks = pruned_weights("llama", method="magnitude", fraction=0.5, exclude=["*.layers.0.*", "*.down_proj"])
    assert {name.split(".")[2] for name in masks} == {"1", "2"}
    assert {name.split(".")[-2] for name in masks} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


# What cannot be done


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, "neither fraction nor pattern says how much to take out: give one of them"),
        ({"method": "magnitude", "fraction": 0.5, "pattern": "2:4"}, "both fraction and pattern say how much"),
        ({"fraction": 1.0}, "less than 1"),
        ({"fraction": -0.1}, "greater than or equal to 0"),
        ({"method": "wanda", "pattern": "4:2"}, "pattern is '4:2': write n:m with n below m, such as 2:4"),
        ({"method": "wanda", "pattern": "half"}, "pattern is 'half': write n:m"),
        ({"method": "neuron", "pattern": "2:4"}, "pattern has no effect with method: neuron, only with magnitude, wanda: remove it"),
        ({"method": "wanda", "fraction": 0.5, "scope": "matrix"}, "scope has no effect with method: wanda, only with magnitude"),
        ({"method": "head", "fraction": 0.5, "round_to": 8}, "round_to has no effect with method: head, only with neuron, "),
        ({"method": "layer", "fraction": 0.5, "exclude": ["a"]}, "exclude has no effect with method: layer"),
        ({"method": "magnitude", "pattern": "2:4", "scope": "global"}, "scope has no effect with a pattern"),
    ],
)
def test_settings_that_say_nothing_sensible_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PruneConfig(**knobs)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"fraction": 0.5, "exclude": ["*"]},
            r"prune\.exclude leaves nothing to prune: all 21 matrices .* match it",
        ),
        (
            {"fraction": 0.5, "exclude": ["lm_head"]},
            r"prune\.exclude holds 'lm_head', which is no matrix .* name some of",
        ),
        (
            {"pattern": "3:7"},
            r"prune\.pattern is 3:7, but a row of model.* has 24 weights, which 7 does not divide: exclude",
        ),
    ],
)
def test_a_model_that_cannot_be_pruned_so_is_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruned_weights("llama", method="magnitude", **knobs)


@pytest.mark.parametrize("method", ["neuron", "head"])
def test_a_family_whose_parts_cannot_be_told_is_refused_with_those_that_can(method: str) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    with pytest.raises(
        ValueError, match=rf"prune\.method is {method}, but .* of type gpt2 are its {method}s, as it can of t5, llama, qwen2"
    ):
        prune(gpt2, PruneConfig.model_validate({"method": method, "fraction": 0.5}), SAMPLES, "prune")


# What is left


def test_sparsity_is_counted_by_kind_and_tied_matrices_once(tmp_path: Path) -> None:
    model, _ = pruned_weights("llama", method="magnitude", fraction=0.25, exclude=["*.o_proj"])
    model.save_pretrained(tmp_path)
    found = {s.kind: (s.weights, s.share) for s in sparsities(tmp_path)}
    assert found["o_proj"] == (3 * 24 * 24, 0.0)
    assert found["down_proj"] == (3 * 24 * 20, 0.25)
    assert found["embed_tokens"] == (60 * 24, 0.0)
    assert "lm_head" not in found
    layers = layer_sparsities(tmp_path)
    assert [s.kind for s in layers] == ["0", "1", "2"]
    in_kinds = [s for s in sparsities(tmp_path) if s.kind != "embed_tokens"]
    assert (sum(s.weights for s in layers), sum(s.zeros for s in layers)) == (
        sum(s.weights for s in in_kinds),
        sum(s.zeros for s in in_kinds),
    )


def test_layers_of_two_stacks_are_told_apart(tmp_path: Path) -> None:
    names = ["decoder.block.10.layer.0.wi", "decoder.block.2.layer.0.wi", "encoder.block.0.layer.1.wo", "shared"]
    save_file({f"{name}.weight": torch.eye(4) for name in names}, tmp_path / "model.safetensors")
    assert [(s.kind, s.share) for s in layer_sparsities(tmp_path)] == [("encoder 0", 0.75), ("decoder 2", 0.75), ("decoder 10", 0.75)]


def test_sparse_files_are_as_large_and_compress_better(tmp_path: Path) -> None:
    sizes: list[FileSizes] = []
    for n, fraction in enumerate((0.0, 0.9)):
        model, _ = pruned_weights("llama", method="magnitude", fraction=fraction)
        model.save_pretrained(tmp_path / str(n))
        sizes.append(file_sizes(tmp_path / str(n)))
    assert sizes[0].file_bytes == sizes[1].file_bytes
    assert sizes[1].compressed_bytes < 0.5 * sizes[0].compressed_bytes < 0.5 * sizes[0].file_bytes


@EACH
def test_the_loss_is_that_of_the_model_on_what_follows(kind: str) -> None:
    model = model_of(kind)
    totals = []
    for inputs, targets in SAMPLES:
        if model.config.is_encoder_decoder:
            loss = model(input_ids=torch.tensor([inputs]), labels=torch.tensor([targets])).loss
        else:
            labels = torch.tensor([[-100] * len(inputs) + targets])
            loss = model(input_ids=torch.tensor([[*inputs, *targets]]), labels=labels).loss
        totals += [float(loss.detach())] * len(targets)
    assert mean_loss(model, SAMPLES) == pytest.approx(sum(totals) / len(totals), rel=1e-5)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"method": "layer", "fraction": 0.5, "schedule": "cubic"}, "schedule is cubic, but method: layer scores once"),
        ({"method": "wanda", "pattern": "2:4", "schedule": "cubic"}, "schedule is cubic, but a pattern is in every group"),
        ({"fraction": 0.5, "schedule": "cubic", "epochs": 0}, "schedule is cubic, but epochs is 0"),
        ({"fraction": 0.5, "until": 0.7}, "until has no effect with schedule: one_shot"),
        ({"fraction": 0.5, "every": 7}, "every has no effect with schedule: one_shot"),
        ({"fraction": 0.5, "epochs": 0, "learning_rate": 1e-3}, "learning_rate has no effect while epochs is 0"),
    ],
)
def test_recoveries_that_say_nothing_sensible_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StudentPruneConfig(**knobs)


def test_weights_are_not_pruned_beside_adapters() -> None:
    with pytest.raises(ValidationError, match=r"prune\.method is wanda, but lora adds to every weight .* remove lora, or prune neurons"):
        StudentConfig.model_validate({"model": "x", "lora": {"rank": 2}, "prune": {"method": "wanda", "fraction": 0.5}})
    neurons = {"method": "neuron", "fraction": 0.5}
    with pytest.raises(ValidationError, match=r"prune\.schedule is cubic, but with lora the weights .* are frozen: remove lora, or set"):
        StudentConfig.model_validate({"model": "x", "lora": {"rank": 2}, "prune": {**neurons, "schedule": "cubic"}})
    StudentConfig.model_validate({"model": "x", "lora": {"rank": 2}, "prune": neurons})


@pytest.mark.filterwarnings("ignore")  # of the library
def test_torch_pruning_scores_and_removes_the_same_neurons() -> None:
    import torch_pruning

    model, theirs = model_of("llama"), model_of("llama").model.layers[1].mlp
    inputs = torch.randn(1, 5, 24)
    graph = torch_pruning.DependencyGraph().build_dependency(theirs, example_inputs=inputs)

    def group(neurons: list[int]) -> Any:
        return graph.get_pruning_group(theirs.gate_proj, torch_pruning.prune_linear_out_channels, idxs=neurons)

    mine = model.model.layers[1].mlp
    linears = [mine.gate_proj, mine.up_proj, mine.down_proj]
    squares = torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None)(group(list(range(20))))
    scores = neuron_norm([linear.weight for linear in linears[:2]], linears[2].weight)
    torch.testing.assert_close(scores.square(), squares)
    theirs(inputs).square().mean().backward()
    first_order = torch_pruning.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None)(group(list(range(20))))
    pairs = [
        (linear.weight, other.weight.grad)
        for linear, other in zip(linears, (theirs.gate_proj, theirs.up_proj, theirs.down_proj), strict=True)
    ]
    torch.testing.assert_close(neuron_taylor(pairs[:2], pairs[2]), first_order)
    group(sorted(squares.argsort()[:7].tolist())).prune()
    prune(model, PruneConfig(method="neuron", fraction=0.35), SAMPLES, "prune")
    found = model.model.layers[1].mlp
    for ours, other in ((found.gate_proj, theirs.gate_proj), (found.up_proj, theirs.up_proj), (found.down_proj, theirs.down_proj)):
        assert torch.equal(ours.weight, other.weight)
    assert torch.equal(found(inputs), theirs(inputs))
