from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
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
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from train import models
from train.activity import column_scores, influences, measure, random_samples
from train.config import CutModel, ScratchModel
from train.cutting import cut, cut_layers
from train.heads import group_scores
from train.slicing import largest
from train.tokenization import train_tokenizer

T5 = ScratchModel(from_scratch="t5", d_model=16, layers=4, heads=2, d_ff=24, vocabulary=300)
LLAMA = ScratchModel(from_scratch="llama", d_model=16, layers=4, heads=2, d_ff=24, vocabulary=300)
WORDS = [f"{a}{b}{c}{d}" for a in "klmnprst" for b in "aeiou" for c in "klmnprst" for d in "aeiou"] * 2
TOKENIZER = train_tokenizer(WORDS, 300)
SAMPLES = [([5, 40, 17, 26], [33, 1])]
BOTH = pytest.mark.parametrize("scratch", [T5, LLAMA], ids=["t5", "llama"])


def build(source: ScratchModel) -> PreTrainedModel:
    return models.load_model(source, TOKENIZER, seed=0, dtype=torch.float32)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.tensor([[5, 90, 17, 260, 33, 1]])
    extra = {"decoder_input_ids": torch.tensor([[0, 44, 60]])} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **extra).logits


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for scratch in (T5, LLAMA):
        folder = folders[scratch.from_scratch] = tmp_path_factory.mktemp(scratch.from_scratch)
        build(scratch).save_pretrained(folder)
    return folders


def keep(**parts: Any) -> CutModel:
    return CutModel(cut_from="teacher", **parts)


def load(source: CutModel, teacher: Path, **arguments: Any) -> PreTrainedModel:
    return models.load_model(source, TOKENIZER, seed=0, dtype=torch.float32, teacher_folder=teacher, **arguments)


def plain(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """As transformers alone writes and reads it."""
    model.save_pretrained(folder)
    auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(folder)


# Depth


@torch.no_grad()
def test_influence_is_how_far_a_layer_turns_the_residual_stream() -> None:
    model, samples = build(LLAMA).train(), [([5, 90, 17, 260], [33, 1]), ([44, 60], [7])]
    found = influences(model, list(model.model.layers), samples)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    cosines: list[list[torch.Tensor]] = [[] for _ in found]
    for inputs, targets in samples:
        ids, places = torch.tensor([[*inputs, *targets]]), torch.arange(len(inputs) + len(targets))[None]
        stream = model.model.embed_tokens(ids)
        for layer, seen in zip(model.model.layers, cosines, strict=True):
            turned = layer(stream, position_ids=places, position_embeddings=model.model.rotary_emb(stream, places))
            seen.append(nn.functional.cosine_similarity(stream, turned, dim=-1)[0])
            stream = turned
    assert found == pytest.approx([1 - torch.cat(seen).mean().item() for seen in cosines], rel=1e-4)


@BOTH
def test_the_first_layer_stays_and_those_that_do_most(scratch: ScratchModel) -> None:
    model = build(scratch)
    stacks = [model.encoder.block, model.decoder.block] if scratch is T5 else [model.model.layers]
    with torch.no_grad():
        for stack in stacks:
            for name, weight in [pair for index in (0, 2) for pair in stack[index].named_parameters()]:
                if any(part in name for part in ("o_proj", "down_proj", "wo", ".o.")):
                    weight.zero_()  # what comes in goes out, in the first layer and in the third
    whole = [list(stack) for stack in stacks]
    cut_layers(model, 3, "student.model", SAMPLES)
    kept = [model.encoder.block, model.decoder.block] if scratch is T5 else [model.model.layers]
    assert [[layers.index(layer) for layer in stack] for layers, stack in zip(whole, kept, strict=True)] == [[0, 1, 3]] * len(stacks)


@BOTH
@pytest.mark.parametrize("layers", [4, [0, 1, 2, 3]])
def test_a_student_with_all_layers_is_its_teacher(scratch: ScratchModel, layers: int | list[int], teachers: dict[str, Path]) -> None:
    assert torch.equal(logits(load(keep(layers=layers), teachers[scratch.from_scratch])), logits(build(scratch)))


@BOTH
def test_a_cut_student_is_its_layers_and_survives_a_plain_save_and_load(
    scratch: ScratchModel, teachers: dict[str, Path], tmp_path: Path
) -> None:
    student, teacher = load(keep(layers=[0, 2, 3]), teachers[scratch.from_scratch]), build(scratch)
    stacks: list[Callable[[PreTrainedModel], torch.nn.ModuleList]] = (
        [lambda m: m.encoder.block, lambda m: m.decoder.block] if scratch is T5 else [lambda m: m.model.layers]
    )
    # By hand: a fresh three-layer model of the same kind, with the teacher's weights copied layer by layer.
    reference = build(ScratchModel(**{**scratch.model_dump(exclude_unset=True), "layers": 3}))
    rest = {name: value for name, value in teacher.state_dict().items() if ".block." not in name and ".layers." not in name}
    reference.load_state_dict(rest, strict=False)
    for stack in stacks:
        for index, layer in enumerate([0, 2, 3]):
            stack(reference)[index].load_state_dict(stack(teacher)[layer].state_dict())
    assert torch.equal(logits(student), logits(reference))
    loaded = plain(student, tmp_path)
    assert torch.equal(logits(loaded), logits(student))
    assert loaded.config.num_hidden_layers == 3


@BOTH
def test_a_cut_student_generates_with_a_cache_as_without(scratch: ScratchModel, teachers: dict[str, Path]) -> None:
    student = load(keep(layers=[0, 3]), teachers[scratch.from_scratch])
    ids = torch.tensor([[5, 90, 17, 260, 33, 1]])
    length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    runs = [student.generate(input_ids=ids, use_cache=cache, **length) for cache in (True, False)]
    assert torch.equal(runs[0], runs[1])
    assert runs[0].shape[1] >= 9


def test_a_t5_with_stacks_of_unequal_depth_is_cut_in_each() -> None:
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=5, num_decoder_layers=3, num_heads=2, decoder_start_token_id=0)
    )
    cut_layers(model, 2, "student.model", SAMPLES)
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 2)
    assert (len(model.encoder.block), len(model.decoder.block), model.decoder.config.num_layers) == (2, 2, 2)


def test_what_a_configuration_says_of_each_layer_is_cut_too(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=2,
        layer_types=kinds,
    )
    model = Qwen2ForCausalLM(config).eval()
    cut_layers(model, [1, 2], "student.model", SAMPLES)
    loaded = plain(model, tmp_path)
    assert loaded.config.layer_types == ["sliding_attention", "full_attention"]
    assert torch.equal(logits(loaded), logits(model))


def test_a_gpt2_is_cut_under_its_own_names(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=3, n_head=2, n_positions=32)).eval()
    cut_layers(model, 2, "student.model", SAMPLES)
    assert torch.equal(logits(plain(model, tmp_path)), logits(model))
    assert json.loads((tmp_path / "config.json").read_text())["n_layer"] == 2


@pytest.mark.parametrize(
    ("kind", "layers", "message"),
    [
        ("t5", 5, r"student\.model\.layers is 5, but the teacher has 4 layers: ask for 1 to 4"),
        ("llama", 0, r"student\.model\.layers is 0, but the teacher has 4 layers"),
        ("llama", [0, 4], r"student\.model\.layers is \[0, 4\], but the teacher has 4 layers: list some of 0 to 3"),
        ("llama", [-1], r"layers is \[-1\].*list some of 0 to 3"),
        ("llama", [], r"layers is \[\].*list some of 0 to 3"),
        ("llama", [2, 1], r"layers is \[2, 1\]: list each layer once, in the teacher's order"),
        ("llama", [1, 1], r"layers is \[1, 1\]: list each layer once"),
        ("t5", [1, 3], r"layers is \[1, 3\], without layer 0: in a T5 it holds the relative position bias of all layers; add 0"),
    ],
)
def test_layers_that_cannot_be_kept_are_refused(kind: str, layers: int | list[int], message: str, teachers: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=message):
        load(keep(layers=layers), teachers[kind])


def test_a_teacher_whose_layers_cannot_be_found_is_refused() -> None:
    llama = build(LLAMA)
    llama.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="layers of a model of type llama, which are not one list"):
        cut_layers(llama, 2, "student.model", SAMPLES)
    t5 = build(T5)
    del t5.encoder.block
    with pytest.raises(ValueError, match="layers of a model of type t5, but of the encoder-decoders only a T5's are known"):
        cut_layers(t5, 2, "student.model", SAMPLES)


# Width: what is chosen


def test_a_columns_score_is_its_norm_times_what_it_carries() -> None:
    linear, groups = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)
    linear.weight.data = torch.tensor([[3.0, 1.0, 0.0, 5.0], [4.0, 0.0, 2.0, 12.0]])
    activity = {linear: torch.tensor([4.0, 9.0, 0.25, 0.0])}
    assert column_scores(linear, activity).tolist() == [10.0, 3.0, 1.0, 0.0]
    groups.weight.data = torch.tensor([[3.0, 4.0, 0.0, 5.0], [0.0, 0.0, 12.0, 0.0]])
    assert group_scores(groups, {groups: torch.ones(4)}, groups=2).tolist() == [5.0, 13.0]
    assert group_scores(groups, {groups: torch.tensor([4.0, 0.0, 0.0, 0.0])}, groups=2).tolist() == [6.0, 0.0]


def test_the_largest_stay_in_their_order_and_the_first_of_equals() -> None:
    assert largest(torch.tensor([2.0, 9.0, 2.0, 7.0, 2.0]), 3).tolist() == [0, 1, 3]


def test_activity_is_the_mean_square_over_all_tokens_of_all_samples() -> None:
    model = build(LLAMA).train()
    samples = [([5, 90, 17], [260]), ([33, 1], [])]
    activity = measure(model, samples)
    tokens = torch.tensor([5, 90, 17, 260, 33, 1])
    first = model.model.layers[0]
    inputs = first.input_layernorm(model.model.embed_tokens(tokens)).detach()
    torch.testing.assert_close(activity[first.self_attn.q_proj], inputs.pow(2).mean(dim=0))
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())


def test_activity_of_a_t5_reads_the_input_in_the_encoder_and_the_target_in_the_decoder() -> None:
    model = build(T5)
    activity = measure(model, [([5, 90, 17], [260, 33])])
    embed = model.shared.weight.detach()
    for stack, ids in ((model.encoder, [5, 90, 17]), (model.decoder, [0, 260, 33])):
        attention = stack.block[0].layer[0]
        inputs = attention.layer_norm(embed[ids]).detach()
        torch.testing.assert_close(activity[attention.SelfAttention.q], inputs.pow(2).mean(dim=0))


def test_random_samples_are_the_same_each_time_and_fit_the_model() -> None:
    short = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    assert random_samples(short) == random_samples(short)
    assert [len(first) + len(second) for first, second in random_samples(short)] == [32] * 4
    ids = {token for first, second in random_samples(build(LLAMA)) for token in (*first, *second)}
    assert (min(ids), max(ids), len(ids) > 250) == (0, 299, True)


def test_the_neurons_that_add_most_to_the_residual_stream_on_the_samples_stay(teachers: dict[str, Path]) -> None:
    samples = [([5, 90, 17, 260], [33, 1]), ([44, 60], [7])]
    teacher, student = build(LLAMA), load(keep(neurons=7), teachers["llama"], samples=samples)
    seen: dict[nn.Module, list[torch.Tensor]] = {layer.mlp: [] for layer in teacher.model.layers}
    for mlp in seen:
        mlp.register_forward_hook(lambda module, inputs, _: seen[module].append(inputs[0][0].detach()))
    for inputs, targets in samples:
        teacher(input_ids=torch.tensor([[*inputs, *targets]]))
    for mlp, layer in zip(seen, student.model.layers, strict=True):
        tokens = torch.cat(seen[mlp])
        neurons = nn.functional.silu(tokens @ mlp.gate_proj.weight.T) * (tokens @ mlp.up_proj.weight.T)
        added = torch.einsum("tn,hn->nth", neurons, mlp.down_proj.weight).flatten(1).norm(dim=1)
        kept = sorted(added.topk(7).indices.tolist())
        assert torch.equal(layer.mlp.down_proj.weight, mlp.down_proj.weight[:, kept])
        assert torch.equal(layer.mlp.gate_proj.weight, mlp.gate_proj.weight[kept])
        assert torch.equal(layer.mlp.up_proj.weight, mlp.up_proj.weight[kept])
    other = load(keep(neurons=7), teachers["llama"], samples=[([299, 298, 297], [296])])
    assert not torch.equal(logits(other), logits(student))


# Width: what has no effect can go


def llama(**sizes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **sizes}))


def t5(**sizes: Any) -> PreTrainedModel:
    small = {"vocab_size": 300, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 6}
    return T5ForConditionalGeneration(T5Config(**{**small, "decoder_start_token_id": 0, **sizes}))


def gemma3() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=4, sliding_window=4, layer_types=kinds, query_pre_attn_scalar=4))


SMALL = {
    "vocab_size": 300,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: llama(tie_word_embeddings=False),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-all-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama-own-keys": lambda: llama(hidden_size=20, num_attention_heads=5, num_key_value_heads=5, head_dim=6),
    "llama-square": lambda: llama(intermediate_size=24),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "gemma3": gemma3,
    "t5-v1.1": lambda: t5(feed_forward_proj="gated-gelu"),
    "t5-relu": lambda: t5(feed_forward_proj="relu"),
}
EACH = pytest.mark.parametrize("kind", KINDS)


def teacher_of(kind: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = KINDS[kind]().eval()
        for parameter in model.parameters():
            # So that biases and the gains of norms are not what they start at, and no part is too small to be missed.
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    return [*model.encoder.block, *model.decoder.block] if model.config.is_encoder_decoder else list(model.model.layers)


def ways_back(model: PreTrainedModel, names: Iterable[str]) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for layer in layers_of(model) for name, module in layer.named_modules() if name.rpartition(".")[2] in names]


def silence_neurons(model: PreTrainedModel, count: int) -> None:
    """Others in each layer, half of them by the way in and half by the way back."""
    draw = torch.Generator().manual_seed(4)
    for layer in layers_of(model):
        linears = [module for name, module in layer.named_modules() if name.rpartition(".")[2] in FEED_FORWARD]
        *inner, outer = linears
        chosen = torch.randperm(outer.in_features, generator=draw)[:count]
        outer.weight.data[:, chosen[: count // 2]] = 0
        inner[0].weight.data[chosen[count // 2 :]] = 0
        if inner[0].bias is not None:
            inner[0].bias.data[chosen[count // 2 :]] = 0


FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "wi", "wi_0", "wi_1", "wo"}


def silence_groups(model: PreTrainedModel) -> None:
    """One group in each attention layer: another in each, but for those of a T5 that share a position bias."""
    config = model.config
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for index, (name, output) in enumerate(ways_back(model, {"o_proj", "o"})):
        group = (1 if index < config.num_layers else 4) if name == "layer.0.SelfAttention.o" else index % groups
        width = output.in_features // groups
        output.weight.data[:, group * width : (group + 1) * width] = 0


@EACH
def test_neurons_without_effect_can_go(kind: str, tmp_path: Path) -> None:
    model = teacher_of(kind)
    silence_neurons(model, 6)
    before, neurons = logits(model), (model.config.d_ff if kind.startswith("t5") else model.config.intermediate_size)
    parameters = models.num_parameters(model)
    matrices = sum(1 for _ in ways_back(model, FEED_FORWARD))
    biases = sum(module.bias is not None for name, module in ways_back(model, FEED_FORWARD - {"down_proj"}))
    cut(model, keep(neurons=neurons - 6), "student.model")
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-6)
    assert parameters - models.num_parameters(model) == 6 * (matrices * model.config.hidden_size + biases)
    assert torch.equal(logits(plain(model, tmp_path)), logits(model))


@EACH
def test_heads_without_effect_can_go(kind: str, tmp_path: Path) -> None:
    model = teacher_of(kind)
    silence_groups(model)
    before, config = logits(model), model.config
    heads, width = config.num_attention_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    kept = heads - heads // groups
    cut(model, keep(heads=kept), "student.model")
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-6)
    assert {output.in_features for _, output in ways_back(model, {"o_proj", "o"})} == {kept * width}
    assert (config.num_attention_heads, config.head_dim) == (kept, width)
    assert (getattr(config, "num_key_value_heads", None) or kept) == (groups - 1 if groups < heads else kept)
    loaded = plain(model, tmp_path)
    assert loaded.config.head_dim == width
    assert torch.equal(logits(loaded), logits(model))


@EACH
def test_layers_neurons_and_heads_go_together_and_what_is_left_generates(kind: str, tmp_path: Path) -> None:
    model = teacher_of(kind)
    cut(model, keep(layers=2, neurons=9, heads=2), "student.model")
    loaded = plain(model, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    ids = torch.tensor([[5, 90, 17, 260, 33, 1]])
    length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    runs = [m.generate(input_ids=ids, use_cache=cache, **length) for m in (model, loaded) for cache in (True, False)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    # Every number that a module holds is the one it would have been made with.
    for name, module in loaded.named_modules():
        live = model.get_submodule(name)
        numbers = {key: value for key, value in vars(module).items() if type(value) in (int, float)}
        assert numbers == {key: vars(live)[key] for key in numbers}


def test_a_t5_keeps_the_same_heads_in_all_layers_of_a_stack_with_their_position_bias() -> None:
    model, teacher = teacher_of("t5-relu"), teacher_of("t5-relu")
    activity = measure(teacher, random_samples(teacher))
    cut(model, keep(heads=2), "student.model")
    for stack, whole in ((model.encoder, teacher.encoder), (model.decoder, teacher.decoder)):
        attentions = [block.layer[0].SelfAttention for block in whole.block]
        scores = torch.stack([group_scores(attention.o, activity, 6) for attention in attentions])
        kept = sorted((scores / scores.sum(dim=1, keepdim=True)).mean(dim=0).topk(2).indices.tolist())
        bias = attentions[0].relative_attention_bias.weight
        assert torch.equal(stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight, bias[:, kept])
        rows = [head * 4 + number for head in kept for number in range(4)]
        for block, attention in zip(stack.block, attentions, strict=True):
            assert torch.equal(block.layer[0].SelfAttention.q.weight, attention.q.weight[rows])


@EACH
def test_a_student_with_all_neurons_and_heads_is_its_teacher(kind: str) -> None:
    model = teacher_of(kind)
    before = logits(model)
    neurons = model.config.d_ff if kind.startswith("t5") else model.config.intermediate_size
    cut(model, keep(neurons=neurons, heads=model.config.num_attention_heads), "student.model")
    assert torch.equal(logits(model), before)


def test_a_narrow_student_is_in_the_precision_asked_for_and_learns(teachers: dict[str, Path]) -> None:
    source = keep(neurons=8, heads=1)
    half = models.load_model(source, TOKENIZER, seed=0, dtype=torch.bfloat16, teacher_folder=teachers["t5"])
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    student = load(source, teachers["t5"])
    student(input_ids=torch.tensor([[5, 9]]), labels=torch.tensor([[7, 1]])).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.shape == parameter.shape for parameter in student.parameters())


# Width: what is refused


@pytest.mark.parametrize(
    ("kind", "parts", "message"),
    [
        (
            "llama",
            {"neurons": 21},
            r"student\.model\.neurons is 21, but the teacher's feed-forward layers have 20 neurons: ask for 1 to 20",
        ),
        ("t5-v1.1", {"neurons": 25}, r"student\.model\.neurons is 25, .* have 24 neurons: ask for 1 to 24"),
        ("llama", {"heads": 7}, r"student\.model\.heads is 7, but the model's attention layers have 6 query heads: ask for 1 to 6"),
        (
            "llama",
            {"heads": 3},
            r"student\.model\.heads is 3, but the model's 6 query heads share keys and values in groups of 2, which go whole: "
            r"ask for one of 2, 4, 6$",
        ),
        (
            "llama-own-keys",
            {"heads": 3},
            r"student\.model\.heads is 3, which transformers does not take in a configuration of type llama with hidden_size 20: "
            r"ask for one of 1, 2, 4, 5$",
        ),
        ("t5-relu", {"heads": 9}, r"student\.model\.heads is 9, .* have 6 query heads"),
    ],
)
def test_neurons_and_heads_that_cannot_be_kept_are_refused(kind: str, parts: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut(teacher_of(kind), keep(**parts), "student.model")


def test_a_teacher_whose_neurons_or_heads_cannot_be_told_is_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    with pytest.raises(
        ValueError, match=r"student\.model\.neurons is 4, .*model of type gpt2 are its neurons, as it can of t5, llama, qwen2, gemma3"
    ):
        cut(gpt2, keep(neurons=4), "student.model")
    with pytest.raises(
        ValueError, match=r"student\.model\.heads is 1, .*model of type gpt2 are its heads, as it can of t5, llama, qwen2, gemma3"
    ):
        cut(gpt2, keep(heads=1), "student.model")
    # A norm over all heads at once.
    olmo2 = Olmo2ForCausalLM(Olmo2Config(**SMALL)).eval()
    with pytest.raises(
        ValueError,
        match=r"student\.model cannot have fewer .* type olmo2 the size of model.layers.0.self_attn.k_norm.weight.*cut layers only",
    ):
        cut(olmo2, keep(heads=4), "student.model")


def test_a_feed_forward_layer_with_weights_between_its_matrices_is_refused() -> None:
    model = teacher_of("llama")
    model.model.layers[1].mlp.norm = nn.LayerNorm(20)
    with pytest.raises(ValueError, match="it cannot be told which weights of a model of type llama are its neurons"):
        cut(model, keep(neurons=4), "student.model")


def test_a_configuration_that_lists_heads_by_layer_is_refused() -> None:
    model = teacher_of("llama")
    model.config.__dict__["num_attention_heads"] = [6, 6, 6]
    with pytest.raises(ValueError, match="it cannot be told which weights of a model of type llama are its heads"):
        cut(model, keep(heads=2), "student.model")
