"""`stepdown sweep` as it is typed: killed in the middle it goes on, on another number of processes too, to the same table."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Start = Callable[..., subprocess.Popen[str]]
SWEEP = ("sweep", "tiny.yaml", "--arms", "labels_only,step_by_step", "--seeds", "2", "--fractions", "0.5:1,1")
GRID = ("--grid", "student.learning_rate=1e-3,1e-2")
TRIALS = 2 * (2 + 2 + 1)


def swept(start: Start, folder: Path, *arguments: str) -> str:
    process = start(folder, *SWEEP, *GRID, *arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def trials(folder: Path) -> dict[str, Path]:
    """The trials that are done, by their keys."""
    return {path.parent.name: path for path in (folder / "runs/tiny/sweep").glob("*/trial.json")}


def table(folder: Path) -> list[Any]:
    """All figures but times."""
    values = json.loads((folder / "runs/tiny/sweep/sweep.json").read_text())
    assert (values["trials"], values["trials_done"]) == (TRIALS, TRIALS)
    for cell in values["cells"]:
        assert cell.pop("seconds") > 0
    return [values["cells"], values["tried"], {key: json.loads(path.read_text())["validation"] for key, path in trials(folder).items()}]


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_to_the_same_table(tmp_path: Path, tiny: dict[str, Any], start: Start) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    (whole / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    output = swept(start, whole, "--only", "2")
    assert (len(trials(whole)), f"2 of {TRIALS} trials are done" in output, "not run" in output) == (2, True, True)
    shutil.copytree(whole, killed)

    # Alone and undisturbed.
    output = swept(start, whole)
    assert "teach: 332 records" in output and "(done before)" in output
    assert f"[3/{TRIALS}]" in output and f"[{TRIALS}/{TRIALS}]" in output and f"[2/{TRIALS}]" not in output
    assert "not run" not in output

    # Killed within a trial.
    process = start(killed, *SWEEP, *GRID)
    deadline = time.monotonic() + 200
    while not (len(done := trials(killed)) >= 4 and len(list((killed / "runs/tiny/sweep").glob("*/log.jsonl"))) > len(done)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = trials(killed)
    assert 4 <= len(done) < TRIALS
    written = {key: path.stat().st_mtime_ns for key, path in done.items()}

    # And on, in two processes that share what is left.
    output = swept(start, killed, "launch.cpu_processes=2")
    assert {key: path.stat().st_mtime_ns for key, path in done.items()} == written
    assert output.count(f"/{TRIALS}] ") == TRIALS - len(done)
    assert table(killed) == table(whole)
    assert not list((killed / "runs/tiny/sweep").glob("*/state"))

    # All done: the table again, without a worker.
    output = swept(start, killed)
    assert f"/{TRIALS}] " not in output
    assert f"{TRIALS} of {TRIALS} trials are done" in output
    shown = start(killed, "report", "tiny/sweep")
    assert "step_by_step@gold" in shown.communicate(timeout=60)[0]
    assert shown.returncode == 0
