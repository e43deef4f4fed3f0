"""A sharded teacher writes and scores what the whole one does, with processes whose work differs in length."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from train.engine import place_for_inference
from train.world import World

ROOT = Path(__file__).resolve().parents[2]


def drive(folder: Path, *ways: str, nodes: int = 1) -> dict[str, Any]:
    """What the driver finds on two processes of each of `nodes` nodes, which are torchrun agents of this machine."""
    out = folder / "found.json"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    driver = [str(ROOT / "tests" / "integration" / "inference_driver.py"), str(out), *ways]
    agents = []
    for node in range(nodes):
        place = ["--nnodes", str(nodes), "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        command = [sys.executable, "-m", "launch.agent", *place, "--nproc-per-node", "2", *driver]
        agents.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    try:
        for agent in agents:
            _, errors = agent.communicate(timeout=240)
            assert agent.returncode == 0, errors[-3000:]
    finally:
        for agent in agents:
            agent.kill()
    found: dict[str, Any] = json.loads(out.read_text())
    return found


LAYOUTS = {"replica": ["replica", 1, 2], "tensor": ["tensor", 2, 1], "zero3": ["zero3", 1, 2], "offload": ["zero3", 1, 2]}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes find; one start of torch and DeepSpeed for all."""
    return drive(tmp_path_factory.mktemp("two"), "whole", *LAYOUTS, "whole:bfloat16", "tensor:bfloat16")


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["answers"] == expected["answers"]
    for name in ("scores", "choices"):
        assert len(found[name]) == len(expected[name])
        for values, others in zip(found[name], expected[name], strict=True):
            assert values == pytest.approx(others, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("sharding", list(LAYOUTS))
def test_a_sharded_teacher_agrees_with_the_whole_model(two: dict[str, Any], sharding: str, family: str) -> None:
    expected = two[f"{family}/whole"]
    assert sum(count for _, count in expected["answers"]) > 30
    assert two[f"{family}/{sharding}"]["layout"] == LAYOUTS[sharding]
    check(two[f"{family}/{sharding}"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_tensor_parallel_runs_in_bf16(two: dict[str, Any], family: str) -> None:
    whole, sharded = two[f"{family}/whole:bfloat16"], two[f"{family}/tensor:bfloat16"]
    for scores, expected in zip(sharded["scores"], whole["scores"], strict=True):
        assert scores == pytest.approx(expected, abs=0.2)


@pytest.mark.slow
def test_tensor_parallel_stays_inside_a_node(tmp_path: Path) -> None:
    found = drive(tmp_path, "whole", "tensor", nodes=2)
    for family in ("t5", "llama"):
        assert found[f"{family}/tensor"]["layout"] == ["tensor", 2, 2]
        check(found[f"{family}/tensor"], found[f"{family}/whole"])


@pytest.mark.parametrize(
    ("processes", "degree", "message"),
    [
        (4, 3, "teacher.sharding is tensor over 3 processes, which do not divide the 4 there are: choose replica or zero3, or"),
        (8, 8, "tensor over 8 processes, but the teacher's num_attention_heads is 4, which 8 does not divide: choose replica or zero3"),
        (4, 4, "tensor over 4 processes, but the teacher's num_key_value_heads is 2, which 4 does not divide: choose replica or zero3"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(processes: int, degree: int, message: str) -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=8
    )
    with pytest.raises(ValueError, match=message):
        place_for_inference(LlamaForCausalLM(config), World(0, processes, torch.device("cpu")), "tensor", degree=degree)


def test_a_tensor_group_of_one_process_is_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, vocab_size=8)
    placed = place_for_inference(LlamaForCausalLM(config), World(1, 2, torch.device("cpu")), "tensor")
    assert (placed.sharding, placed.group_rank, placed.num_groups, placed.is_writer, placed.degree) == ("replica", 1, 2, True, 1)
