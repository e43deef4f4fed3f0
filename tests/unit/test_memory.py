"""The memory model: hand-computed sizes, the tensors that autograd keeps, properties, and what GPUs said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.architecture import Architecture, architecture_of, assumed_architecture
from launch.inference_memory import Inference, cache_token_bytes, decoding_memory, most_slots, scoring_memory, teacher_memory
from launch.memory import CONTEXT_BYTES, NCCL_BYTES, Memory, fullest, outside_bytes, usable_bytes
from launch.training_memory import Step, adapter_parameters, head_rows, host_bytes, kept_activations, moments, token_bytes, training_memory

GB = 10**9
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
ONE_B = architecture_of(LLAMA)
TWO_THOUSAND = assumed_architecture(GB)


def step(**changes: Any) -> Step:
    return replace(Step(processes=1, zero_stage=0, precision="bf16", tokens=1000, targets=100, longest=200), **changes)


# ----- by hand -----


def test_what_a_layer_keeps_of_a_token_by_hand() -> None:
    # Two norms: input in fp32, what is normalized and what it gives in bf16, one scale. Queries and output 2048 wide, keys and values 512,
    # one number a head; inner input, its activation, the other factor and the product.
    norms, attention, inner = 2 * (8 * 2048 + 4), 2 * (2 * 2048 + 2 * 512) + 4 * 32, 2 * 4 * 8192
    assert token_bytes(ONE_B, step()) == norms + attention + inner == 108_680
    # Compiled: inputs in bf16, nothing in between, and three of four inside the feed-forward layer.
    assert token_bytes(ONE_B, step(compiled=True)) == 2 * (4 * 2048 + 4) + attention + 2 * 3 * 8192
    assert kept_activations(ONE_B, step()) == 1000 * (16 * 108_680 + 6 * 2048)
    assert kept_activations(ONE_B, step(checkpointing=True)) == 1000 * (16 * 2 * 2048 + 6 * 2048)


def test_states_by_zero_stage_by_hand() -> None:
    """By parameter, over two processes with several forwards a step."""
    model = replace(assumed_architecture(10**9), parameters=1_000_000_000)
    expected: dict[Literal[0, 1, 2, 3], tuple[float, float, float]] = {0: (2, 2 + 4, 12), 1: (2, 2 + 4, 6), 2: (2, 2, 6), 3: (1, 2, 6)}
    for stage, (weights, gradients, optimizer) in expected.items():
        memory = moments(model, step(processes=2, zero_stage=stage, forwards=2))["end of the forward pass"]
        assert (memory.weights, memory.gradients, memory.optimizer) == (weights * GB, gradients * GB, optimizer * GB), stage
    alone = moments(model, step())["end of the forward pass"]
    assert (alone.weights, alone.gradients, alone.optimizer) == (2 * GB, 2 * GB, 12 * GB)
    exact = moments(model, step(precision="fp32"))["end of the forward pass"]
    assert (exact.weights, exact.gradients, exact.optimizer) == (4 * GB, 4 * GB, 8 * GB)


def test_an_offloaded_optimizer_lies_in_the_hosts_memory() -> None:
    offloaded = step(processes=4, zero_stage=2, offload=True)
    assert training_memory(ONE_B, offloaded).optimizer == 0
    assert host_bytes(ONE_B, offloaded) == 18 * -(-ONE_B.parameters // 4)
    assert host_bytes(ONE_B, step(processes=4, zero_stage=2)) == 0


def test_adapters_by_hand() -> None:
    # Rank x (in + out) of seven matrices in 16 layers.
    each = (2048 + 2048) + 2 * (2048 + 512) + (2048 + 2048) + 3 * (2048 + 8192)
    assert adapter_parameters(ONE_B, 16, None) == 16 * 16 * each
    assert adapter_parameters(ONE_B, 16, ["q_proj", "mlp.down_proj"]) == 16 * 16 * (4096 + 10240)
    memory = training_memory(ONE_B, step(adapters=adapter_parameters(ONE_B, 16, None)))
    assert memory.optimizer < ONE_B.parameters // 10


def test_loading_in_fp32_is_the_fullest_moment_of_few_tokens_under_adapters() -> None:
    few = step(tokens=10, targets=1, adapters=1000)
    assert training_memory(ONE_B, few) == moments(ONE_B, few)["loading"]
    assert moments(ONE_B, few)["loading"].weights == 4 * (ONE_B.parameters + 1000)


def test_keys_and_values_by_hand() -> None:
    how = Inference(prompt=100, new=28, slots=10)
    assert cache_token_bytes(ONE_B, how) == 2 * 16 * 8 * 64 * 2
    assert decoding_memory(ONE_B, how).cache == 10 * 128 * 32_768
    assert cache_token_bytes(ONE_B, replace(how, sharding="tensor", degree=4)) == 32_768 // 4
    assert decoding_memory(ONE_B, replace(how, prompt=101)).cache == 10 * 192 * 32_768, "in steps of 64"


def test_what_is_held_of_a_teacher_by_hand() -> None:
    model = architecture_of({**LLAMA, "tie_word_embeddings": False})
    embedding, workspaces = 128_256 * 2048, 3 * 2**25
    tensor = scoring_memory(model, Inference("tensor", 4))
    assert tensor.weights == 2 * (embedding + (model.parameters - embedding) // 4), "AutoTP splits a head, too"
    assert tensor.buffers == workspaces
    few, many = (scoring_memory(model, Inference("zero3", 4, scored=tokens, rows=1)) for tokens in (1, 200_000))
    assert few.buffers == workspaces + 2 * embedding, "the head is gathered whole"
    assert many.buffers == workspaces + 2 * 2 * model.layer, "a layer, and the next one"


def test_a_small_student_needs_cublas_workspaces_at_the_least() -> None:
    small = architecture_of({**LLAMA, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 500, "num_hidden_layers": 2})
    assert training_memory(small, step(tokens=10, targets=1)).total > 2 * 2**25


def test_a_live_teachers_weights_lie_beside_the_student() -> None:
    assert training_memory(ONE_B, step(live=ONE_B)).teacher == 2 * ONE_B.parameters


def test_memory_adds_up_and_the_fullest_is_taken() -> None:
    small, large = Memory(weights=3), Memory(weights=1, cache=3)
    assert (small + large).total == 7
    assert fullest([small, large]) is large
    assert usable_bytes(80 * GB, 1) == 76 * GB - CONTEXT_BYTES
    assert usable_bytes(80 * GB, 2) == 76 * GB - CONTEXT_BYTES - NCCL_BYTES
    assert usable_bytes(CONTEXT_BYTES, 1) == 0


def test_recorded_passes_have_a_pool_of_their_own() -> None:
    plain, recorded = training_memory(ONE_B, step(compiled=True)), training_memory(ONE_B, step(compiled=True, graphs=True))
    assert recorded.recorded == plain.activations + plain.head
    assert (recorded.allocated, recorded.total) == (plain.total, plain.total + recorded.recorded)


# ----- against what others count -----


def test_the_constants_are_those_of_the_code() -> None:
    """These modules import torch, which a login node need not have."""
    from launch import inference_memory, training_memory, workload
    from train import engine, head_loss, passes, trainer
    from train.teacher import decode, score, slots

    assert head_rows(128_256, 10**9) == (head_loss.CHUNKS_A_PRODUCT * head_loss.chunk_rows(128_256), head_loss.chunk_rows(128_256))
    assert head_rows(500, 10**9)[1] == head_loss.chunk_rows(500)
    assert training_memory._BUCKET == engine._LARGEST_BUCKET
    assert workload.AUTO_TOKENS == trainer._AUTO_TOKENS
    assert workload.WORTH_COMPILING == passes._WORTH_COMPILING
    assert (inference_memory.MOST_SLOTS, inference_memory._ROUND) == (decode._MOST_SLOTS, decode._ROUND)
    assert (inference_memory._FREE_SHARE, inference_memory._KEPT_FREE) == (decode._FREE_SHARE, decode._KEPT_FREE)
    assert (inference_memory._PREFILL_TOKENS, inference_memory.FEWEST_SLOTS) == (slots._PREFILL_TOKENS, slots._FEWEST_SLOTS)
    assert (inference_memory.SCORED_TOKENS, inference_memory._HEAD_BYTES) == (score._GPU_TOKENS, score._HEAD_BYTES)
    assert inference_memory._SLICE == score._SLICE


def saved_bytes(layers: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, Architecture]:
    """What autograd keeps of a student's forward in bf16, its tokens, and its shape. Flash attention is put in by what it keeps."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from data.batches import collate
    from data.prompts import TextFormat
    from data.rows import TrainSequence
    from train import varlen
    from train.learner import Learner, tensors_of
    from train.losses import Divergence

    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            out = torch.zeros_like(q)
            ctx.save_for_backward(q, k, v, out, torch.zeros(q.shape[1], q.shape[0], dtype=torch.float32))
            return out

    monkeypatch.setattr(varlen, "_plain", lambda q, k, v, *_: Flash.apply(q.contiguous(), k.contiguous(), v.contiguous()))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, tie_word_embeddings=True)).to(torch.bfloat16)
    form = TextFormat("decoder_only", eos_id=1, pad_id=0, max_input_tokens=64, max_label_tokens=16, max_rationale_tokens=16)
    batch = collate([TrainSequence(list(range(3, 23)), list(range(5, 15)), n % 2 == 0) for n in range(4)], form, 0, packed=True)
    learner, weights = Learner(model, divergence=Divergence("forward_kl")), {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with learner.packed(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        learner(torch.ones(3), **tensors_of(batch))
    return sum(storage.nbytes() for storage in kept.values()), batch.input_ids.numel(), architecture_of(model.config.to_dict())


def test_a_layer_keeps_what_autograd_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    two, tokens, _ = saved_bytes(2, monkeypatch)
    three, _, model = saved_bytes(3, monkeypatch)
    assert three - two == tokens * token_bytes(model, step(tokens=tokens))


# ----- properties -----

stages = st.sampled_from([0, 1, 2, 3])
models = st.sampled_from([ONE_B, TWO_THOUSAND, architecture_of({**LLAMA, "tie_word_embeddings": False, "num_hidden_layers": 40})])


@given(models, stages, st.sampled_from(["fp32", "bf16"]), st.booleans(), st.booleans(), st.integers(1, 8))
def test_more_processes_never_need_more_memory_each(
    model: Architecture, stage: Any, precision: Any, offload: bool, checkpointing: bool, processes: int
) -> None:
    first = step(
        processes=2 * processes,
        zero_stage=stage,
        precision=precision,
        offload=offload and stage > 0,
        checkpointing=checkpointing,
        forwards=2,
    )
    assert training_memory(model, replace(first, processes=4 * processes)).total <= training_memory(model, first).total


@given(models, stages, st.integers(1, 20_000), st.integers(1, 20_000), st.booleans())
def test_memory_grows_with_the_tokens_of_a_forward(model: Architecture, stage: Any, tokens: int, more: int, compiled: bool) -> None:
    one = step(processes=2, zero_stage=stage, tokens=tokens, targets=-(-tokens // 4), compiled=compiled)
    assert training_memory(model, replace(one, tokens=tokens + more)).total >= training_memory(model, one).total
    assert (
        training_memory(model, replace(one, checkpointing=True, tokens=20_000)).total
        <= training_memory(model, replace(one, tokens=20_000)).total
    )


@given(models, st.integers(1, 300), st.integers(1, 4000), st.sampled_from([("replica", 1), ("tensor", 2), ("tensor", 8), ("zero3", 4)]))
def test_a_teacher_grows_with_its_requests_and_shrinks_with_its_degree(model: Architecture, slots: int, prompt: int, layout: Any) -> None:
    how = Inference(layout[0], layout[1], prompt=prompt, slots=slots)
    assert teacher_memory(model, how).total <= teacher_memory(model, replace(how, slots=slots + 1)).total
    wider = replace(how, degree=2 * how.degree) if how.sharding != "replica" else how
    assert teacher_memory(model, wider).total <= teacher_memory(model, how).total
    fp32 = replace(how, precision="fp32")
    assert decoding_memory(model, how).total <= decoding_memory(model, fp32).total
    assert scoring_memory(model, how).total <= scoring_memory(model, fp32).total


@given(models, st.integers(1, 200))
def test_the_requests_that_find_room_fit(model: Architecture, gigabytes: int) -> None:
    how, usable = Inference(), gigabytes * GB
    slots = most_slots(model, how, usable)
    assert 0 <= slots <= 256
    if slots:
        assert teacher_memory(model, replace(how, slots=slots)).total <= usable


# ----- against GPUs -----

ROOT = Path(__file__).resolve().parents[2]
MEASURED: dict[str, Any] = json.loads((ROOT / "tests" / "bench" / "memory.json").read_text())
"""What tests/bench/memory.py found, by case; `peak_bytes` without what was allocated before it."""
ROWS: dict[str, dict[str, Any]] = {row["case"]: row for row in MEASURED["rows"]}


def shape(name: str) -> Architecture:
    sizes = MEASURED["machine"][name]
    keys = {"width": "hidden_size", "neurons": "intermediate_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
    keys |= {"key_value_heads": "num_key_value_heads", "vocabulary": "vocab_size", "tied": "tie_word_embeddings"}
    return architecture_of({"model_type": "llama", **{keys[key]: value for key, value in sizes.items()}})


def predicted(row: dict[str, Any]) -> Memory:
    settings, seen = row["settings"], row["seen"]
    if row["kind"] == "training":
        config, student = settings["config"], shape("student")
        lora = config.get("lora")
        return training_memory(
            student,
            Step(
                processes=row["gpus"],
                zero_stage=config["zero_stage"],
                precision=config["precision"],
                tokens=seen["tokens"],
                targets=seen["targets"],
                longest=seen["longest"],
                forwards=settings["forwards"],
                offload=config.get("offload_optimizer", False),
                checkpointing=config.get("activation_checkpointing", False),
                compiled=config["compile"] != "off",
                graphs=config["compile"] == "graphs",
                adapters=adapter_parameters(student, lora["rank"], None) if lora else None,
                masked=student.body if settings["masked"] else 0,
                live=student if settings["soft"] == "live" else None,
            ),
        )
    sharding = settings["sharding"]
    how = Inference(sharding, 1 if sharding == "replica" else row["gpus"])
    if row["kind"] == "decode":
        return decoding_memory(shape("teacher"), replace(how, prompt=settings["prompt"], new=settings["new"], slots=settings["batch"]))
    return scoring_memory(shape("teacher"), replace(how, scored=seen["tokens"], rows=seen["rows"]))


@pytest.mark.parametrize("case", ROWS)
def test_a_gpu_needs_what_is_predicted(case: str) -> None:
    assert predicted(ROWS[case]).allocated == pytest.approx(ROWS[case]["peak_bytes"], rel=0.1 if ROWS[case]["kind"] == "training" else 0.02)


def test_recorded_passes_take_what_torch_reserved() -> None:
    rows = [row for row in MEASURED["rows"] if row["settings"].get("config", {}).get("compile") == "graphs"]
    assert rows
    for row in rows:
        assert predicted(row).total == pytest.approx(row["reserved_bytes"], rel=0.1)


def test_the_driver_counts_what_is_left_to_it() -> None:
    known = [row for row in MEASURED["rows"] if row["outside_bytes"] is not None]
    assert {row["gpus"] for row in known} == {1, 2} and {row["kind"] for row in known} == {"training", "decode", "score"}
    for row in known:
        assert row["outside_bytes"] <= 1.02 * outside_bytes(row["gpus"])


def named(row: dict[str, Any]) -> str:
    settings, seen = row["settings"], row["seen"]
    if row["kind"] == "decode":
        return f"writes, `{settings['sharding']}`, {settings['batch']} at once"
    if row["kind"] == "score":
        return f"scores, `{settings['sharding']}`, {seen['tokens']:,} tokens, {settings['format']}"
    config = settings["config"]
    knobs = {
        "LoRA": "lora" in config,
        "fp32": config["precision"] == "fp32",
        "activation checkpointing": config.get("activation_checkpointing", False),
        "offloaded": config.get("offload_optimizer", False),
        "masks": settings["masked"],
        "top-k soft labels": settings["soft"] == "top_k",
        "a live teacher of its size": settings["soft"] == "live",
        "compiled": config["compile"] == "layers",
        "compiled and recorded": config["compile"] == "graphs",
    }
    forwards = f"{settings['forwards']} \N{MULTIPLICATION SIGN} {seen['tokens']:,}"
    return ", ".join([f"ZeRO-{config['zero_stage']}", *(name for name, on in knobs.items() if on), forwards])


def readme_rows() -> list[str]:
    """The README's table, which is held to these figures."""
    found = []
    for row in MEASURED["rows"]:
        told, peak = predicted(row).allocated, row["peak_bytes"]
        figures = f"{row['gpus']} | {told / GB:.1f} GB | {peak / GB:.1f} GB | {100 * (told / peak - 1):+.1f} %"
        found.append(f"| {named(row)} | {figures} |")
    return found


def test_the_readme_shows_these_figures() -> None:
    readme = (ROOT / "README.md").read_text()
    for row in readme_rows():
        assert row in readme
