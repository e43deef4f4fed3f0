"""The training loop: the same losses whatever the number of processes, the micro-batches and the ZeRO stage."""

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


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Logs:
    runs = ("t5:0:auto", "t5:1:auto", "t5:1:auto#again", "t5:2:3", "t5:3:auto", "llama:1:auto", "llama:3:3")
    soft = ("t5:1:8:sampled", "t5:1:8:answers", "t5:1:3:answers", "llama:1:8:answers")
    return drive(tmp_path_factory.mktemp("one"), 1, *runs, *soft)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Logs:
    runs = ("t5:0:3", "t5:1:auto", "t5:2:1", "t5:3:3", "llama:2:auto")
    soft = ("t5:1:3:sampled", "t5:2:auto:answers", "llama:1:1:answers")
    return drive(tmp_path_factory.mktemp("two"), 2, *runs, *soft)


def numbers(log: list[dict[str, Any]], *keys: str) -> list[float]:
    found = [float(line[key]) for line in log for key in keys if key in line]
    assert len(found) >= 3 * len(keys)
    return found


LOSSES = ("loss", "loss_label", "loss_rationale", "loss_soft")


def test_the_log_has_every_loss_of_every_step_and_each_falls(one: Logs) -> None:
    log = one["t5:1:auto"]
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 16))
    for line in steps:
        assert line["loss"] == pytest.approx(0.5 * line["loss_label"] + 0.5 * line["loss_rationale"] + 0.7 * line["loss_soft"], rel=1e-5)
    for key in ("loss_label", "loss_rationale"):
        assert sum(line[key] for line in steps[-5:]) < sum(line[key] for line in steps[:5])
    assert [line["step"] for line in log if "validation_loss" in line] == [5, 10, 15]


def test_one_seed_gives_the_same_losses_twice_to_the_last_bit(one: Logs) -> None:
    assert one["t5:1:auto"] == one["t5:1:auto#again"]


@pytest.mark.parametrize("other", ["t5:0:auto", "t5:2:3", "t5:3:auto"])
def test_zero_stages_and_micro_batches_agree_in_one_process(one: Logs, other: str) -> None:
    for key in LOSSES:
        assert numbers(one[other], key) == pytest.approx(numbers(one["t5:1:auto"], key), abs=1e-5)


@pytest.mark.parametrize("other", ["t5:0:3", "t5:1:auto", "t5:2:1", "t5:3:3"])
def test_two_processes_with_unequal_token_counts_give_the_losses_of_one(one: Logs, two: Logs, other: str) -> None:
    for key in LOSSES:
        assert numbers(two[other], key) == pytest.approx(numbers(one["t5:1:auto"], key), abs=1e-5)
    assert numbers(two[other], "gradient_norm") == pytest.approx(numbers(one["t5:1:auto"], "gradient_norm"), rel=1e-4)
    for key in ("validation_loss", "validation_exact_match"):
        assert numbers(two[other], key) == pytest.approx(numbers(one["t5:1:auto"], key), abs=1e-5)
    assert two[other][-1]["weights"] == pytest.approx(one["t5:1:auto"][-1]["weights"], rel=1e-5)


def test_a_decoder_only_student_agrees_too(one: Logs, two: Logs) -> None:
    for key in LOSSES:
        expected = numbers(one["llama:1:auto"], key)
        assert numbers(one["llama:3:3"], key) == pytest.approx(expected, abs=1e-5)
        assert numbers(two["llama:2:auto"], key) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("whole", "split"),
    [
        ("t5:1:8:sampled", "t5:1:3:sampled"),
        ("t5:1:8:answers", "t5:2:auto:answers"),
        ("llama:1:8:answers", "llama:1:1:answers"),
    ],
)
def test_draws_and_answers_too_are_learnt_alike_by_two_processes(one: Logs, two: Logs, whole: str, split: str) -> None:
    for key in LOSSES:
        assert numbers(two[split], key) == pytest.approx(numbers(one[whole], key), abs=1e-5)
    assert numbers(two[split], "gradient_norm") == pytest.approx(numbers(one[whole], "gradient_norm"), rel=1e-4)
    assert two[split][-1]["weights"] == pytest.approx(one[whole][-1]["weights"], rel=1e-5)
    kinds = [numbers(one[run], "loss_soft") for run in (whole, whole.rpartition(":")[0].replace(":8", ":auto"))]
    assert kinds[0][0] != pytest.approx(kinds[1][0], rel=1e-3)


def test_micro_batches_of_answers_agree_in_one_process(one: Logs) -> None:
    for key in LOSSES:
        assert numbers(one["t5:1:3:answers"], key) == pytest.approx(numbers(one["t5:1:8:answers"], key), abs=1e-5)
