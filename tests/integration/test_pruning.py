"""Pruned weights stay exactly zero, their moments too, in every layout, through saving and going on with other processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNS = ("0:fp32", "1:fp32", "2:fp32", "3:fp32", "2:fp32:offloaded", "0:bf16", "3:bf16")
pytestmark = pytest.mark.slow
Found = dict[str, dict[str, Any]]


def drive(folder: Path, states: Path, processes: int, *names: str) -> Found:
    out = folder / f"found-{processes}.json"
    torchrun = ["-m", "launch.agent", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    driver = str(ROOT / "tests" / "integration" / "pruning_driver.py")
    command = [sys.executable, *torchrun, driver, str(out), str(states), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pruning")


@pytest.fixture(scope="module")
def two(folder: Path) -> Found:
    """Two processes from the start; leaves the states of step 30."""
    return drive(folder, folder / "states", 2, *RUNS)


@pytest.fixture(scope="module")
def resumed(folder: Path, two: Found) -> Found:
    """One process that goes on with what two have saved."""
    shutil.copytree(folder / "states", folder / "copies")
    return drive(folder, folder / "copies", 1, *RUNS)


@pytest.mark.parametrize("run", RUNS)
def test_what_is_pruned_is_zero_after_every_step_and_in_the_gathered_weights(two: Found, run: str) -> None:
    found = two[run]
    assert (len(found["losses"]), found["started"]) == (50, 0)
    *wrong, _ = found["wrong"]
    assert wrong == [0, 0, 0]
    # Nothing else is: what is kept has weights that are not zero.
    assert found["zeros"] == found["expected"] > 10_000


@pytest.mark.parametrize("run", RUNS)
def test_it_goes_on_in_one_process_with_the_masks_of_two(two: Found, resumed: Found, run: str) -> None:
    found, whole = resumed[run], two[run]
    assert (found["started"], len(found["losses"])) == (30, 20)
    assert found["wrong"][:3] == [0, 0, 0]
    assert found["zeros"] == found["expected"] == whole["expected"]
    assert found["losses"] == pytest.approx(whole["losses"][30:], rel=1e-5 if "fp32" in run else 2e-2)


@pytest.mark.parametrize("run", RUNS[1:5])
def test_layouts_learn_alike_under_masks(two: Found, run: str) -> None:
    assert two[run]["losses"] == pytest.approx(two["0:fp32"]["losses"], rel=1e-5)
    assert two[run]["losses"][-1] < two[run]["losses"][0]
