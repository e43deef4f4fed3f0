"""Where everything of a run lives, who may write there, and how it came about. Imports no torch.

    OUTPUT/NAME/config.yaml, resolved.json, provenance.json, stages.json, report.md|json|html
    OUTPUT/NAME/STAGE-KEY/        one folder a stage and inputs; `artifact.json` in it says that it is done
    OUTPUT/shared/STAGE-KEY/      what the runs of one output folder share: the tuned teacher and its records

KEY is a hash of what the stage reads. A changed key of the configuration makes a new folder and never touches an old one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from launch.config import RESOLVED, Config, dump_config
from launch.hardware import cpu_count, detect
from train.artifacts import ARTIFACT, write_json

SHARED = "shared"
STAGES_FILE = "stages.json"
VALUES_FILE = "resolved.json"
_LIBRARIES = ("stepdown", "torch", "deepspeed", "transformers", "tokenizers", "ctranslate2", "datasets", "pyarrow", "wandb", "numpy")


def run_folder(config: Config) -> Path:
    """The run's own folder."""
    return Path(config.output) / config.name


def open_run(config: Config, command: Sequence[str]) -> Path:
    """Makes the run's folder and writes the configuration and where it came from; a process that holds the folder's lock may do so.

    Raises:
        RuntimeError: if the folder cannot be written: read-only, full, or a file stands in the way.
    """
    folder = run_folder(config)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / VALUES_FILE, config.model_dump(mode="json"))
        write_json(folder / "provenance.json", provenance(command))
        temporary = folder / f".{RESOLVED}"
        temporary.write_text(dump_config(config))
        temporary.replace(folder / RESOLVED)
    return folder


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns the system's refusal to write into a message with a way out.

    Raises:
        RuntimeError: for a full disk, a read-only place, missing rights, or a file where a folder should be.
    """
    reasons = {
        errno.ENOSPC: "the disk is full; free some space and run the same command again: what is done is kept",
        errno.EDQUOT: "your disk quota is used up; free some space and run the same command again: what is done is kept",
        errno.EROFS: "the place is read-only; set `output` to a folder that you may write to",
        errno.EACCES: "the system refuses it to you; change the rights, or set `output` to a folder that you may write to",
        errno.EPERM: "the system refuses it to you; change the rights, or set `output` to a folder that you may write to",
        errno.EEXIST: "a file stands where a folder should be; move it, or set `output` to another folder",
        errno.ENOTDIR: "a file stands where a folder should be; move it, or set `output` to another folder",
    }
    try:
        yield
    except OSError as error:
        reason = reasons.get(error.errno or 0)
        if reason is None:
            raise
        raise RuntimeError(
            f"cannot {'open' if error.errno in (errno.EACCES, errno.EPERM) else 'write'} {error.filename or folder}: {reason}"
        ) from error


@contextmanager
def locked(folder: Path, *, patience_seconds: float = 5.0, shared: bool = False) -> Iterator[None]:
    """Only one process at a time works in a folder; the lock ends with its process, however that ends.

    Args:
        folder: made where it is missing.
        patience_seconds: how long to wait for a process that is just ending.
        shared: work beside others that say so too, each on files of its own.

    Raises:
        RuntimeError: if another process holds it, or the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    with file:
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{folder} is in use by another stepdown process: wait for it to end, or give this run another name"
                    ) from error
                time.sleep(0.1)
        yield


def provenance(command: Sequence[str]) -> dict[str, Any]:
    """How a run came about: command, commit, versions, machine. Nothing of the environment, which may hold secrets."""
    gpus = detect()
    return {
        "command": shlex.join(command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": cpu_count(),
        "gpus": [gpu.name for gpu in gpus],
        "versions": {name: version for name in _LIBRARIES if (version := _version(name)) is not None},
    }


def find_run(run: str, output: str = "runs") -> Path:
    """The folder of a run given by its path or its name.

    Raises:
        ValueError: if there is no such run; the runs that there are, are named.
    """
    for folder in (Path(run), Path(output) / run):
        if (folder / STAGES_FILE).is_file():
            return folder
    there = sorted(path.parent.name for path in Path(output).glob(f"*/{STAGES_FILE}"))
    raise ValueError(
        f"{run} is not a run: neither {run} nor {Path(output) / run} holds {STAGES_FILE}; runs in {output}/: {', '.join(there) or 'none'}"
    )


def find_rung(name: str, output: str = "runs") -> Path:
    """The evaluation folder of RUN or RUN:RUNG; without a rung, that of the run's student.

    Raises:
        ValueError: if there is no such run, or it has not measured such a rung.
    """
    run, _, rung = name.partition(":")
    stages = read_stages(find_run(run, output))
    arms = [stage.partition(".")[2] for stage in stages if stage.startswith("train.")]
    measured = {
        stage.partition(".")[2]: path for stage, path in stages.items() if stage.startswith("evaluate.") and (path / ARTIFACT).is_file()
    }
    wanted = rung or arms[-1]
    if wanted not in measured:
        raise ValueError(f"{run} has no measured rung {wanted}; it has: {', '.join(measured) or 'none, run it first'}")
    return measured[wanted]


def read_stages(folder: Path) -> dict[str, Path]:
    """Folder of every stage of a run, by its name, in the pipeline's order."""
    stages = json.loads((folder / STAGES_FILE).read_text())
    return {name: folder / place for name, place in stages.items()}


def write_stages(folder: Path, stages: dict[str, Path]) -> None:
    """Notes where the stages of this run lie, relative to its folder, so that all runs can be moved together."""
    write_json(folder / STAGES_FILE, {name: os.path.relpath(place, folder) for name, place in stages.items()})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that runs, `-dirty` where it was changed; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed else commit


def command_line() -> list[str]:
    """The command as the user typed it."""
    return ["stepdown", *sys.argv[1:]]
