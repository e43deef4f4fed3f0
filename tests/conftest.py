"""Fixtures that every folder of tests shares, and the environment that no test may depend on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
