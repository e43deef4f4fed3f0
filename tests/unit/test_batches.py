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

from data.batches import Order, Share, StudentBatch, collate, deal, token_counts
from data.prompts import TextFormat
from data.rows import TrainSequence
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
PLAIN = [dataclasses.replace(s, input_ids=s.input_ids[:-1]) for s in SEQUENCES]
"""As a decoder-only model reads them."""
FORMS = {"t5": (T5, False), "llama, padded": (LLAMA, False), "llama, packed": (LLAMA, True)}
forms = pytest.mark.parametrize(("form", "packed"), FORMS.values(), ids=FORMS)


def test_an_encoder_decoder_batch_by_hand() -> None:
    batch = collate(SEQUENCES, T5, START, packed=False)
    assert batch.input_ids.tolist() == [[11, 12, 13, EOS], [14, EOS, PAD, PAD]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.decoder_input_ids is not None
    assert batch.decoder_input_ids.tolist() == [[START, 21, PAD, PAD], [START, 22, 23, 24]]
    assert batch.at.tolist() == [0, 1, 4, 5, 6, 7]
    assert batch.targets.tolist() == [21, EOS, 22, 23, 24, EOS]
    assert batch.parts.tolist() == [0, 0, 1, 1, 1, 1]
    assert batch.weights.tolist() == [1] * 6
    assert batch.sequence.tolist() == [0, 0, 1, 1, 1, 1]
    assert batch.soft_rows.tolist() == [0, 1, 2, 3, 4]
    assert batch.soft_ids.tolist() == [[50, 51], [52, 53], [60, 61], [62, 63], [64, 65]]
    torch.testing.assert_close(batch.soft_log_probs, -batch.soft_ids.float() / 100)
    assert (batch.num_sequences, batch.num_computed_tokens, batch.longest) == (2, 16, 4)
    assert token_counts(SEQUENCES).tolist() == [2, 4, 5]


def test_a_padded_decoder_only_batch_by_hand() -> None:
    batch = collate(PLAIN, LLAMA, START, packed=False)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21], [14, 22, 23, 24]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1] * 4, [1] * 4]
    assert batch.decoder_input_ids is None
    # The state at the input's last token predicts the target's first.
    assert batch.at.tolist() == [2, 3, 4, 5, 6, 7]
    assert batch.targets.tolist() == [21, EOS, 22, 23, 24, EOS]
    assert batch.soft_rows.tolist() == [0, 1, 2, 3, 4]


def test_a_packed_batch_by_hand() -> None:
    batch = collate([PLAIN[0], TrainSequence([15], [25, EOS], True), PLAIN[1]], LLAMA, START, packed=True)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 15, 25, 14, 22, 23, 24]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3]]
    assert batch.starts is not None
    assert batch.starts.tolist() == [0, 4, 6, 10]
    assert batch.attention_mask is None
    assert batch.at.tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert batch.targets.tolist() == [21, EOS, 25, EOS, 22, 23, 24, EOS]
    assert batch.soft_rows.tolist() == [0, 1, 4, 5, 6]
    assert (batch.num_sequences, batch.num_computed_tokens, batch.longest) == (3, 10, 4)


def test_the_end_of_a_sequence_is_learnt_where_it_is_also_the_padding() -> None:
    long = TrainSequence([11, 12, 13, 14], [21, 22, EOS], True)
    short = TrainSequence([EOS, 15], [23, EOS], True)  # opens with the same token too, as where bos = eos = pad
    batch = collate([long, short], LLAMA, START, packed=False)
    assert batch.input_ids[1].tolist() == [EOS, 15, 23, EOS, EOS, EOS]
    assert batch.attention_mask is not None
    assert batch.attention_mask[1].tolist() == [1, 1, 1, 0, 0, 0]
    assert batch.targets[batch.sequence == 1].tolist() == [23, EOS]


def test_sequences_without_soft_labels_have_an_empty_place_for_them() -> None:
    bare = [dataclasses.replace(s, soft=None) for s in SEQUENCES]
    batch = collate(bare, T5, START, packed=False)
    assert (tuple(batch.soft_rows.shape), batch.soft_ids.shape[0], batch.soft_log_probs.shape[0]) == ((0,), 0, 0)
    assert token_counts(bare).tolist() == [2, 4, 0]


def test_soft_labels_of_no_token_do_not_disturb_the_others() -> None:
    nothing = TopK(np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32), np.zeros(0, np.float32))
    batch = collate([dataclasses.replace(SEQUENCES[0], soft=nothing), SEQUENCES[1]], T5, START, packed=False)
    assert batch.soft_rows.tolist() == [2, 3, 4]
    assert len(collate([dataclasses.replace(SEQUENCES[0], soft=nothing)], T5, START, packed=False).soft_rows) == 0


@forms
def test_a_live_teacher_scores_every_target_of_labels_and_rationales(form: TextFormat, packed: bool) -> None:
    sequences = [PLAIN[0], *ANSWERS, PLAIN[1], PLAIN[0]]
    batch = collate(sequences, form, START, packed=packed, num_masked=1, soft="live")
    assert batch.soft_rows.tolist() == [0, 1, 7, 8, 9, 10]
    assert batch.soft_ids.shape == (6, 0)
    assert token_counts(sequences[:-1], "live").tolist() == [2, 4, 6]


@forms
@pytest.mark.parametrize(("num_masked", "weights", "scored"), [(0, [1] * 6, 5), (1, [1, 1, 0, 0, 0, 0], 2), (2, [0] * 6, 0)])
def test_sequences_that_only_fill_a_batch_count_in_no_loss(
    form: TextFormat, packed: bool, num_masked: int, weights: list[int], scored: int
) -> None:
    batch = collate(PLAIN, form, START, packed=packed, num_masked=num_masked)
    assert batch.weights.tolist() == weights
    assert len(batch.soft_rows) == scored
    assert batch.num_sequences == 2


@forms
def test_a_batch_moves_whole(form: TextFormat, packed: bool) -> None:
    moved = collate(SEQUENCES, form, START, packed=packed).to(torch.device("meta"))
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
    batch = collate([first, second], T5, START, packed=False)
    assert batch.soft_rows.tolist() == [0, 1, 2]
    assert batch.soft_ids.tolist() == [[50, 0, 0], [51, 52, 53], [60, 61, 0]]
    torch.testing.assert_close(batch.soft_log_probs.exp(), torch.tensor([[1, 0, 0], [0.25, 0.5, 0.25], [0.5, 0.5, 0]]))
    assert batch.soft_log_probs[0].tolist() == [0, -math.inf, -math.inf]
    assert batch.soft_temperature == 2.0
    assert token_counts([first, second]).tolist() == [2, 4, 3]
    assert batch.to(torch.device("cpu")).soft_temperature == 2.0
    assert collate(SEQUENCES, T5, START, packed=False).soft_temperature is None


@pytest.mark.parametrize("other", [soft(1), drawn([[4]], temperature=1.0)])
def test_a_batch_holds_one_kind_of_soft_labels(other: SoftLabels) -> None:
    mixed = [dataclasses.replace(SEQUENCES[0], soft=drawn([[4]])), dataclasses.replace(SEQUENCES[1], soft=other)]
    with pytest.raises(AssertionError):
        collate(mixed, T5, START, packed=False)


ANSWERS = [TrainSequence([11, EOS], [21, EOS], False, weight=0.75), TrainSequence([11, EOS], [22, 23, EOS], False, weight=0.25)]


@forms
def test_answers_by_hand(form: TextFormat, packed: bool) -> None:
    sequences = [SEQUENCES[0], *ANSWERS]
    batch = collate(sequences, form, START, packed=packed)
    assert batch.parts.tolist() == [0, 0, 2, 2, 2, 2, 2]
    assert batch.weights.tolist() == [1, 1, 0.75, 0.75, 0.25, 0.25, 0.25]
    assert batch.targets[batch.parts == 2].tolist() == [21, EOS, 22, 23, EOS]
    # Two tokens with a distribution (the label's), 2 x 0.75 and 3 x 0.25 of answers.
    assert token_counts(sequences).tolist() == [2, 0, 2 + 2.25]


def test_weights_are_counted_in_float64() -> None:
    many = [dataclasses.replace(ANSWERS[0], weight=weight) for weight in [1.0, *[1e-3] * 300]]
    assert float(token_counts(many)[2]) == pytest.approx(2.6, rel=1e-14)


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
@given(st.lists(targets, min_size=1, max_size=6), st.sampled_from(list(FORMS.values())), st.data())
def test_every_target_token_stands_once_behind_the_tokens_that_predict_it(
    rows: list[TrainSequence], how: tuple[TextFormat, bool], data: st.DataObject
) -> None:
    form, packed = how
    num_masked = data.draw(st.integers(0, len(rows)))
    batch = collate(rows, form, START, packed=packed, num_masked=num_masked)
    read = (batch.input_ids if batch.decoder_input_ids is None else batch.decoder_input_ids).flatten()
    for n, row in enumerate(rows):
        mine = batch.sequence == n
        assert batch.targets[mine].tolist() == row.target_ids
        before = [row.input_ids[-1] if form is LLAMA else START, *row.target_ids[:-1]]
        assert read[batch.at[mine]].tolist() == before
        assert set(batch.parts[mine].tolist()) == {0 if row.is_label else 1 if row.weight is None else 2}
        weight = (row.weight or 1.0) if n < len(rows) - num_masked else 0.0
        assert batch.weights[mine].tolist() == pytest.approx([weight] * len(row.target_ids))
    counts = token_counts(rows[: len(rows) - num_masked])
    for part in range(3):
        assert float(batch.weights[batch.parts == part].sum()) == pytest.approx(float(counts[part]), rel=1e-6)


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
def losses_of(rows: list[TrainSequence], form: TextFormat) -> list[float]:
    """Cross-entropy of each sequence's own targets, in one padded batch."""
    batch = collate(rows, form, START, packed=False)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.decoder_input_ids is not None:
        inputs["decoder_input_ids"] = batch.decoder_input_ids
    logits: Tensor = MODELS[form.family](**inputs, use_cache=False).logits.flatten(0, 1)[batch.at]
    found = F.cross_entropy(logits, batch.targets, reduction="none")
    return [float(found[batch.sequence == n].sum()) for n in range(len(rows))]


@settings(max_examples=30, deadline=None)
@given(st.lists(sequences, min_size=2, max_size=5), st.sampled_from([T5, LLAMA]))
def test_a_sequence_costs_the_same_alone_and_in_a_padded_batch(rows: list[TrainSequence], form: TextFormat) -> None:
    alone = [losses_of([row], form)[0] for row in rows]
    assert losses_of(rows, form) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("form", [T5, LLAMA], ids=["t5", "llama"])
def test_the_loss_of_a_sequence_is_what_transformers_computes_from_labels(form: TextFormat) -> None:
    row = TrainSequence([5, 6, 8], [9, 10, EOS], True)
    if form is T5:
        inputs, labels = row.input_ids, row.target_ids
    else:
        inputs, labels = row.input_ids + row.target_ids, [-100, -100, -100, *row.target_ids]
    with torch.no_grad():
        reference = MODELS[form.family](input_ids=torch.tensor([inputs]), labels=torch.tensor([labels])).loss
    assert losses_of([row], form)[0] / 3 == pytest.approx(float(reference), rel=1e-5)


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


# Dealing


def sequence(num_input: int, num_target: int = 2) -> TrainSequence:
    return TrainSequence([3] * num_input, [4] * num_target, True)


def lengths(shares: list[list[Share]]) -> list[list[tuple[list[int], int]]]:
    return [[([len(s.input_ids) for s in part], filling) for part, filling in share] for share in shares]


def test_packed_sequences_are_dealt_so_that_tokens_are_even() -> None:
    dealt = deal([sequence(n) for n in (9, 1, 4, 6, 5)], num_ranks=2, max_tokens=100, packed=True)
    # 10 and 6, 7 and 5, and 2 go where the sum is least: 10 + 5, then 7 + 6, then 2 to those 13.
    assert lengths(dealt) == [[([9, 4], 0)], [([1, 6, 5], 0)]]


def test_a_budget_of_tokens_makes_more_forwards_and_a_long_sequence_goes_alone() -> None:
    dealt = deal([sequence(n) for n in (9, 1, 4, 6, 5)], num_ranks=1, max_tokens=9, packed=True)
    assert lengths(dealt) == [[([9], 0), ([6], 0), ([5], 0), ([1, 4], 0)]]


def test_where_sequences_run_out_one_fills_in() -> None:
    dealt = deal([sequence(3), sequence(5)], num_ranks=3, max_tokens=100, packed=True)
    assert lengths(dealt) == [[([5], 0)], [([3], 0)], [([3], 1)]]


def test_padded_sequences_of_like_length_go_together() -> None:
    many = [sequence(n) for n in (500, 2, 3, 490, 3, 480) for _ in range(20)]
    (share,) = deal(many, num_ranks=1, max_tokens=10**6, packed=False)
    assert len(share) > 1
    assert all(min(sizes) >= 480 or max(sizes) <= 3 for part, _ in share if (sizes := [len(s.input_ids) for s in part]))


def test_a_few_tokens_of_padding_are_not_worth_a_forward() -> None:
    dealt = deal([sequence(n) for n in (5, 2, 3)], num_ranks=1, max_tokens=100, packed=False)
    assert lengths(dealt) == [[([5, 3, 2], 0)]]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(1, 60),
    st.booleans(),
)
def test_every_sequence_is_dealt_once_in_as_many_forwards_on_every_rank(
    sizes: list[tuple[int, int]], num_ranks: int, max_tokens: int, packed: bool
) -> None:
    given_sequences = [TrainSequence([n + 3] * size[0], [4] * size[1], True) for n, size in enumerate(sizes)]
    dealt = deal(given_sequences, num_ranks=num_ranks, max_tokens=max_tokens, packed=packed)
    assert len(dealt) == num_ranks
    assert len({len(share) for share in dealt}) == 1
    seen = Counter(s.input_ids[0] for share in dealt for part, filling in share for s in part[: len(part) - filling])
    assert seen == Counter(n + 3 for n in range(len(sizes)))
    for share in dealt:
        for part, filling in share:
            batch = collate(part, LLAMA if packed else T5, START, packed=packed, num_masked=filling)
            assert len(part) == 1 or batch.num_computed_tokens <= max_tokens
            assert filling in (0, len(part))
