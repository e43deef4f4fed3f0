"""`train` on tiny models in one process: when it stops, what it has learnt by then, and how it goes on."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from data.prompts import TextFormat
from data.rows import TrainRow, TrainSequence
from data.soft_labels import TopK
from train.config import LossConfig, StudentPruneConfig, TrackingConfig, TrainingConfig
from train.keepers import Gather, InMemory
from train.pruning.gradual import weight_schedule
from train.signals import Stopped
from train.tracking import Tracker, read_log
from train.trainer import Trained, TrainingRun, train
from train.world import World

WORLD = World(0, 1, torch.device("cpu"))
LIMITS = {"eos_id": 1, "pad_id": 0, "max_input_tokens": 64, "max_label_tokens": 8, "max_rationale_tokens": 16}
VOCABULARY = 24
DROPOUT = 0.2
Families = pytest.mark.parametrize("family", ["decoder_only", "encoder_decoder"])


def tiny(family: str = "decoder_only") -> PreTrainedModel:
    """The same weights each time; the decoder-only one packs, the other one pads, and both have dropout."""
    special = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "encoder_decoder":
            sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
            return T5ForConditionalGeneration(T5Config(**sizes, **special, decoder_start_token_id=0, dropout_rate=DROPOUT))
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(**sizes, **special, attention_dropout=DROPOUT))


def rows(name: str, seed: int, count: int) -> list[TrainRow]:
    """Labels of up to 3 tokens after prompts of up to 8, and a rationale for every second row."""
    draw = np.random.default_rng(seed)
    made = []
    for n in range(count):
        prompt = [5, *draw.integers(2, VOCABULARY, n % 8).tolist()]
        sequences = [TrainSequence(prompt, [*draw.integers(2, VOCABULARY, n % 3).tolist(), 1], True)]
        if n % 2:
            sequences.append(TrainSequence(prompt, [*draw.integers(2, VOCABULARY, n % 7).tolist(), 1], False))
        made.append(TrainRow(f"{name}-{n}", tuple(sequences)))
    return made


def run(folder: Path, family: str = "decoder_only", **knobs: Any) -> TrainingRun:
    """6 steps an epoch."""
    form = TextFormat(family, **LIMITS)  # type: ignore[arg-type]
    config = {"batch_size": 4, "micro_batch_tokens": 24, "learning_rate": 1e-2, "log_every": 1, "epochs": 2, **knobs}
    return TrainingRun(
        rows("train", 1, 24), rows("validation", 2, 6), form, TrainingConfig.model_validate(config), LossConfig(), 3, folder, "train"
    )


class KeepsEach(InMemory):
    """And all before the best."""

    def __init__(self) -> None:
        super().__init__()
        self.each: dict[int, dict[str, Tensor]] = {}

    def keep(self, step: int, gather: Gather) -> None:
        super().keep(step, gather)
        self.each[step] = self.best


class Noting(Tracker):
    """Calls `at` with every step it is told of."""

    at: Callable[[int], None] | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        super().log(step, values)
        if self.at is not None:
            self.at(step)


def trained(model: PreTrainedModel, given: TrainingRun, at: Callable[[int], None] | None = None, keeper: InMemory | None = None) -> Trained:
    def tracker(step: int) -> Tracker:
        off = TrackingConfig(wandb="disabled")
        opened = Noting(given.folder, off, group="test", job_type="train", settings={}, enabled=True, from_step=step)
        opened.at = at
        return opened

    given.folder.mkdir(exist_ok=True)
    return train(model, given, WORLD, tracker, keeper or InMemory())


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def log_of(given: TrainingRun) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "memory_gib")} for line in read_log(given.folder / "log.jsonl")
    ]


def validations(given: TrainingRun) -> list[tuple[int, float, float]]:
    lines = [line for line in log_of(given) if "validation_loss" in line]
    return [(line["step"], -line["validation_exact_match"], line["validation_loss"]) for line in lines]


# Time


def test_its_seconds_are_those_of_all_starts_from_when_the_stage_began_to_load(tmp_path: Path) -> None:
    def started() -> TrainingRun:
        return dataclasses.replace(run(tmp_path), began=time.monotonic() - 1000)

    with pytest.raises(Stopped):
        trained(tiny(), started(), lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None)
    assert 2000 < trained(tiny(), started()).seconds < 3000


# Patience


def test_it_stops_after_as_many_validations_without_a_better_one(tmp_path: Path) -> None:
    given = run(tmp_path, learning_rate=1e-30, validate_every=2, patience=2)
    found = trained(tiny(), given)
    assert (found.steps, found.best.step, found.best.waited) == (6, 2, 2)
    assert [step for step, *_ in validations(given)] == [2, 4, 6]


def test_it_stops_where_the_validations_of_an_endless_training_say_and_keeps_the_same_weights(tmp_path: Path) -> None:
    endless = run(tmp_path / "endless", learning_rate=0.05, epochs=8, validate_every=1)
    patient = run(tmp_path / "patient", learning_rate=0.05, epochs=8, validate_every=1, patience=3)
    keepers = KeepsEach(), KeepsEach()
    assert trained(tiny(), endless, keeper=keepers[0]).steps == 48
    found = trained(tiny(), patient, keeper=keepers[1])
    scores = validations(endless)
    best = [min(scores[: n + 1], key=lambda score: score[1:])[0] for n in range(len(scores))]
    expected = next(step for step, best_step in enumerate(best, start=1) if step - best_step == 3)
    assert 4 < expected < 48
    assert (found.steps, found.best.step) == (expected, expected - 3)
    assert log_of(patient) == [line for line in log_of(endless) if line["step"] <= expected]
    assert_same_bits(keepers[1].best, keepers[0].each[found.best.step])


def test_a_training_that_patience_ended_does_not_go_on_when_it_is_started_again(tmp_path: Path) -> None:
    given = run(tmp_path, learning_rate=1e-30, validate_every=2, patience=2)
    first, again = tiny(), tiny()
    found = trained(first, given)
    told = log_of(given)
    assert dataclasses.replace(trained(again, given), seconds=found.seconds) == found
    assert_same_bits(weights(again), weights(first))
    assert log_of(given) == told


# A loss that is not finite


def poisoned(given: TrainingRun, step: int, value: float) -> TrainingRun:
    """The same run, with a soft label of no finite number in a row of this step (from 0)."""
    spoilt = given.order.rows_of(step)[1]
    changed = list(given.rows)
    for n, row in enumerate(changed):
        label = row.sequences[0]
        shape = (len(label.target_ids), 2)
        log_probs = np.full(shape, math.log(0.25) if n != spoilt else value, np.float32)
        soft = TopK(np.tile(np.array([3, 7], np.int32), (shape[0], 1)), log_probs, np.zeros(shape[0], np.float32))
        changed[n] = dataclasses.replace(row, sequences=(dataclasses.replace(label, soft=soft), *row.sequences[1:]))
    return dataclasses.replace(given, rows=changed, loss=LossConfig(label=0.5, rationale=0.5, soft=0.5))


@Families
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_it_with_the_weights_of_the_step_before(tmp_path: Path, family: str, value: float) -> None:
    plain = {"schedule": "constant", "warmup": 0.0}
    given = poisoned(run(tmp_path / "spoilt", family, log_every=5, **plain), 2, value)
    model, keeper = tiny(family), InMemory()
    with pytest.raises(RuntimeError) as raised:
        trained(model, given, keeper=keeper)
    ids = ", ".join(given.rows[n].id for n in given.order.rows_of(2))
    assert re.fullmatch(
        r"the loss is not finite at step 3 \(label \d\.\d+, rationale \d\.\d+, soft (nan|inf); norm of the gradient (nan|inf)\); nothing "
        rf"was updated from there on\. The batch holds the examples {ids}\. Lower the learning rate or lengthen the warm-up, and run again "
        "from the last checkpoint",
        str(raised.value),
    )
    assert keeper.best == {}
    # Steps 4 and 5 ran before anybody looked.
    whole = poisoned(run(tmp_path / "whole", family, **plain, epochs=2 / 6), 2, value)
    expected = tiny(family)
    assert trained(expected, whole).steps == 2
    assert_same_bits(weights(model), weights(expected))
    assert not torch.equal(next(model.parameters()), next(tiny(family).parameters()))


# Signals


def stopping(at: int, number: signal.Signals) -> Callable[[int], None]:
    return lambda step: os.kill(os.getpid(), number) if step == at else None


@Families
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_it_after_the_step_and_the_same_call_goes_on_to_the_same_weights(
    tmp_path: Path, family: str, number: signal.Signals
) -> None:
    whole, given = (run(tmp_path / name, family, validate_every=5) for name in ("whole", "stopped"))
    expected, model, resumed = (tiny(family) for _ in range(3))
    before = signal.getsignal(number)
    uninterrupted = trained(expected, whole)
    with pytest.raises(Stopped, match=r"^train: stopped by a signal after step 8 of 12; the state is saved$"):
        trained(model, given, stopping(7, number))
    assert signal.getsignal(number) is before
    assert max(line["step"] for line in log_of(given)) == 8
    assert any(not torch.equal(model.state_dict()[name], value) for name, value in weights(expected).items())
    steps: list[int] = []
    found = trained(resumed, given, steps.append)
    assert steps[0] == 9
    assert (found.steps, found.best) == (uninterrupted.steps, uninterrupted.best)
    assert_same_bits(weights(resumed), weights(expected))
    assert log_of(given) == log_of(whole)


def test_a_signal_on_the_way_to_the_last_step_stops_nothing(tmp_path: Path) -> None:
    assert trained(tiny(), run(tmp_path), stopping(11, signal.SIGTERM)).steps == 12


def test_a_training_that_keeps_no_state_begins_anew(tmp_path: Path) -> None:
    given = dataclasses.replace(run(tmp_path), resumable=False)
    with pytest.raises(Stopped, match=r"^train: stopped by a signal after step 4 of 12; it begins anew$"):
        trained(tiny(), given, stopping(3, signal.SIGTERM))
    assert not (tmp_path / "state").exists()
    steps: list[int] = []
    trained(tiny(), given, steps.append)
    assert steps[0] == 1


# What changes nothing


@Families
def test_how_often_numbers_are_read_changes_none_of_them(tmp_path: Path, family: str) -> None:
    often, seldom = (run(tmp_path / str(every), family, log_every=every) for every in (1, 5))
    models = tiny(family), tiny(family)
    assert trained(models[0], often).best == trained(models[1], seldom).best
    assert log_of(often) == log_of(seldom)
    assert_same_bits(weights(models[0]), weights(models[1]))


@Families
def test_activation_checkpointing_computes_each_layer_twice_and_changes_nothing(tmp_path: Path, family: str) -> None:
    found = {}
    for kept, checkpointed in (("kept", False), ("again", True)):
        model, calls = tiny(family), [0]
        stack = model.model.layers if family == "decoder_only" else model.encoder.block
        given = run(tmp_path / kept, family, activation_checkpointing=checkpointed, epochs=0.5, validate_every=100)
        passed = stack[0].mlp if family == "decoder_only" else stack[0].layer[-1]
        # Before it, as what is computed again ends inside the last module whose activations are asked for.
        passed.register_forward_pre_hook(lambda module, *_, calls=calls: calls.__setitem__(0, calls[0] + module.training))
        trained(model, given)
        found[kept] = (weights(model), calls[0])
    assert found["again"][1] == 2 * found["kept"][1] > 0
    for name, value in found["kept"][0].items():
        torch.testing.assert_close(found["again"][0][name], value, rtol=0, atol=1e-5)


# Masks


def pruned(given: TrainingRun, **knobs: Any) -> TrainingRun:
    config = StudentPruneConfig.model_validate({"method": "magnitude", "fraction": 0.5, **knobs})
    names = [name for name, parameter in tiny().named_parameters() if "_proj" in name and parameter.dim() == 2]
    return dataclasses.replace(given, masks=weight_schedule(config, names, {}, given.num_steps))


def zeros(weights: Mapping[str, Tensor]) -> float:
    matrices = [value for name, value in weights.items() if "_proj" in name]
    return sum(int((value == 0).sum()) for value in matrices) / sum(value.numel() for value in matrices)


def test_the_best_of_a_gradual_pruning_has_lost_all_it_should_however_little_patience_there_is(tmp_path: Path) -> None:
    given = run(tmp_path, learning_rate=1e-30, validate_every=1, patience=1)
    keeper = KeepsEach()
    found = trained(tiny(), pruned(given, schedule="cubic", every=2, until=0.5), keeper=keeper)
    # Nothing is learnt, so that without masks the second validation would end it; they change after steps 2, 4 and 6.
    assert (found.steps, found.best.step) == (7, 6)
    assert [round(zeros(keeper.each[step]), 2) for step in (1, 2, 4, 6)] == [0.0, 0.35, 0.48, 0.5]
    assert zeros(keeper.best) == pytest.approx(0.5, abs=1e-3)


def test_pruned_in_one_shot_it_is_so_from_the_first_step(tmp_path: Path) -> None:
    keeper = KeepsEach()
    trained(tiny(), pruned(run(tmp_path, validate_every=1)), keeper=keeper)
    assert all(zeros(weights) == pytest.approx(0.5, abs=1e-3) for weights in keeper.each.values())
    assert 1 in keeper.each


def test_a_pruning_that_is_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole, stopped = (pruned(run(tmp_path / name), schedule="cubic", every=2, until=0.75) for name in ("whole", "stopped"))
    plain, resumed = tiny(), tiny()
    trained(plain, whole)
    with pytest.raises(Stopped):
        trained(resumed, stopped, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None)
    resumed = tiny()
    trained(resumed, stopped)
    assert_same_bits(weights(resumed), weights(plain))
    assert zeros(weights(resumed)) == pytest.approx(0.5, abs=1e-3)
