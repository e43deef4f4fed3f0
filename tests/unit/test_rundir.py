from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.config import load_config, validate
from launch.rundir import find_run, find_rung, locked, open_run, provenance, read_stages, run_folder, write_stages, writing

ROOT = Path(__file__).resolve().parents[2]
CONFIG: dict[str, Any] = {
    "name": "mine",
    "task": {"train": "a.jsonl", "test": "b.jsonl", "metric": "text"},
    "teacher": {"source": "recorded", "label": "{a}", "rationale": "{b}"},
    "student": {"model": "OWNER/small"},
}
HOLDER = """
import sys, time
from pathlib import Path
from launch.rundir import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def tiny(output: Path) -> Any:
    return validate({**CONFIG, "output": str(output)}, "file")


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder's lock."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


# ----- one process at a time -----


def test_a_lock_keeps_another_process_out_until_its_holder_is_killed(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        told = rf"\A{tmp_path} is in use by another stepdown process: wait for it to end, or give this run another name\Z"
        with pytest.raises(RuntimeError, match=told), locked(tmp_path, patience_seconds=0.0):
            pytest.fail("two processes hold one lock")
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=5)
        with locked(tmp_path, patience_seconds=0.0):
            pass


def test_a_lock_waits_for_a_process_that_is_ending(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()  # not waited for
        with locked(tmp_path, patience_seconds=5.0):
            assert (tmp_path / ".lock").is_file()


def test_a_lock_is_free_again_after_an_error_and_no_child_inherits_it(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    with pytest.raises(KeyError), locked(folder):
        raise KeyError
    with locked(folder):
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], close_fds=False)
    try:
        with locked(folder, patience_seconds=3.0):
            pass
    finally:
        child.kill()
        child.wait()


# ----- what the system refuses -----


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "cannot write FILE: the disk is full; free some space and run the same command again: what is done is kept"),
        (
            errno.EDQUOT,
            "cannot write FILE: your disk quota is used up; free some space and run the same command again: what is done is kept",
        ),
        (errno.EROFS, "cannot write FILE: the place is read-only; set `output` to a folder that you may write to"),
        (
            errno.EACCES,
            "cannot open FILE: the system refuses it to you; change the rights, or set `output` to a folder that you may write to",
        ),
        (
            errno.EPERM,
            "cannot open FILE: the system refuses it to you; change the rights, or set `output` to a folder that you may write to",
        ),
        (errno.EEXIST, "cannot write FILE: a file stands where a folder should be; move it, or set `output` to another folder"),
        (errno.ENOTDIR, "cannot write FILE: a file stands where a folder should be; move it, or set `output` to another folder"),
    ],
)
def test_a_refusal_is_told_with_a_way_out(number: int, expected: str) -> None:
    with pytest.raises(RuntimeError) as raised, writing(Path("folder")):
        raise OSError(number, os.strerror(number), "FILE")
    assert str(raised.value) == expected
    with pytest.raises(RuntimeError, match=r"\Acannot \w+ folder: "), writing(Path("folder")):
        raise OSError(number, os.strerror(number))


def test_other_errors_pass_through() -> None:
    with pytest.raises(FileNotFoundError), writing(Path("folder")):
        Path("/nowhere/at/all").read_text()
    with pytest.raises(ValueError, match="mine"), writing(Path("folder")):
        raise ValueError("mine")


def test_a_file_where_the_output_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    expected = rf"\Acannot write {tmp_path}/runs.*: a file stands where a folder should be; move it, or set `output` to another folder\Z"
    with pytest.raises(RuntimeError, match=expected):
        open_run(tiny(tmp_path / "runs"), ["stepdown"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(RuntimeError, match=rf"\Acannot write {tmp_path}/out/mine: a file stands where a folder should be"):
        open_run(tiny(tmp_path / "out"), ["stepdown"])


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() == 0, reason="rights do not bind root")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RuntimeError, match=r"\Acannot open .*runs: the system refuses it to you"):
            open_run(tiny(tmp_path / "runs"), ["stepdown"])
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's always full disk")
def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    with pytest.raises(RuntimeError, match=rf"\Acannot write {tmp_path}: the disk is full; free some space"), writing(tmp_path):
        (tmp_path / "log").write_text("x")


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A small disk of its own; skips where this user may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=64k") as disk:
        (disk / "other").write_bytes(bytes(15 * 4096))
        with pytest.raises(RuntimeError, match=rf"\Acannot write {disk}.*: the disk is full; free some space and run the same command"):
            open_run(tiny(disk / "runs"), ["stepdown"])


def test_a_disk_that_is_read_only(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=64k,ro") as disk:
        expected = rf"\Acannot write {disk}/runs.*: the place is read-only; set `output` to a folder that you may write to\Z"
        with pytest.raises(RuntimeError, match=expected):
            open_run(tiny(disk / "runs"), ["stepdown"])
        with pytest.raises(RuntimeError, match=expected), locked(disk / "runs" / "mine"):
            pytest.fail("locked a folder that cannot be written")


# ----- how a run came about -----


def test_a_run_folder_holds_the_configuration_and_where_it_came_from(tmp_path: Path) -> None:
    config = tiny(tmp_path / "runs")
    folder = open_run(config, ["stepdown", "run", "my config.yaml", "seed=0"])
    assert folder == run_folder(config) == tmp_path / "runs" / "mine"
    assert load_config(folder / "config.yaml") == config
    resolved = json.loads((folder / "resolved.json").read_text())
    assert (resolved["student"]["epochs"], resolved["deploy"]["targets"]) == (10.0, ["ctranslate2-int8"])
    said = json.loads((folder / "provenance.json").read_text())
    assert said["command"] == "stepdown run 'my config.yaml' seed=0"
    assert said["versions"]["pyarrow"]
    assert time.strptime(said["started"], "%Y-%m-%dT%H:%M:%S%z")
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "provenance.json", "resolved.json"]


def test_no_secret_and_nothing_of_the_environment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-key-of-mine")
    monkeypatch.setenv("HF_TOKEN", "hf_t0ken-of-mine")
    folder = open_run(tiny(tmp_path), ["stepdown", "run"])
    written = "".join(path.read_text() for path in folder.iterdir())
    assert "of-mine" not in written
    assert "WANDB_API_KEY" not in written
    assert set(provenance(["stepdown"])) == {"command", "started", "commit", "python", "system", "cpus", "gpus", "versions"}


# ----- finding runs -----


def run_with(folder: Path, *names: str, done: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    write_stages(folder, {name: folder / f"{name}-0" for name in names})
    for name in done:
        (folder / f"{name}-0").mkdir()
        (folder / f"{name}-0" / "artifact.json").write_text("{}")
    return folder


def test_stages_are_noted_relative_to_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    write_stages(folder, {"task": folder / "task-1", "teach": tmp_path / "runs" / "shared" / "teach-2"})
    assert json.loads((folder / "stages.json").read_text()) == {"task": "task-1", "teach": "../shared/teach-2"}
    (tmp_path / "runs").rename(tmp_path / "moved")
    stages = read_stages(tmp_path / "moved" / "one")
    assert stages["teach"].resolve() == tmp_path / "moved" / "shared" / "teach-2"


def test_a_run_is_found_by_its_folder_and_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_with(tmp_path / "runs" / "one", "task")
    run_with(tmp_path / "runs" / "two", "task")
    monkeypatch.chdir(tmp_path)
    assert find_run("one") == Path("runs/one")
    assert find_run(str(folder)) == folder
    assert find_run("one", str(tmp_path / "runs")) == folder
    with pytest.raises(
        ValueError, match=r"\Athree is not a run: neither three nor runs/three holds stages.json; runs in runs/: one, two\Z"
    ):
        find_run("three")
    with pytest.raises(ValueError, match=r"runs in none/: none\Z"):
        find_run("one", "none")


def test_a_rung_is_the_students_where_none_is_named(tmp_path: Path) -> None:
    names = ("train.labels_only", "train.soft_labels", "evaluate.teacher", "evaluate.labels_only", "evaluate.soft_labels")
    folder = run_with(tmp_path / "one", *names, done=("evaluate.teacher", "evaluate.soft_labels"))
    assert find_rung("one", str(tmp_path)) == folder / "evaluate.soft_labels-0"
    assert find_rung("one:teacher", str(tmp_path)) == folder / "evaluate.teacher-0"
    with pytest.raises(ValueError, match=r"\Aone has no measured rung labels_only; it has: teacher, soft_labels\Z"):
        find_rung("one:labels_only", str(tmp_path))
    run_with(tmp_path / "new", *names)
    with pytest.raises(ValueError, match=r"\Anew has no measured rung soft_labels; it has: none, run it first\Z"):
        find_rung("new", str(tmp_path))
