from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from train.schedules import learning_rate

Schedule = Literal["linear", "cosine", "constant"]


def rates(schedule: Schedule, num_steps: int, warmup: float, peak: float = 2.0) -> list[float]:
    return [learning_rate(step, num_steps=num_steps, peak=peak, warmup=warmup, schedule=schedule) for step in range(num_steps)]


def test_schedules_by_hand() -> None:
    assert rates("linear", 6, 1 / 3) == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 0.5])
    assert rates("cosine", 6, 1 / 3) == pytest.approx([1.0, 2.0, 2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])
    assert rates("constant", 6, 1 / 3) == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert rates("linear", 4, 0.0) == pytest.approx([2.0, 1.5, 1.0, 0.5])


@pytest.mark.parametrize(
    ("num_steps", "warmup", "steps"), [(100, 0.07, 7), (100, 0.05, 5), (30, 0.1, 3), (10, 0.01, 1), (10, 0.95, 10), (1, 0.5, 1)]
)
def test_the_peak_is_reached_on_the_last_step_of_the_warm_up(num_steps: int, warmup: float, steps: int) -> None:
    found = rates("linear", num_steps, warmup)
    assert found[:steps] == pytest.approx([2.0 * (n + 1) / steps for n in range(steps)])
    assert max(found) == pytest.approx(2.0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(20, 0), (20, 1), (20, 5), (7, 3)])
def test_schedules_are_those_of_transformers(schedule: Literal["linear", "cosine"], num_steps: int, warmup_steps: int) -> None:
    """After the warm-up they are the same.

    In it ours is one step ahead: transformers gives its first step a rate of 0, which changes no weight, and we do not.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    build = get_linear_schedule_with_warmup if schedule == "linear" else get_cosine_schedule_with_warmup
    reference = build(optimizer, num_warmup_steps=warmup_steps, num_training_steps=num_steps)
    theirs = []
    for _ in range(num_steps):
        theirs.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    ours = rates(schedule, num_steps, warmup_steps / num_steps)
    assert ours[warmup_steps:] == pytest.approx(theirs[warmup_steps:])
    assert ours[:warmup_steps] == pytest.approx(theirs[1 : warmup_steps + 1])
    assert reference.get_last_lr()[0] == pytest.approx(0.0)  # just after the last step


@given(st.sampled_from(["linear", "cosine", "constant"]), st.integers(1, 60), st.floats(0, 0.99))
def test_a_rate_rises_then_falls_and_never_idles(schedule: Schedule, num_steps: int, warmup: float) -> None:
    found = rates(schedule, num_steps, warmup)
    top = found.index(max(found))
    assert all(0 < rate <= 2.0 for rate in found)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
