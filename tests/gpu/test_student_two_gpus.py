"""A student under every layout over two GPUs: the plain one's losses.

python -m pytest tests/gpu/test_student_two_gpus.py -m multi_gpu
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.hardware import detect

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.multi_gpu
@pytest.mark.skipif(len(detect()) < 2, reason="needs two GPUs")
def test_every_layout_gives_the_losses_of_the_plain_one(tmp_path: Path) -> None:
    out = tmp_path / "losses.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    subprocess.run([*torchrun, str(ROOT / "tests" / "gpu" / "student_driver.py"), str(out)], env=environment, check=True, timeout=500)
    found = json.loads(out.read_text())
    assert len(found) == 14
    for name, run in found.items():
        assert run["last"] < run["first"] - 0.5, name
        assert run["apart"] <= (1e-3 if name.startswith("fp32") else 1e-2), name
