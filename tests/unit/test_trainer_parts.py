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
from data.soft_labels import TopK
from train.config import LossConfig, TrainingConfig
from train.engine import World
from train.losses import cross_entropy_sum, top_k_forward_kl_sum
from train.trainer import Best, TrainingRun, _finite, loss_sums

FORM = TextFormat("encoder_decoder", eos_id=1, pad_id=0, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=16)


def run(num_rows: int, **knobs: object) -> TrainingRun:
    rows = [TrainRow(f"row-{n}", (TrainSequence([5, 1], [6, 1], True),)) for n in range(num_rows)]
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
