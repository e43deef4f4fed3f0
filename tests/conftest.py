"""Fixtures that every folder of tests shares, a pipeline small enough to run whole, and the environment that no test may depend on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

# Set before any test imports a library that reads them at import; the processes that tests start inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    OMP_NUM_THREADS="1",
)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; a clone without it skips the tests that read it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data beside this checkout: {SHARED_DATA} is missing")
    return SHARED_DATA


ROOT = Path(__file__).resolve().parents[1]
SMALL = {"from_scratch": "t5", "d_model": 16, "layers": 1, "heads": 2, "d_ff": 32, "vocabulary": 300}
TINY: dict[str, Any] = {
    "name": "tiny",
    "task": {
        "train": "builtin:arithmetic",
        "validation": "builtin:arithmetic",
        "test": "builtin:arithmetic",
        "rationale": "{rationale}",
        "metric": "number",
        "arithmetic": {"train_rows": 300, "validation_rows": 16, "test_rows": 32, "max_steps": 1},
    },
    "teacher": {
        "source": "deepspeed",
        "model": SMALL,
        "tune": {"epochs": 1, "batch_size": 16, "learning_rate": 2e-3, "save_every": 5},
        "rationales": {"max_new_tokens": 12},
        "soft_labels": {"on": "both", "k": 8},
    },
    "student": {
        "model": SMALL,
        "loss": {"label": 0.5, "rationale": 0.5, "soft": 0.5},
        "baselines": ["labels_only"],
        "epochs": 1,
        "batch_size": 16,
        "save_every": 5,
        "max_label_tokens": 4,
    },
    "evaluate": {"timed_examples": 4},
    "tracking": {"wandb": "disabled"},
}

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """The configuration; a copy may be changed."""
    return deepcopy(TINY)


@pytest.fixture(scope="session")
def start() -> Start:
    """Starts `stepdown ARGUMENTS` in a folder, in a process group of its own."""

    def started(folder: Path, *arguments: str, threads: int = 1) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "launch.cli", *arguments]
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A shell starts what it puts in the background with Ctrl-C ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return started


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Any], start: Start) -> Path:
    """A folder in which the tiny pipeline has run undisturbed."""
    folder = tmp_path_factory.mktemp("finished")
    write_config(folder, tiny)
    process = start(folder, "run", "tiny.yaml")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    (folder / "output.txt").write_text(output)
    return folder
