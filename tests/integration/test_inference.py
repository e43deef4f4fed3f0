"""A sharded teacher writes and scores what the whole one does, with ranks whose work differs in length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def drive(folder: Path, processes: int, dtype: str, *shardings: str) -> dict[str, Any]:
    out = folder / "found.json"
    command = ["-m", "launch.agent", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    driver = str(ROOT / "tests" / "integration" / "inference_driver.py")
    done = subprocess.run(
        [sys.executable, *command, driver, str(out), dtype, *shardings], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.slow
def test_replica_tensor_and_zero3_agree_with_the_whole_model(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    one = drive(tmp_path / "one", 1, "float32", "replica")
    two = drive(tmp_path, 2, "float32", "replica", "tensor", "zero3")
    for family in ("t5", "llama"):
        whole = one[f"{family}/replica"]
        for sharding in ("replica", "tensor", "zero3"):
            found = two[f"{family}/{sharding}"]
            assert found["sharding"] == sharding
            assert found["generated"] == whole["generated"]
            for scores, expected in zip(found["scores"], whole["scores"], strict=True):
                assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_tensor_parallel_runs_in_bf16(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    one, two = drive(tmp_path / "one", 1, "bfloat16", "replica"), drive(tmp_path, 2, "bfloat16", "tensor")
    for family in ("t5", "llama"):
        for scores, expected in zip(two[f"{family}/tensor"]["scores"], one[f"{family}/replica"]["scores"], strict=True):
            assert scores == pytest.approx(expected, abs=0.2)
