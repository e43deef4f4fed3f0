"""`kill -9` while the teacher writes and scores, then again with another number of processes: the very same records."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.store import STORE, read_records
from launch.config import dump_config, load_config
from launch.rundir import read_stages

Start = Callable[..., subprocess.Popen[str]]
ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("teach_driver.py")
ROWS = {"train": 300, "test": 60}
GREEDY: dict[str, Any] = {"rationales": {"max_new_tokens": 24}, "soft_labels": {"on": "both", "k": 8}}
SAMPLED: dict[str, Any] = {
    "rationales": {"max_new_tokens": 24, "samples": 3, "rationalize": True},
    "soft_labels": {"on": "both", "format": "sampled", "draws": 20},
}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Any], start: Start) -> Callable[[str], Path]:
    """Makes a folder with a tuned teacher that often answers in form, and is often wrong."""
    root = tmp_path_factory.mktemp("tuned")

    @cache
    def made(name: str) -> Path:
        folder = root / name
        folder.mkdir()
        asked = {"greedy": GREEDY, "sampled": SAMPLED}[name]
        config = deepcopy(tiny)
        config["name"] = name
        config["task"]["arithmetic"] |= {"train_rows": ROWS["train"], "test_rows": ROWS["test"]}
        config["teacher"] |= {"model": {**config["teacher"]["model"], "d_model": 32}, **deepcopy(asked)}
        config["teacher"]["tune"] = {"epochs": 12, "batch_size": 16, "learning_rate": 1e-2}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        process = start(folder, "tune", f"{name}.yaml")
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return folder

    return made


def teach(folder: Path, name: str, processes: int, chunk: int) -> subprocess.Popen[str]:
    """The teacher's stage, in a process group of its own."""
    torchrun = ["-m", "launch.agent", "--standalone", "--nproc-per-node", str(processes)]
    command = [*torchrun, str(DRIVER), str(chunk), f"runs/{name}", "teach"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def store_of(folder: Path, name: str) -> Path:
    return read_stages(folder / "runs" / name)["teach"]


def shards(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.glob("*.parquet"))}


def begun(store: Path) -> int:
    """When the last process to begin did so."""
    note = store / STORE
    return note.stat().st_mtime_ns if note.is_file() else 0


def seconds_a_shard(store: Path) -> float:
    times = sorted(path.stat().st_mtime for path in store.glob("*.parquet"))
    return (times[-1] - times[0]) / (len(times) - 1)


def kill_while_it_writes(folder: Path, name: str, chunk: int, processes: int, more: int, pause: float) -> bool:
    """Kills a teacher `pause` seconds after it began and wrote `more` shards; False where it was done before."""
    store = store_of(folder, name)
    before, there = begun(store), len(list(store.glob("*.parquet")))
    process = teach(folder, name, processes, chunk)
    deadline = time.monotonic() + 300
    while begun(store) == before or len(list(store.glob("*.parquet"))) < there + more:
        assert process.poll() is None, f"ended before the moment came: {process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(pause)
    killed = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return killed


def finish(folder: Path, name: str, chunk: int, processes: int) -> None:
    process = teach(folder, name, processes, chunk)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_killed_and_started_with_other_processes_it_writes_the_same_records(
    name: str, tuned: Callable[[str], Path], tmp_path: Path
) -> None:
    kills, chunk = 20, 4
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    for folder in (undisturbed, disturbed):
        shutil.copytree(tuned(name), folder)
    finish(undisturbed, name, chunk, 1)
    expected = shards(store_of(undisturbed, name))
    assert len(expected) == sum(-(-rows // chunk) for rows in ROWS.values())

    moments, shard_seconds = random.Random(kills), seconds_a_shard(store_of(undisturbed, name))
    for _ in range(kills):
        processes, more, pause = moments.choice((1, 2, 3)), moments.choice((0, 1, 1)), moments.uniform(0.0, 2.0) * shard_seconds
        assert kill_while_it_writes(disturbed, name, chunk, processes, more, pause)
    written = len(shards(store_of(disturbed, name)))
    finish(disturbed, name, chunk, moments.choice((1, 2, 3)))
    assert 0 < written < len(expected)  # it was killed in the midst, not before or after

    found = shards(store_of(disturbed, name))
    assert found == expected
    assert not list(store_of(disturbed, name).glob(".*.parquet.*"))
    records = {split: read_records(store_of(disturbed, name), split) for split in ROWS}
    assert {split: len({record.id for record in found}) for split, found in records.items()} == ROWS
    assert {len(r) for r in records.values()} == set(ROWS.values())
    if name == "sampled":  # or the run would have drawn nothing, and asked nothing again
        assert any(1 <= record.votes < 3 for record in records["train"])
        assert any(record.rationalized for record in records["train"])


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "processes"), [("tensor", 2), ("zero3", 3)])
def test_a_sharded_teacher_asks_again_in_step_and_writes_the_same_texts(
    sharding: str, processes: int, tuned: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(tuned("sampled"), tmp_path / "one")
    finish(tmp_path / "one", "sampled", 16, 1)
    shutil.copytree(tuned("sampled"), tmp_path / "several")
    resolved = tmp_path / "several" / "runs" / "sampled" / "config.yaml"
    resolved.write_text(dump_config(load_config(resolved, [f"teacher.sharding={sharding}"])))
    finish(tmp_path / "several", "sampled", 16, processes)
    for split in ROWS:
        one, several = (read_records(store_of(tmp_path / name, "sampled"), split) for name in ("one", "several"))
        assert [(r.id, r.text, r.label, r.votes, r.rationalized) for r in several] == [
            (r.id, r.text, r.label, r.votes, r.rationalized) for r in one
        ]
