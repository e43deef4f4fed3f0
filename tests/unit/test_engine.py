from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from train import engine
from train.config import TrainingConfig
from train.engine import open_engine
from train.world import World


def opened(monkeypatch: pytest.MonkeyPatch, processes: int, device: str, **knobs: Any) -> tuple[str, dict[str, Any]]:
    """Which engine a configuration gets, and what it is told."""
    monkeypatch.setattr(engine, "FlatEngine", lambda _, __, **told: ("flat", told))
    monkeypatch.setattr(engine, "ShardedEngine", lambda _, __, **told: ("sharded", told))
    found: Any = open_engine(nn.Linear(2, 2), World(0, processes, torch.device(device)), TrainingConfig.model_validate(knobs))
    return found


def test_auto_is_one_flat_process_or_zero_1_and_bf16_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"bf16": False, "weight_decay": 0.0, "clip_norm": 1.0}
    assert opened(monkeypatch, 1, "cpu") == ("flat", told)
    assert opened(monkeypatch, 2, "cpu") == ("sharded", {**told, "zero_stage": 1, "offload_optimizer": False})
    assert opened(monkeypatch, 1, "cuda")[1]["bf16"]
    assert not opened(monkeypatch, 1, "cuda", precision="fp32")[1]["bf16"]
    assert opened(monkeypatch, 2, "cpu", zero_stage=0)[0] == "flat"
    own = {"zero_stage": 3, "offload_optimizer": True, "precision": "bf16", "weight_decay": 0.1, "clip_norm": 2.0}
    expected = {"zero_stage": 3, "offload_optimizer": True, "bf16": True, "weight_decay": 0.1, "clip_norm": 2.0}
    assert opened(monkeypatch, 1, "cpu", **own) == ("sharded", expected)


class CpuAdam(torch.optim.AdamW):
    """Stands for DeepSpeed's, which a compiler must build."""


def adamw(caplog: pytest.LogCaptureFixture, *, builds: tuple[bool, bool], offload: bool, device: str = "cuda") -> tuple[Any, list[str]]:
    """The optimizer of the first of two processes, of which some can build DeepSpeed's; and what is said."""

    def build(*arguments: Any, **knobs: Any) -> CpuAdam:
        if not builds[0]:
            raise RuntimeError("no compiler")
        return CpuAdam(*arguments, **knobs)

    deepspeed = SimpleNamespace(ops=SimpleNamespace(adam=SimpleNamespace(DeepSpeedCPUAdam=build)))
    world: Any = SimpleNamespace(device=torch.device(device), size=2, is_main=True, sum=lambda mine: mine + int(builds[1]))
    with caplog.at_level(logging.WARNING):
        made = engine._adamw(deepspeed, nn.Linear(3, 2).parameters(), 0.1, world, offload=offload)
    return made, caplog.messages


def test_offloaded_masters_get_deepspeeds_optimizer_where_every_process_can_build_it(caplog: pytest.LogCaptureFixture) -> None:
    made, said = adamw(caplog, builds=(True, True), offload=True)
    assert type(made) is CpuAdam
    assert [(group["weight_decay"], [p.dim() for p in group["params"]]) for group in made.param_groups] == [(0.1, [2]), (0.0, [1])]
    assert said == []


@pytest.mark.parametrize("builds", [(True, False), (False, True), (False, False)])
def test_else_torchs_takes_its_place_and_that_is_told(caplog: pytest.LogCaptureFixture, builds: tuple[bool, bool]) -> None:
    made, said = adamw(caplog, builds=builds, offload=True)
    assert type(made) is torch.optim.AdamW and made.defaults["fused"]
    assert [(group["weight_decay"], [p.dim() for p in group["params"]]) for group in made.param_groups] == [(0.1, [2]), (0.0, [1])]
    assert said == ["DeepSpeed's optimizer for the CPU cannot be compiled (it needs a C++ compiler and ninja): torch's takes its place"]


@pytest.mark.parametrize(("offload", "device"), [(False, "cuda"), (True, "cpu")])
def test_without_offloading_and_without_a_gpu_it_is_torchs(caplog: pytest.LogCaptureFixture, offload: bool, device: str) -> None:
    made, said = adamw(caplog, builds=(True, True), offload=offload, device=device)
    assert type(made) is torch.optim.AdamW
    assert said == []
