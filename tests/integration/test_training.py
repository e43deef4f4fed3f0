"""The training loop: the same losses whatever the number of processes, the micro-batches, the ZeRO stage and activation checkpointing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
Logs = dict[str, list[dict[str, Any]]]


def drive(folder: Path, processes: int, *names: str) -> Logs:
    out = folder / f"losses-{processes}.json"
    torchrun = ["-m", "launch.agent", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    driver = str(ROOT / "tests" / "integration" / "training_driver.py")
    done = subprocess.run(
        [sys.executable, *torchrun, driver, str(out), *names], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


T5 = ("t5:0:auto", "t5:0:64", "t5:1:auto", "t5:1:auto#again", "t5:2:64", "t5:3:auto")
LLAMA = ("llama:0:auto", "llama:0:64", "llama:0:64#again", "llama:1:auto", "llama:3:120")
SOFT = ("t5:1:auto:sampled", "t5:1:auto:answers", "t5:1:64:answers", "llama:1:auto:answers", "llama:0:auto:sampled")
LORA = ("llama:0:auto:lora", "llama:3:120:lora", "t5:0:auto:lora")
CHECKPOINTED = ("t5:0:64:checkpointed", "llama:0:64:checkpointed", "llama:3:120:checkpointed")
LIVE = ("llama:0:auto:live", "llama:0:64:live", "t5:0:auto:live")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Logs:
    return drive(tmp_path_factory.mktemp("one"), 1, *T5, *LLAMA, *SOFT, *LORA, *CHECKPOINTED, *LIVE)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Logs:
    runs = ("t5:0:64", "t5:1:auto", "t5:2:20", "t5:3:120", "llama:0:64", "llama:1:20", "llama:2:auto", "llama:3:120")
    soft = ("t5:1:64:sampled", "t5:2:auto:answers", "llama:1:20:answers", "llama:0:64:sampled")
    lora = ("llama:0:64:lora", "llama:3:auto:lora", "t5:0:auto:lora")
    return drive(tmp_path_factory.mktemp("two"), 2, *runs, *soft, *lora, "llama:0:64:live", "llama:3:auto:live", "t5:1:64:live")


def numbers(log: list[dict[str, Any]], *keys: str) -> list[float]:
    found = [float(line[key]) for line in log for key in keys if key in line]
    assert len(found) >= 3 * len(keys)
    return found


LOSSES = ("loss", "loss_label", "loss_rationale", "loss_soft")


def without_speed(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    assert any("tokens_per_second" in line for line in log)
    return [{key: value for key, value in line.items() if key not in ("tokens_per_second", "memory_gib")} for line in log]


def assert_same_training(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for key in (*LOSSES, "validation_loss", "validation_exact_match"):
        assert numbers(found, key) == pytest.approx(numbers(expected, key), abs=1e-5)
    assert numbers(found, "gradient_norm") == pytest.approx(numbers(expected, "gradient_norm"), rel=1e-4)
    assert found[-1]["weights"] == pytest.approx(expected[-1]["weights"], rel=1e-5)
    assert found[-1]["best_step"] == expected[-1]["best_step"]


def test_the_log_has_every_loss_of_every_step_and_each_falls(one: Logs) -> None:
    log = one["t5:1:auto"]
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 16))
    for line in steps:
        assert line["loss"] == pytest.approx(0.5 * line["loss_label"] + 0.5 * line["loss_rationale"] + 0.7 * line["loss_soft"], rel=1e-5)
    for key in ("loss_label", "loss_rationale"):
        assert sum(line[key] for line in steps[-5:]) < sum(line[key] for line in steps[:5])
    assert [line["step"] for line in log if "validation_loss" in line] == [5, 10, 15]


@pytest.mark.parametrize("run", ["t5:1:auto", "llama:0:64"])
def test_one_seed_gives_the_same_losses_twice_to_the_last_bit(one: Logs, run: str) -> None:
    assert without_speed(one[run]) == without_speed(one[f"{run}#again"])


@pytest.mark.parametrize("other", ["t5:0:auto", "t5:0:64", "t5:2:64", "t5:3:auto", "llama:0:auto", "llama:0:64", "llama:3:120"])
def test_zero_stages_and_micro_batches_agree_in_one_process(one: Logs, other: str) -> None:
    assert_same_training(one[other], one[f"{other.partition(':')[0]}:1:auto"])


@pytest.mark.parametrize(
    "other", ["t5:0:64", "t5:1:auto", "t5:2:20", "t5:3:120", "llama:0:64", "llama:1:20", "llama:2:auto", "llama:3:120"]
)
def test_two_processes_with_unequal_token_counts_give_the_losses_of_one(one: Logs, two: Logs, other: str) -> None:
    assert_same_training(two[other], one[f"{other.partition(':')[0]}:1:auto"])


@pytest.mark.parametrize(
    ("whole", "split"),
    [
        ("t5:1:auto:sampled", "t5:1:64:sampled"),
        ("t5:1:auto:answers", "t5:2:auto:answers"),
        ("llama:1:auto:answers", "llama:1:20:answers"),
        ("llama:0:auto:sampled", "llama:0:64:sampled"),
        ("llama:0:auto:live", "llama:0:64:live"),
        ("llama:0:auto:live", "llama:3:auto:live"),
        ("t5:0:auto:live", "t5:1:64:live"),
    ],
)
def test_draws_answers_and_a_live_teacher_too_are_learnt_alike_by_two_processes(one: Logs, two: Logs, whole: str, split: str) -> None:
    assert_same_training(two[split], one[whole])
    kinds = [numbers(one[run], "loss_soft") for run in (whole, whole.rpartition(":")[0])]
    assert kinds[0][0] != pytest.approx(kinds[1][0], rel=1e-3)


@pytest.mark.parametrize(("whole", "split"), [("t5:1:auto:answers", "t5:1:64:answers"), ("llama:0:auto:live", "llama:0:64:live")])
def test_micro_batches_of_answers_and_of_a_live_teacher_agree_in_one_process(one: Logs, whole: str, split: str) -> None:
    assert_same_training(one[split], one[whole])


def test_adapters_agree_under_zero_0_and_3_in_one_process_and_in_two(one: Logs, two: Logs) -> None:
    for logs, run in ((one, "llama:3:120:lora"), (two, "llama:0:64:lora"), (two, "llama:3:auto:lora")):
        assert_same_training(logs[run], one["llama:0:auto:lora"])
    assert_same_training(two["t5:0:auto:lora"], one["t5:0:auto:lora"])
    for family in ("llama", "t5"):
        adapted, plain = (numbers(one[f"{family}:0:auto{way}"], "loss") for way in (":lora", ""))
        assert adapted[0] == pytest.approx(plain[0], abs=1e-6), "adapters change nothing before the first step"
        assert abs(adapted[-1] - plain[-1]) > 1e-3


@pytest.mark.parametrize("run", ["t5:0:64", "llama:0:64", "llama:3:120"])
def test_activations_computed_again_change_nothing(one: Logs, run: str) -> None:
    assert_same_training(one[f"{run}:checkpointed"], one[run])
    if run.startswith("llama"):
        # All layers of a T5 share their position biases, whose gradients are added up in another order.
        assert without_speed(one[f"{run}:checkpointed"]) == without_speed(one[run])
