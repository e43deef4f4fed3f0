from __future__ import annotations

import logging
import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from train import engine
from train.config import TrainingConfig
from train.engine import open_engine, uses_cuda
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


# ----- the device -----

OLD_DRIVER = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx (Triggered internally at CUDAFunctions.cpp:109.)"
)
WAY_OUT = "Update the driver, or install a torch built for it (https://pytorch.org/get-started/locally), or set launch.device to cpu"


@pytest.mark.parametrize(
    ("device", "gpus", "cuda", "said", "expected"),
    [
        ("cpu", 2, "13.0", None, False),
        ("auto", 0, "13.0", None, False),
        (
            "cuda",
            0,
            "13.0",
            None,
            "launch.device is cuda, but torch sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES, or set it to cpu",
        ),
        (
            "auto",
            2,
            "13.0",
            OLD_DRIVER,
            "torch 9.9, built for CUDA 13.0, cannot use the 2 GPU(s) that nvidia-smi lists: The NVIDIA driver on your system is too old "
            f"(found version 11040). {WAY_OUT}",
        ),
        (
            "cuda",
            1,
            "13.0",
            None,
            f"torch 9.9, built for CUDA 13.0, cannot use the 1 GPU(s) that nvidia-smi lists: no CUDA device can be opened. {WAY_OUT}",
        ),
        ("auto", 1, None, None, f"torch 9.9 cannot use the 1 GPU(s) that nvidia-smi lists: it is built without CUDA. {WAY_OUT}"),
    ],
)
def test_gpus_that_torch_cannot_use_are_told_without_its_own_warning(
    monkeypatch: pytest.MonkeyPatch, device: Any, gpus: int, cuda: str | None, said: str | None, expected: bool | str
) -> None:
    def is_available() -> bool:
        if said:
            warnings.warn(said, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch, "__version__", "9.9")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if isinstance(expected, bool):
        assert uses_cuda(device, gpus) is expected
    else:
        with pytest.raises(RuntimeError, match=rf"\A{re.escape(expected)}\Z"):
            uses_cuda(device, gpus)


def test_gpus_that_torch_opens_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert uses_cuda("auto", 1)
    assert not uses_cuda("cpu", 1)
