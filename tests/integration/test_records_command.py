"""`stepdown records`: damaged shards are told, and written again alone, byte for byte as they were."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.rundir import read_stages

Start = Callable[..., subprocess.Popen[str]]


def output_of(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    assert "Traceback" not in output
    return output


@pytest.mark.slow
def test_a_bad_store_is_refused_and_only_what_is_bad_is_written_again(finished: Path, tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    store = read_stages(folder / "runs" / "tiny")["teach"]
    whole = {path.name: path.read_bytes() for path in store.glob("*.parquet")}
    assert len(whole) == 3
    assert "3 shards, all good" in output_of(start(folder, "records", "check", "tiny.yaml"))

    flipped, truncated, good = (store / name for name in ("train-000000.parquet", "train-000001.parquet", "test-000000.parquet"))
    flipped.write_bytes(whole[flipped.name][:999] + bytes([whole[flipped.name][999] ^ 1]) + whole[flipped.name][1000:])
    truncated.write_bytes(whole[truncated.name][:-500])
    written = good.stat().st_mtime_ns
    told = output_of(start(folder, "records", "check", "tiny.yaml"), status=1)
    assert "2 of 3 shards cannot be used" in told
    assert "does not match its checksum" in told and "is truncated or damaged at its end" in told
    assert told.splitlines()[-1] == "`stepdown records repair tiny.yaml` deletes what is bad and keeps the rest"

    # A student that reads it is told the very commands.
    refused = output_of(start(folder, "train", "tiny.yaml", "student.learning_rate=3e-3"), status=1)
    assert (
        "train-000000.parquet does not match its checksum (damaged or edited): `stepdown records repair runs/tiny/config.yaml`" in refused
    )

    repaired = output_of(start(folder, "records", "repair", "tiny.yaml"))
    assert "1 good shards kept, 2 to write" in repaired
    assert repaired.splitlines()[-1] == "now `stepdown run tiny.yaml` writes what is missing"
    assert [path.name for path in store.glob("*.parquet")] == [good.name]
    output_of(start(folder, "teach", "tiny.yaml"))
    assert {path.name: path.read_bytes() for path in store.glob("*.parquet")} == whole
    assert good.stat().st_mtime_ns == written
    assert "3 shards, all good" in output_of(start(folder, "records", "check", "tiny.yaml"))


def test_a_store_that_is_not_there_is_told(tmp_path: Path, finished: Path, start: Start) -> None:
    shutil.copy(finished / "tiny.yaml", tmp_path)
    output = output_of(start(tmp_path, "records", "check", "tiny.yaml"), status=1)
    assert "so this configuration has no records yet: run it first" in output


@pytest.mark.slow
def test_a_store_copied_from_another_teacher_is_refused_before_anything_is_added(finished: Path, tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    tune = "teacher.tune.learning_rate=1e-3"
    output_of(start(folder, "tune", "tiny.yaml", tune))
    mine = read_stages(folder / "runs" / "tiny")["teach"]
    shutil.copytree(read_stages(finished / "runs" / "tiny")["teach"], mine)
    for name in ("artifact.json", "manifest.json", "train-000001.parquet"):
        (mine / name).unlink()
    output = output_of(start(folder, "teach", "tiny.yaml", tune), status=1)
    assert "2 of 3 shards cannot be used: train-000000.parquet was written by another teacher ('tune-" in output
    assert "`stepdown records repair runs/tiny/config.yaml` deletes what is bad" in output
    assert not (mine / "train-000001.parquet").exists()
