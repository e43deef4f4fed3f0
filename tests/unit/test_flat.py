"""ZeRO stage 0: the same numbers as plain torch, and nothing updated where a gradient is not finite."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from train.flat import FlatEngine
from train.world import World

WORLD = World(0, 1, torch.device("cpu"))


class Tied(nn.Module):
    """Odd sizes, a vector, tied weights, a frozen layer and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 5)
        self.norm = nn.LayerNorm(5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(5, 13, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("turns", torch.arange(3.0))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.frozen(self.norm(self.table(ids))))


def model() -> Tied:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tied()


def loss(module: nn.Module, step: int, part: slice = slice(None)) -> Tensor:
    ids = torch.randint(13, (8,), generator=torch.Generator().manual_seed(step))[part]
    logits: Tensor = module(ids)
    return nn.functional.cross_entropy(logits.float(), (ids + 1) % 13, reduction="sum") / 8


def engine(module: nn.Module, *, bf16: bool = False, clip_norm: float = 0.5) -> FlatEngine:
    return FlatEngine(module, WORLD, bf16=bf16, weight_decay=0.1, clip_norm=clip_norm)


def one_step(flat: FlatEngine, step: int, micro: int = 1) -> Tensor:
    for m in range(micro):
        flat.backward(loss(flat.module, step, slice(m, None, micro)), last=m == micro - 1)
    return flat.step(0.01 * (step + 1))


@pytest.mark.parametrize("micro", [1, 4])
def test_it_is_adamw_with_clipping(micro: int) -> None:
    flat, plain = engine(model()), model()
    groups = [{"params": [plain.table.weight], "weight_decay": 0.1}, {"params": list(plain.norm.parameters()), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, foreach=False)
    for step in range(6):
        norm = one_step(flat, step, micro)
        optimizer.zero_grad()
        loss(plain, step).backward()
        expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1)
        optimizer.step()
        assert float(norm) == pytest.approx(float(expected), rel=1e-5)
        assert float(norm) > 0.5
    weights = flat.gather_weights()
    for name, value in plain.state_dict().items():
        if name != "head.weight":
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
    assert set(weights) == set(plain.state_dict()) - {"head.weight"}
    assert flat.module.head.weight is flat.module.table.weight


def test_bf16_steps_are_taken_by_fp32_masters() -> None:
    flat = engine(model(), bf16=True)
    assert {p.dtype for p in flat.module.parameters()} == {torch.bfloat16}
    assert flat.module.turns.dtype == torch.float32
    # Far less than bf16 can tell apart: without masters nothing would ever move.
    for _ in range(50):
        flat.backward(loss(flat.module, 0), last=True)
        flat.step(1e-5)
    moved = (flat.gather_weights()["table.weight"] - model().table.weight.detach()).abs()
    assert float(moved.max()) == pytest.approx(50e-5, rel=0.3)  # and weight decay


def test_gradients_of_many_micro_batches_add_up_in_fp32() -> None:
    flat = engine(model(), bf16=True)
    table = flat.module.table.weight
    for n in range(512):
        # In bf16 a sum of ones would stop at 256.
        flat.backward((table[0, 0] if n % 2 else table[0, 0] * 1.0), last=n == 511)
    assert float(flat.step(0.0)) == 512.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_updated_from_a_gradient_that_is_not_finite_on(value: float) -> None:
    flat = engine(model())
    one_step(flat, 0)
    before, moments = flat.gather_weights(), copy.deepcopy(flat._optimizer.state_dict()["state"])
    flat.backward(loss(flat.module, 1) * value, last=True)
    assert not flat.step(0.1).isfinite()
    assert one_step(flat, 2).isfinite()
    for name, weight in flat.gather_weights().items():
        assert torch.equal(weight, before[name])
    for found, expected in zip(flat._optimizer.state_dict()["state"].values(), moments.values(), strict=True):
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_resumed_engine_goes_on_to_the_last_bit(bf16: bool, tmp_path: Path) -> None:
    whole = engine(model(), bf16=bf16)
    for step in range(3):
        one_step(whole, step)
    whole.save(tmp_path / "state", 3, {"note": 1})
    whole.save(tmp_path / "state", 3, {"note": 2})
    resumed = engine(model(), bf16=bf16)
    found = resumed.resume(tmp_path / "state")
    assert found is not None
    assert (found.step, found.state) == (3, {"note": 2})
    for step in range(3, 6):
        assert torch.equal(one_step(whole, step), one_step(resumed, step))
    expected = whole.gather_weights()
    for name, value in resumed.gather_weights().items():
        assert torch.equal(value, expected[name])


def test_there_may_be_nothing_to_resume_or_something_else(tmp_path: Path) -> None:
    assert engine(model()).resume(tmp_path / "state") is None
    engine(model()).save(tmp_path / "state", 1, {})
    with pytest.raises(RuntimeError, match=r"step-1 holds the weights of another model: delete .* to train this model from its start"):
        engine(nn.Linear(3, 3)).resume(tmp_path / "state")


def test_masks_are_not_taken_up_by_a_model_of_another_shape(tmp_path: Path) -> None:
    flat = engine(nn.Linear(4, 3))
    flat.hold({"weight": torch.eye(3, 4) > 0})
    flat.save(tmp_path / "state", 1, {})
    wider = engine(nn.Linear(5, 3))
    with pytest.raises(RuntimeError, match=r"step-1 holds the weights of another model: delete .* to train this model from its start"):
        wider.resume(tmp_path / "state")
    assert wider.holding is None
    assert wider.gather_weights()["weight"].all()


def test_a_released_module_has_its_fp32_weights_and_can_be_wrapped_again() -> None:
    module = model()
    first = engine(module, bf16=True)
    one_step(first, 0)
    expected = first.gather_weights()
    first.release()
    assert module.table.weight.dtype == torch.float32
    assert torch.equal(module.table.weight, expected["table.weight"])
    module.load_state_dict(model().state_dict())
    again = engine(module, bf16=True)
    one_step(again, 0)
    assert torch.equal(again.gather_weights()["table.weight"], expected["table.weight"])


@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_pruned_stays_zero_and_its_moments_too(bf16: bool, tmp_path: Path) -> None:
    flat = engine(model(), bf16=bf16)
    for step in range(3):
        one_step(flat, step)
    mask = torch.rand(13, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    flat.hold({"table.weight": mask})
    tighter = mask & (torch.arange(13) % 2 == 0)[:, None]
    flat.save(tmp_path / "state", 3, {})
    resumed = engine(model(), bf16=bf16)
    resumed.resume(tmp_path / "state")
    for held in (flat, resumed):
        for step in range(3, 9):
            one_step(held, step)
            if step == 5:
                held.hold({"table.weight": tighter})
            out = ~(mask if step < 5 else tighter)
            moments = [held._optimizer.state[held._optimizer.param_groups[0]["params"][0]][key] for key in ("exp_avg", "exp_avg_sq")]
            for flat_values in (held._masters, held._weights, *moments):
                values = flat_values[: 13 * 5].view(13, 5)
                assert not values[out].any()
                assert values[~out].all()
    assert all(torch.equal(value, flat.gather_weights()[name]) for name, value in resumed.gather_weights().items())
    flat.release()
    if not bf16:  # without its engine the module learns everywhere again
        loss(flat.module, 0).backward()
        assert flat.module.table.weight.grad[~tighter].any()
