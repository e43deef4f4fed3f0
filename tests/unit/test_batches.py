from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from data.batches import Order, StudentBatch, collate, micro_batches
from data.prompts import TextFormat
from data.rows import TrainRow, TrainSequence
from data.soft_labels import Sampled, SoftLabels, TopK

EOS, PAD, START = 1, 0, 7
T5 = TextFormat("encoder_decoder", EOS, PAD, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=16)
LLAMA = dataclasses.replace(T5, family="decoder_only", pad_id=EOS)
"""A decoder-only model whose padding is its end of sequence, as most have it."""


def soft(tokens: int, first: int = 50) -> TopK:
    ids = np.arange(first, first + 2 * tokens, dtype=np.int32).reshape(tokens, 2)
    return TopK(ids, -ids.astype(np.float32) / 100, np.full(tokens, -0.5, np.float32))


SEQUENCES = [
    TrainSequence([11, 12, 13, EOS], [21, EOS], True, soft(2)),
    TrainSequence([14, EOS], [22, 23, 24, EOS], False, soft(3, 60)),
]


def test_an_encoder_decoder_batch_by_hand() -> None:
    batch = collate(SEQUENCES, T5, START)
    assert batch.input_ids.tolist() == [[11, 12, 13, EOS], [14, EOS, PAD, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.decoder_input_ids is not None
    assert batch.decoder_input_ids.tolist() == [[START, 21, EOS, PAD], [START, 22, 23, 24]]
    assert batch.targets.tolist() == [[21, EOS, PAD, PAD], [22, 23, 24, EOS]]
    assert batch.label_mask.tolist() == [[True, True, False, False], [False] * 4]
    assert batch.rationale_mask.tolist() == [[False] * 4, [True] * 4]
    assert batch.soft_positions.tolist() == [0, 1, 4, 5, 6]
    assert batch.soft_ids.tolist() == [[50, 51], [52, 53], [60, 61], [62, 63], [64, 65]]
    torch.testing.assert_close(batch.soft_log_probs, -batch.soft_ids.float() / 100)
    assert batch.token_counts().tolist() == [2, 4, 5]
    assert set(batch.model_inputs()) == {"input_ids", "attention_mask", "decoder_input_ids"}


def test_a_decoder_only_batch_by_hand() -> None:
    sequences = [dataclasses.replace(s, input_ids=s.input_ids[:-1]) for s in SEQUENCES]
    batch = collate(sequences, LLAMA, START)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21], [14, 22, 23, 24]]
    assert batch.attention_mask.tolist() == [[1] * 4, [1] * 4]
    assert batch.decoder_input_ids is None
    # The logits at the input's last token predict the target's first.
    assert batch.targets.tolist() == [[EOS, EOS, 21, EOS], [22, 23, 24, EOS]]
    assert batch.label_mask.tolist() == [[False, False, True, True], [False] * 4]
    assert batch.rationale_mask.tolist() == [[False] * 4, [True] * 4]
    assert batch.soft_positions.tolist() == [2, 3, 4, 5, 6]
    assert batch.token_counts().tolist() == [2, 4, 5]
    assert set(batch.model_inputs()) == {"input_ids", "attention_mask"}


def test_the_end_of_a_sequence_is_learnt_where_it_is_also_the_padding() -> None:
    long = TrainSequence([11, 12, 13, 14], [21, 22, EOS], True)
    short = TrainSequence([EOS, 15], [23, EOS], True)  # opens with the same token too, as where bos = eos = pad
    batch = collate([long, short], LLAMA, START)
    assert batch.input_ids[1].tolist() == [EOS, 15, 23, EOS, EOS, EOS]
    assert batch.attention_mask[1].tolist() == [1, 1, 1, 0, 0, 0]
    assert batch.targets[1][batch.label_mask[1]].tolist() == [23, EOS]


def test_sequences_without_soft_labels_have_an_empty_place_for_them() -> None:
    bare = [dataclasses.replace(s, soft=None) for s in SEQUENCES]
    batch = collate(bare, T5, START)
    assert (tuple(batch.soft_positions.shape), batch.soft_ids.shape[0], batch.soft_log_probs.shape[0]) == ((0,), 0, 0)
    assert batch.token_counts().tolist() == [2, 4, 0]


def test_soft_labels_of_no_token_do_not_disturb_the_others() -> None:
    nothing = TopK(np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32), np.zeros(0, np.float32))
    batch = collate([dataclasses.replace(SEQUENCES[0], soft=nothing), SEQUENCES[1]], T5, START)
    assert batch.soft_positions.tolist() == [4, 5, 6]
    assert len(collate([dataclasses.replace(SEQUENCES[0], soft=nothing)], T5, START).soft_positions) == 0


@pytest.mark.parametrize("form", [T5, LLAMA], ids=["t5", "llama"])
@pytest.mark.parametrize(("num_masked", "counts"), [(0, [2, 4, 5]), (1, [2, 0, 2]), (2, [0, 0, 0])])
def test_sequences_that_only_fill_a_batch_count_in_no_loss(form: TextFormat, num_masked: int, counts: list[int]) -> None:
    batch = collate(SEQUENCES, form, START, num_masked=num_masked)
    assert batch.token_counts().tolist() == counts
    assert batch.input_ids.shape[0] == 2
    assert batch.attention_mask.sum() > 0


def test_a_batch_moves_whole() -> None:
    for form in (T5, LLAMA):
        moved = collate(SEQUENCES, form, START).to(torch.device("meta"))
        values = [getattr(moved, field.name) for field in dataclasses.fields(StudentBatch)]
        assert {value.device.type for value in values if isinstance(value, Tensor)} == {"meta"}
        assert moved.soft_temperature is None
        assert (moved.decoder_input_ids is None) == (form is LLAMA)


def drawn(counts: list[list[int]], first: int = 50, temperature: float = 2.0) -> Sampled:
    """Draws of `counts[position][n]`, with ids that count up from `first`."""
    flat = [count for position in counts for count in position]
    ids = np.arange(first, first + len(flat), dtype=np.int32)
    distinct = np.array([len(position) for position in counts], np.int32)
    return Sampled(ids, np.array(flat, np.int32), distinct, np.full(len(counts), -0.5, np.float32), sum(counts[0]), temperature)


def test_draws_by_hand() -> None:
    first = dataclasses.replace(SEQUENCES[0], soft=drawn([[4], [1, 2, 1]]))
    second = dataclasses.replace(SEQUENCES[1], soft=drawn([[2, 2]], 60))
    batch = collate([first, second], T5, START)
    assert batch.soft_positions.tolist() == [0, 1, 4]
    assert batch.soft_ids.tolist() == [[50, 0, 0], [51, 52, 53], [60, 61, 0]]
    torch.testing.assert_close(batch.soft_log_probs.exp(), torch.tensor([[1, 0, 0], [0.25, 0.5, 0.25], [0.5, 0.5, 0]]))
    assert batch.soft_log_probs[0].tolist() == [0, -math.inf, -math.inf]
    assert batch.soft_temperature == 2.0
    assert batch.token_counts().tolist() == [2, 4, 3]
    assert batch.to(torch.device("cpu")).soft_temperature == 2.0
    assert collate(SEQUENCES, T5, START).soft_temperature is None


@pytest.mark.parametrize("other", [soft(1), drawn([[4]], temperature=1.0)])
def test_a_batch_holds_one_kind_of_soft_labels(other: SoftLabels) -> None:
    mixed = [dataclasses.replace(SEQUENCES[0], soft=drawn([[4]])), dataclasses.replace(SEQUENCES[1], soft=other)]
    with pytest.raises(AssertionError):
        collate(mixed, T5, START)


ANSWERS = [TrainSequence([11, EOS], [21, EOS], False, weight=0.75), TrainSequence([11, EOS], [22, 23, EOS], False, weight=0.25)]


@pytest.mark.parametrize("form", [T5, LLAMA], ids=["t5", "llama"])
def test_answers_by_hand(form: TextFormat) -> None:
    batch = collate([SEQUENCES[0], *ANSWERS], form, START)
    label, first, second = batch.answer_weights.tolist()
    before = 0 if form is T5 else 1
    assert not any(label)
    assert first[before:] == [0.75, 0.75] + [0] * (len(first) - before - 2)
    assert second[before:] == [0.25, 0.25, 0.25] + [0] * (len(second) - before - 3)
    assert batch.targets[batch.answer_weights > 0].tolist() == [21, EOS, 22, 23, EOS]
    assert not (batch.label_mask | batch.rationale_mask)[1:].any()
    # Two tokens with a distribution (the label's), 2 x 0.75 and 3 x 0.25 of answers.
    assert batch.token_counts().tolist() == [2, 0, 2 + 2.25]


@pytest.mark.parametrize(("num_masked", "soft_tokens"), [(0, 2.25), (1, 1.5), (2, 0)])
def test_answers_that_only_fill_a_batch_weigh_nothing(num_masked: int, soft_tokens: float) -> None:
    batch = collate(ANSWERS, T5, START, num_masked=num_masked)
    assert batch.token_counts().tolist() == [0, 0, soft_tokens]


def test_weights_are_counted_in_float64() -> None:
    many = [dataclasses.replace(ANSWERS[0], weight=weight) for weight in [1.0, *[1e-3] * 300]]
    together = collate(many, T5, START).token_counts()[2]
    apart = sum(collate([s], T5, START).token_counts()[2] for s in many)
    assert float(together) == pytest.approx(float(apart), rel=1e-14)
    assert float(together) == pytest.approx(2.6, rel=1e-7)


# Properties

tokens = st.integers(2, 19)
sequences = st.builds(
    TrainSequence,
    st.lists(tokens, min_size=1, max_size=7),
    st.lists(tokens, max_size=5).map(lambda ids: [*ids, EOS]),
    st.booleans(),
)
answers = st.builds(dataclasses.replace, sequences, is_label=st.just(False), weight=st.floats(1e-3, 1.0))
targets = sequences | answers


@settings(max_examples=150, deadline=None)
@given(st.lists(targets, min_size=1, max_size=6), st.sampled_from([T5, LLAMA]), st.data())
def test_masks_partition_the_targets(rows: list[TrainSequence], form: TextFormat, data: st.DataObject) -> None:
    num_masked = data.draw(st.integers(0, len(rows)))
    batch = collate(rows, form, START, num_masked=num_masked)
    kinds = [batch.label_mask, batch.rationale_mask, batch.answer_weights > 0]
    assert torch.stack(kinds).sum(dim=0).max() <= 1
    for n, row in enumerate(rows):
        mask = torch.stack(kinds)[:, n].any(dim=0)
        expected = row.target_ids if n < len(rows) - num_masked else []
        assert batch.targets[n][mask].tolist() == expected
        assert batch.attention_mask[n].sum() == len(row.input_ids) + (len(row.target_ids) - 1) * (form is LLAMA)
    learnt = rows[: len(rows) - num_masked]
    assert batch.label_mask.sum() == sum(len(s.target_ids) for s in learnt if s.is_label)
    assert batch.rationale_mask.sum() == sum(len(s.target_ids) for s in learnt if not s.is_label and s.weight is None)
    assert float(batch.token_counts()[2]) == pytest.approx(sum(s.weight * len(s.target_ids) for s in learnt if s.weight is not None))


def tiny(form: TextFormat) -> PreTrainedModel:
    sizes = {"vocab_size": 24, "pad_token_id": form.pad_id, "eos_token_id": EOS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if form.family == "encoder_decoder":
            config = T5Config(**sizes, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=START)
            return T5ForConditionalGeneration(config).eval()
        config = LlamaConfig(
            **sizes,
            bos_token_id=None,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
        return LlamaForCausalLM(config).eval()


MODELS = {"encoder_decoder": tiny(T5), "decoder_only": tiny(LLAMA)}


@torch.no_grad()
def losses_of(batch: StudentBatch, form: TextFormat) -> list[float]:
    """Cross-entropy of each sequence's own targets."""
    logits: Tensor = MODELS[form.family](**batch.model_inputs(), use_cache=False).logits
    masks = batch.label_mask | batch.rationale_mask
    return [float(F.cross_entropy(logits[n][masks[n]], batch.targets[n][masks[n]], reduction="sum")) for n in range(len(logits))]


@settings(max_examples=30, deadline=None)
@given(st.lists(sequences, min_size=2, max_size=5), st.sampled_from([T5, LLAMA]))
def test_a_sequence_costs_the_same_alone_and_in_a_padded_batch(rows: list[TrainSequence], form: TextFormat) -> None:
    together = losses_of(collate(rows, form, START), form)
    alone = [losses_of(collate([row], form, START), form)[0] for row in rows]
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("form", [T5, LLAMA], ids=["t5", "llama"])
def test_the_loss_of_a_sequence_is_what_transformers_computes_from_labels(form: TextFormat) -> None:
    row = TrainSequence([5, 6, 8], [9, 10, EOS], True)
    if form is T5:
        inputs, labels = row.input_ids, row.target_ids
    else:
        inputs, labels = row.input_ids + row.target_ids, [-100, -100, -100, *row.target_ids]
    with torch.no_grad():
        reference = MODELS[form.family](input_ids=torch.tensor([inputs]), labels=torch.tensor([labels])).loss
    assert losses_of(collate([row], form, START), form)[0] / 3 == pytest.approx(float(reference), rel=1e-5)


# Order


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31 - 1))
def test_every_epoch_is_a_permutation(num_rows: int, batch_size: int, seed: int) -> None:
    order = Order(num_rows, batch_size, seed)
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.rows_of(step) for step in steps]
        assert sorted(n for batch in batches for n in batch) == list(range(num_rows))
        assert {len(batch) for batch in batches[:-1]} <= {batch_size}
        assert 1 <= len(batches[-1]) <= batch_size


def test_an_order_is_known_from_the_step_alone() -> None:
    seen = [Order(10, 4, 3).rows_of(step) for step in range(9)]
    order = Order(10, 4, 3)
    assert [order.rows_of(step) for step in reversed(range(9))] == seen[::-1]
    assert len(seen[2]) == 2
    assert seen[:3] != seen[3:6]
    assert seen[:3] != [Order(10, 4, 4).rows_of(step) for step in range(3)]


# Micro-batches


def row(n: int) -> TrainRow:
    return TrainRow(f"row-{n}", (TrainSequence([n + 2, EOS], [3, EOS], True),))


def test_micro_batches_by_hand() -> None:
    rows = [row(n) for n in range(5)]
    shares = [list(micro_batches(rows, rank=rank, num_ranks=2, micro_batch_size=2, num_micro_batches=2)) for rank in range(2)]
    names = [[([r.id for r in part], filling) for part, filling in share] for share in shares]
    assert names == [
        [(["row-0", "row-2"], 0), (["row-4"], 0)],
        [(["row-1", "row-3"], 0), (["row-0"], 1)],
    ]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 9))
def test_all_ranks_together_see_every_row_once_in_as_many_forwards(num_rows: int, num_ranks: int, size: int) -> None:
    rows = [row(n) for n in range(num_rows)]
    num_micro = math.ceil(math.ceil(num_rows / num_ranks) / size)
    shares = [
        list(micro_batches(rows, rank=rank, num_ranks=num_ranks, micro_batch_size=size, num_micro_batches=num_micro))
        for rank in range(num_ranks)
    ]
    assert {len(share) for share in shares} == {num_micro}
    assert all(1 <= len(part) <= size for share in shares for part, _ in share)
    assert Counter(r.id for share in shares for part, filling in share for r in part[: len(part) - filling]) == Counter(r.id for r in rows)
    for share in shares:
        for part, filling in share:
            batch = collate([s for r in part for s in r.sequences], T5, START, num_masked=filling)
            assert batch.token_counts()[0] == 2 * (len(part) - filling)
