"""The parts of the training loop: steps, the best model, the meter, and one step however it is split."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from data.batches import collate, deal, rounded, token_counts
from data.prompts import TextFormat
from data.rows import TrainRow, TrainSequence
from data.soft_labels import Sampled, TopK
from train.config import LossConfig, TrainingConfig
from train.keepers import InMemory, ModelFolders
from train.learner import Learner, LiveTeacher, tensors_of
from train.losses import Divergence
from train.meter import Meter
from train.throughput import Arithmetic
from train.trainer import Best, Criterion, TrainingRun
from train.world import World

FORM = TextFormat("decoder_only", eos_id=1, pad_id=0, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=16)
WORLD = World(0, 1, torch.device("cpu"))


def run(num_rows: int, **knobs: object) -> TrainingRun:
    rows = [TrainRow(f"row-{n}", (TrainSequence([5, 1], [6, 1], True),)) for n in range(num_rows)]
    return TrainingRun(rows, rows, FORM, TrainingConfig.model_validate(knobs), LossConfig(), 0, Path(), "train")


@pytest.mark.parametrize(("num_rows", "epochs", "steps"), [(10, 1.0, 3), (10, 2.0, 6), (10, 0.5, 2), (10, 0.01, 1), (8, 1.5, 3)])
def test_steps_are_counted_by_whole_batches(num_rows: int, epochs: float, steps: int) -> None:
    assert run(num_rows, batch_size=4, epochs=epochs).num_steps == steps


@pytest.mark.parametrize(
    ("exact_match", "loss", "improved"),
    [(0.6, 9.0, True), (0.5, 0.9, True), (0.5, 1.0, False), (0.5, 1.1, False), (0.4, 0.1, False), (0.5, math.nan, False)],
)
def test_the_best_has_most_matches_then_the_least_loss(exact_match: float, loss: float, improved: bool) -> None:
    assert Best(3, 0.5, 1.0).improved_by({"exact_match": exact_match, "loss": loss}, "exact_match") is improved


@pytest.mark.parametrize("criterion", ["exact_match", "loss"])
@pytest.mark.parametrize("loss", [3.0, math.inf, math.nan])
def test_the_first_validation_always_improves_on_nothing(loss: float, criterion: Criterion) -> None:
    assert Best().improved_by({"exact_match": 0.0, "loss": loss}, criterion)


@pytest.mark.parametrize(("loss", "improved"), [(0.9, True), (1.0, False), (1.1, False), (math.nan, False)])
def test_by_the_loss_exact_matches_do_not_count(loss: float, improved: bool) -> None:
    best = Best(3, 0.5, 1.0)
    assert [best.improved_by({"exact_match": exact, "loss": loss}, "loss") for exact in (0.1, 0.9)] == [improved, improved]
    assert best.figures("loss") == {"loss": 1.0}


# The meter


ARITHMETIC = Arithmetic(per_input_token=10.0, per_target_token=10.0, head=5.0, attention=2.0)


def metered(*losses: tuple[float, float, float], norm: float = 2.0, weights: tuple[float, float, float] = (0.5, 0.5, 0.0)) -> Meter:
    meter = Meter(WORLD, torch.tensor(weights), ARITHMETIC, 1e12)
    for number, values in enumerate(losses, start=17):
        counts = torch.tensor([2.0, 4.0, 1.0])
        sequences = [TrainSequence([5, 1], [6, 1], True)]
        meter.add(number, torch.tensor(values) * counts, counts, torch.tensor(norm), 0.1, sequences, [f"row-{n}" for n in range(9)])
    return meter


def test_the_meter_gives_the_mean_of_each_loss_and_their_weighted_sum() -> None:
    lines, stopping = metered((1.0, 3.0, 7.0), (2.0, 4.0, 7.0)).flush(False)
    assert [step for step, _ in lines] == [17, 18]
    first = lines[0][1]
    assert first == {"loss": 2.0, "loss_label": 1.0, "loss_rationale": 3.0, "learning_rate": pytest.approx(0.1), "gradient_norm": 2.0}
    assert set(lines[1][1]) - set(first) == {"tokens_per_second", "mfu", "memory_gib"}
    # 2 steps of 3 tokens that are read; operations by hand: (2 + 1) x 10 + 2 x 5 + 9 x 2 = 58.
    assert lines[1][1]["mfu"] / lines[1][1]["tokens_per_second"] == pytest.approx(58 / 3 / 1e12)
    assert not stopping
    assert metered((1.0, 3.0, 7.0)).flush(True)[1]


@pytest.mark.parametrize(("value", "name"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_a_loss_that_is_not_finite_names_step_parts_and_examples(value: float, name: str) -> None:
    meter = metered((1.0, 3.0, 0.0), (0.12345, value, 0.0), (math.nan, 1.0, 0.0))
    with pytest.raises(RuntimeError) as raised:
        meter.flush(False)
    assert str(raised.value) == (
        f"the loss is not finite at step 18 (label 0.1235, rationale {name}; norm of the gradient 2); nothing was updated from there on. "
        "The batch holds the examples row-0, row-1, row-2, row-3, row-4, row-5, row-6, row-7, .... Lower the learning rate or lengthen the "
        "warm-up, and run again from the last checkpoint"
    )


def test_a_gradient_that_is_not_finite_stops_it_too_and_a_loss_without_weight_does_not() -> None:
    with pytest.raises(RuntimeError, match=r"the gradient is not finite at step 17 \(label 1, rationale 3; norm of the gradient inf\)"):
        metered((1.0, 3.0, 0.0), norm=math.inf).flush(False)
    assert metered((1.0, 3.0, math.nan)).flush(False)[0][0][1]["loss"] == 2.0


def test_operations_of_a_model_are_counted_from_its_matrices() -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=4
    )
    for tied in (True, False):
        config.tie_word_embeddings = tied
        found = Arithmetic.of(LlamaForCausalLM(config))
        layer = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24
        assert found == Arithmetic(6.0 * 3 * layer, 6.0 * 3 * layer, 6.0 * 40 * 16, 6.0 * 3 * 16)


# Keepers


def test_folders_keep_the_best_and_become_the_model(tmp_path: Path) -> None:
    def export(weights: dict[str, Tensor], folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "weights").write_text(str(float(weights["w"])))

    keeper = ModelFolders(tmp_path, WORLD, export)
    for step in (3, 6):
        keeper.keep(step, lambda step=step: {"w": torch.tensor(float(step))})
    keeper.settle(6)
    assert [path.name for path in tmp_path.iterdir()] == ["model-6"]
    (tmp_path / "state").mkdir()
    keeper.finish(6)
    assert (tmp_path / "model" / "weights").read_text() == "6.0"
    assert not (tmp_path / "state").exists()


def test_a_model_that_cannot_be_written_stops_the_training(tmp_path: Path) -> None:
    def export(weights: dict[str, Tensor], folder: Path) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        ModelFolders(tmp_path, WORLD, export).keep(3, dict)


def test_memory_keeps_the_last_best() -> None:
    keeper = InMemory()
    keeper.keep(1, lambda: {"w": torch.tensor(1.0)})
    keeper.keep(2, lambda: {"w": torch.tensor(2.0)})
    keeper.settle(2)
    assert float(keeper.best["w"]) == 2.0


# One step


SOFT = TopK(np.array([[6, 1], [1, 6]], np.int32), np.log(np.array([[0.75, 0.125], [0.5, 0.25]], np.float32)), np.zeros(2, np.float32))
DRAWN = Sampled(
    np.array([6, 1, 6], np.int32), np.array([4, 1, 3], np.int32), np.array([1, 2], np.int32), np.zeros(2, np.float32), 4, temperature=2.0
)


def sequences_with(kind: str) -> list[TrainSequence]:
    """Of 11 rows, of unequal lengths; some have no soft part."""
    draw = np.random.default_rng(5)
    made = []
    for n in range(11):
        label = TrainSequence([5, *draw.integers(2, 12, n % 3).tolist()], [*draw.integers(2, 12, size=1 + n % 4).tolist(), 1], True)
        made.append(label)
        if n % 3 and kind == "answers":
            share = float(draw.uniform(0.1, 0.9))
            made += [
                dataclasses.replace(label, is_label=False, weight=weight, target_ids=[*draw.integers(2, 12, size=n % 5).tolist(), 1])
                for weight in (share, 1 - share)
            ]
        elif n % 3 and kind != "live":
            made[-1] = dataclasses.replace(label, soft=SOFT if kind == "top_k" else DRAWN)
        if n % 2:
            made.append(TrainSequence([5, 1], [*draw.integers(2, 12, size=n).tolist(), 1], False))
    return made


def tiny(seed: int) -> LlamaForCausalLM:
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, bos_token_id=None, eos_token_id=1)).eval()


STUDENT = tiny(0)


def step(kind: str, num_ranks: int, max_tokens: int, packed: bool, filled: bool = False) -> tuple[list[float], list[Tensor]]:
    """One optimizer step's losses and gradient, as the trainer makes them: sums of all ranks' micro-batches over global counts."""
    sequences, soft = sequences_with(kind), "live" if kind == "live" else "stored"
    live = LiveTeacher(tiny(1)) if kind == "live" else None
    learner = Learner(STUDENT, divergence=Divergence("forward_kl"), live=live)
    STUDENT.zero_grad()
    counts = token_counts(sequences, soft).float()
    scale, sums = torch.tensor([0.5, 0.3, 0.7]) / counts, torch.zeros(3)
    with learner.packed() if packed else nullcontext():
        for share in deal(sequences, num_ranks=num_ranks, max_tokens=max_tokens, packed=packed):
            for part, filling in share:
                batch = collate(part, FORM, 0, packed=packed, num_masked=filling, soft=soft)
                total, found = learner(scale, **tensors_of(rounded(batch) if filled else batch))
                total.backward()
                sums += found
    learner.release()
    return (sums / counts).tolist(), [p.grad.clone() for p in STUDENT.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["top_k", "sampled", "answers", "live"])
def test_one_big_batch_equals_any_split_over_ranks_accumulation_and_packing(kind: str) -> None:
    losses, gradient = step(kind, 1, 10**6, packed=False)
    assert min(losses) > 1e-4
    for num_ranks, max_tokens, packed in [
        (1, 10**6, True),
        (1, 20, True),
        (1, 40, False),
        (2, 30, True),
        (3, 1, True),
        (2, 25, False),
        (40, 99, True),
    ]:
        split_losses, split_gradient = step(kind, num_ranks, max_tokens, packed)
        assert split_losses == pytest.approx(losses, abs=1e-5)
        for mine, whole in zip(split_gradient, gradient, strict=True):
            torch.testing.assert_close(mine, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["top_k", "sampled", "answers", "live"])
def test_what_fills_a_batch_up_to_a_size_counts_nowhere(kind: str) -> None:
    losses, gradient = step(kind, 1, 10**6, packed=True)
    filled_losses, filled_gradient = step(kind, 1, 10**6, packed=True, filled=True)
    assert filled_losses == pytest.approx(losses, abs=1e-5)
    for mine, whole in zip(filled_gradient, gradient, strict=True):
        torch.testing.assert_close(mine, whole, rtol=0, atol=1e-5)


def test_filled_batches_have_few_sizes() -> None:
    shapes = set()
    for count in range(1, len(sequences := sequences_with("sampled"))):
        batch = rounded(collate(sequences[:count], FORM, 0, packed=True))
        assert batch.starts is not None
        assert int(batch.starts[-1]) == batch.input_ids.shape[1]
        shapes.add((tuple(batch.input_ids.shape), len(batch.starts), len(batch.targets), tuple(batch.soft_ids.shape)))
    assert shapes <= {((1, 512), 33, 2048, (1024, 16)), ((1, 512), 33, 1024, (0, 1))}


def test_a_batch_of_a_whole_size_is_not_filled() -> None:
    batch = collate([TrainSequence([3] * 15, [4, 1], True)] * 32, FORM, 0, packed=True)
    assert rounded(batch).input_ids.shape == batch.input_ids.shape == (1, 512)
    assert rounded(batch).num_sequences == 64
