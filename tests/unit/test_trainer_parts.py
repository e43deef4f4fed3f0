from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import collate, micro_batches
from data.prompts import TextFormat
from data.rows import TrainRow, TrainSequence
from data.soft_labels import Sampled, TopK
from train.config import LossConfig, TrainingConfig
from train.engine import World
from train.losses import cross_entropy_sum, sampled_forward_kl_sum, top_k_forward_kl_sum
from train.trainer import Best, TrainingRun, _finite, loss_sums

FORM = TextFormat("encoder_decoder", eos_id=1, pad_id=0, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=16)


def run(num_rows: int, num_sequences: int = 1, **knobs: object) -> TrainingRun:
    rows = [TrainRow(f"row-{n}", (TrainSequence([5, 1], [6, 1], True),) * (num_sequences if n else 1)) for n in range(num_rows)]
    return TrainingRun(rows, rows, FORM, TrainingConfig.model_validate(knobs), LossConfig(), 0, Path(), "train")


def world(size: int = 1, device: str = "cpu", rank: int = 0) -> World:
    return World(rank, size, torch.device(device))


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "micro", "size", "device", "expected"),
    [
        (1000, 64, "auto", 1, "cpu", (64, 1)),
        (1000, 64, "auto", 1, "cuda", (32, 2)),
        (1000, 64, "auto", 4, "cuda", (16, 1)),
        (1000, 65, "auto", 2, "cpu", (33, 1)),
        (1000, 64, 8, 2, "cpu", (8, 4)),
        (1000, 64, 10, 2, "cuda", (10, 4)),
        (1000, 64, 100, 2, "cpu", (32, 1)),
        (10, 64, "auto", 1, "cuda", (10, 1)),
        (3, 64, "auto", 8, "cpu", (1, 1)),
    ],
)
def test_micro_batches_share_a_step_evenly(
    num_rows: int, batch_size: int, micro: int | str, size: int, device: str, expected: tuple[int, int]
) -> None:
    assert run(num_rows, batch_size=batch_size, micro_batch_size=micro).micro_batching(world(size, device)) == expected


@pytest.mark.parametrize(
    ("num_sequences", "micro", "device", "expected"),
    [
        (2, "auto", "cuda", (32, 2)),
        (7, "auto", "cuda", (9, 8)),
        (7, "auto", "cpu", (18, 4)),
        (500, "auto", "cuda", (1, 64)),
        (7, 16, "cuda", (16, 4)),
    ],
)
def test_rows_of_many_answers_make_smaller_micro_batches(
    num_sequences: int, micro: int | str, device: str, expected: tuple[int, int]
) -> None:
    wide = run(100, num_sequences, batch_size=64, micro_batch_size=micro)
    assert wide.micro_batching(world(1, device)) == expected


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.one_of(st.just("auto"), st.integers(1, 9)), st.integers(1, 5))
def test_every_row_of_an_epoch_is_trained_once_whatever_the_processes(
    num_rows: int, batch_size: int, micro: int | str, num_ranks: int
) -> None:
    given_run = run(num_rows, batch_size=batch_size, micro_batch_size=micro)
    size, num_micro = given_run.micro_batching(world(num_ranks))
    seen: Counter[str] = Counter()
    for step in range(given_run.order.steps_per_epoch):
        rows = [given_run.rows[n] for n in given_run.order.rows_of(step)]
        for rank in range(num_ranks):
            shares = list(micro_batches(rows, rank=rank, num_ranks=num_ranks, micro_batch_size=size, num_micro_batches=num_micro))
            assert len(shares) == num_micro
            seen.update(row.id for part, filling in shares for row in part[: len(part) - filling])
    assert seen == Counter(row.id for row in given_run.rows)


@pytest.mark.parametrize(("num_rows", "epochs", "steps"), [(10, 1.0, 3), (10, 2.0, 6), (10, 0.5, 2), (10, 0.01, 1), (8, 1.5, 3)])
def test_steps_are_counted_by_whole_batches(num_rows: int, epochs: float, steps: int) -> None:
    assert run(num_rows, batch_size=4, epochs=epochs).num_steps == steps


@pytest.mark.parametrize(
    ("exact_match", "loss", "improved"),
    [(0.6, 9.0, True), (0.5, 0.9, True), (0.5, 1.0, False), (0.5, 1.1, False), (0.4, 0.1, False), (0.5, math.nan, False)],
)
def test_the_best_has_most_matches_then_the_least_loss(exact_match: float, loss: float, improved: bool) -> None:
    assert Best(3, 0.5, 1.0).improved_by({"exact_match": exact_match, "loss": loss}) is improved


@pytest.mark.parametrize("loss", [3.0, math.inf, math.nan])
def test_the_first_validation_always_improves_on_nothing(loss: float) -> None:
    assert Best().improved_by({"exact_match": 0.0, "loss": loss})


def test_finite_losses_pass() -> None:
    losses = torch.tensor([1.0, 0.0, 2.0])
    assert _finite(losses, 1, run(2).rows) is losses


@pytest.mark.parametrize(("value", "name"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_a_loss_that_is_not_finite_names_step_parts_and_examples(value: float, name: str) -> None:
    with pytest.raises(RuntimeError) as raised:
        _finite(torch.tensor([0.12345, value, 0.0]), 17, run(3).rows)
    assert str(raised.value) == (
        f"the loss is not finite at step 17 (label 0.1235, rationale {name}, soft 0); nothing was updated. The batch holds the examples "
        "row-0, row-1, row-2. Lower the learning rate or lengthen the warm-up, and run again from the last checkpoint"
    )
    with pytest.raises(RuntimeError, match=r"row-6, row-7, \.\.\.\. Lower"):
        _finite(torch.tensor([value, 0.0, 0.0]), 17, run(9).rows)


SOFT = TopK(np.array([[6, 1], [1, 6]], np.int32), np.log(np.array([[0.75, 0.125], [0.5, 0.25]], np.float32)), np.zeros(2, np.float32))
SEQUENCES = [TrainSequence([5, 1], [6, 1], True, SOFT), TrainSequence([5, 1], [7, 8, 1], False), TrainSequence([4, 1], [9, 1], True)]


def test_the_three_losses_of_a_batch() -> None:
    batch = collate(SEQUENCES, FORM, 0)
    logits = torch.randn(3, 3, 10, generator=torch.Generator().manual_seed(0))
    log_probs = logits.log_softmax(-1)
    label = -(log_probs[0, 0, 6] + log_probs[0, 1, 1] + log_probs[2, 0, 9] + log_probs[2, 1, 1])
    rationale = -(log_probs[1, 0, 7] + log_probs[1, 1, 8] + log_probs[1, 2, 1])
    soft = top_k_forward_kl_sum(logits, torch.tensor([0, 1]), torch.from_numpy(SOFT.ids).long(), torch.from_numpy(SOFT.log_probs))
    torch.testing.assert_close(loss_sums(logits, batch), torch.stack([label, rationale, soft]))


def test_a_batch_that_only_fills_has_no_loss_but_a_gradient() -> None:
    batch = collate(SEQUENCES, FORM, 0, num_masked=3)
    logits = torch.randn(3, 3, 10).requires_grad_()
    sums = loss_sums(logits, batch)
    assert sums.tolist() == [0.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(sums.sum(), logits)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_losses_of_micro_batches_add_up_to_those_of_the_step() -> None:
    # The model's logits at a token stand here for a function of the token alone.
    table = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))

    def sums(sequences: list[TrainSequence]) -> torch.Tensor:
        batch = collate(sequences, FORM, 0)
        assert batch.decoder_input_ids is not None
        return loss_sums(table[batch.decoder_input_ids], batch)

    torch.testing.assert_close(sums(SEQUENCES), sum((sums([s]) for s in SEQUENCES), torch.zeros(3)))
    alone = collate([dataclasses.replace(SEQUENCES[1])], FORM, 0)
    assert alone.decoder_input_ids is not None
    rationale = cross_entropy_sum(table[alone.decoder_input_ids], alone.targets, alone.rationale_mask)
    torch.testing.assert_close(sums(SEQUENCES)[1], rationale)


DRAWN = Sampled(
    np.array([6, 1, 6], np.int32), np.array([4, 1, 3], np.int32), np.array([1, 2], np.int32), np.zeros(2, np.float32), 4, temperature=2.0
)
ANSWERS = (TrainSequence([5, 1], [6, 1], False, weight=0.75), TrainSequence([5, 1], [7, 8, 1], False, weight=0.25))


def test_the_soft_loss_of_draws_is_at_their_temperature() -> None:
    batch = collate([dataclasses.replace(SEQUENCES[0], soft=DRAWN), *SEQUENCES[1:]], FORM, 0)
    logits = torch.randn(3, 3, 10, generator=torch.Generator().manual_seed(0))
    ids, log_probs = torch.tensor([[6, 0], [1, 6]]), torch.tensor([[1.0, 0.0], [0.25, 0.75]]).log()
    soft = sampled_forward_kl_sum(logits, torch.tensor([0, 1]), ids, log_probs, 2.0)
    torch.testing.assert_close(loss_sums(logits, batch)[2], soft)


def test_the_soft_loss_of_answers_by_hand() -> None:
    # Each token of the first answer has 1/2, each of the second 1/4: (0.75 x 2 ln 2 + 0.25 x 3 ln 4) / (0.75 x 2 + 0.25 x 3).
    batch = collate(ANSWERS, FORM, 0)
    logits = torch.zeros(2, 3, 10)
    logits[0, :2] = torch.tensor([0.0, 0.5, 0, 0, 0, 0, 0.5, 0, 0, 0]).log()
    logits[1] = torch.tensor([0.0, 0.25, 0, 0, 0, 0, 0, 0.25, 0.25, 0.25]).log()
    sums = loss_sums(logits, batch)
    assert sums.tolist() == pytest.approx([0, 0, 2.079442], abs=1e-6)
    assert batch.token_counts().tolist() == [0, 0, 2.25]
    assert float(sums[2] / batch.token_counts()[2]) == pytest.approx(0.924196, abs=1e-6)


def test_one_certain_answer_teaches_what_its_label_does() -> None:
    label = SEQUENCES[2]
    batch = collate([label, dataclasses.replace(label, is_label=False, weight=1.0)], FORM, 0)
    sums = loss_sums(torch.randn(1, 2, 10, generator=torch.Generator().manual_seed(0)).expand(2, 2, 10), batch)
    assert float(sums[2]) == pytest.approx(float(sums[0]), rel=1e-6)
    assert float(sums[0]) > 0
    assert batch.token_counts().tolist() == [2, 0, 2]


def rows_with(kind: str) -> list[TrainRow]:
    """11 rows of unequal lengths; some have no soft part."""
    draw = np.random.default_rng(5)
    made = []
    for n in range(11):
        label = TrainSequence([5, 1], [*draw.integers(2, 12, size=1 + n % 4).tolist(), 1], True)
        sequences = [label]
        if n % 3 and kind == "answers":
            share = float(draw.uniform(0.1, 0.9))
            sequences += [
                dataclasses.replace(label, is_label=False, weight=weight, target_ids=[*draw.integers(2, 12, size=n % 5).tolist(), 1])
                for weight in (share, 1 - share)
            ]
        elif n % 3:
            sequences[0] = dataclasses.replace(label, soft=SOFT if kind == "top_k" else DRAWN)
        if n % 2:
            sequences.append(TrainSequence([5, 1], [*draw.integers(2, 12, size=n).tolist(), 1], False))
        made.append(TrainRow(f"row-{n}", tuple(sequences)))
    return made


def step(table: torch.Tensor, rows: list[TrainRow], num_ranks: int, size: int) -> tuple[list[float], torch.Tensor]:
    """One optimizer step's losses and gradient, as the trainer makes them: sums of all ranks' micro-batches over global counts."""
    table = table.clone().requires_grad_()
    num_micro = math.ceil(math.ceil(len(rows) / num_ranks) / size)
    batches = []
    for rank in range(num_ranks):
        for part, filling in micro_batches(rows, rank=rank, num_ranks=num_ranks, micro_batch_size=size, num_micro_batches=num_micro):
            sequences = [s for row in part for s in row.sequences]
            batches.append(collate(sequences, FORM, 0, num_masked=len(sequences) if filling else 0))
    counts = torch.stack([batch.token_counts() for batch in batches]).sum(dim=0).clamp(min=1)
    total = torch.zeros(3)
    for batch in batches:
        assert batch.decoder_input_ids is not None
        sums = loss_sums(table[batch.decoder_input_ids], batch)
        ((torch.tensor([0.5, 0.3, 0.7]) * sums / counts.to(sums)).sum()).backward()
        total += sums.detach()
    assert table.grad is not None
    return (total.double() / counts).tolist(), table.grad


@pytest.mark.parametrize("kind", ["top_k", "sampled", "answers"])
def test_one_big_batch_equals_any_split_over_ranks_and_accumulation(kind: str) -> None:
    table, rows = torch.randn(12, 12, generator=torch.Generator().manual_seed(1)), rows_with(kind)
    losses, gradient = step(table, rows, 1, len(rows))
    assert min(losses) > 0.1
    for num_ranks, size in [(1, 1), (1, 4), (2, 6), (2, 3), (3, 2), (4, 1), (5, 9)]:
        split_losses, split_gradient = step(table, rows, num_ranks, size)
        assert split_losses == pytest.approx(losses, abs=1e-5)
        torch.testing.assert_close(split_gradient, gradient, rtol=0, atol=1e-5)
