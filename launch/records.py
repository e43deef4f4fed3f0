"""Looks a record store over, and makes room for what must be written again. Imports no torch.

stepdown records check configs/quickstart.yaml
stepdown records repair configs/quickstart.yaml
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.store import MANIFEST
from data.store_check import MISSING, STRANGER, Origin, ShardState, check_store
from data.tasks import read_task
from launch.config import Config
from launch.hardware import cpu_count
from launch.local import worker_environment
from launch.pipeline import TASK, TEACH, TUNE, Stage, stages, task_stage
from launch.rundir import locked
from train.artifacts import ARTIFACT, TaskFiles

_OPENING = "train.teacher.opening"


def check(config: Config, console: Console) -> bool:
    """Prints every shard of a configuration's store with what is wrong with it.

    Returns:
        Whether the store is whole.

    Raises:
        RuntimeError: if there is no store yet, or another process is writing it.
    """
    store, states = _look(config)
    table = Table("shard", "state")
    for state in states:
        table.add_row(state.file, Text(state.fault or "ok", style="" if state.fault is None else "red"))
    console.print(table)
    bad = [state for state in states if state.fault is not None]
    told = f"{len(bad)} of {len(states)} shards cannot be used" if bad else f"{len(states)} shards, all good"
    console.print(f"{store.folder}: {told}", soft_wrap=True, highlight=False, markup=False)
    return not bad


def repair(config: Config, console: Console) -> int:
    """Deletes the bad shards of a configuration's store and the mark that it is done; good shards stay as they are.

    Returns:
        How many shards the next run writes.

    Raises:
        RuntimeError: if there is no store yet, or another process is writing it.
    """
    store, states = _look(config)
    bad = [state for state in states if state.fault is not None]
    if bad:
        with locked(store.folder):
            # The mark first: a store without it is looked over before it is read.
            for name in (ARTIFACT, MANIFEST, *(state.file for state in bad)):
                (store.folder / name).unlink(missing_ok=True)
    for state in bad:
        done = "will be written" if state.fault == MISSING else f"deleted: it {state.fault}"
        console.print(f"{state.file}: {done}", soft_wrap=True, highlight=False, markup=False)
    kept, to_write = len(states) - len(bad), sum(state.fault != STRANGER for state in bad)
    console.print(f"{store.folder}: {kept} good shards kept, {to_write} to write", soft_wrap=True, highlight=False, markup=False)
    return to_write


def _look(config: Config) -> tuple[Stage, list[ShardState]]:
    task = task_stage(config)
    if not task.is_done:
        raise RuntimeError(f"{task.folder} is not there or not done, so this configuration has no records yet: run it first")
    table = stages(config, TaskFiles.read(task.folder))
    store = table[TEACH]
    if not store.folder.is_dir():
        raise RuntimeError(f"{store.folder} is not there: this configuration has no records yet; run it first")
    if TUNE in table and not table[TUNE].is_done:
        raise RuntimeError(f"{table[TUNE].folder} is not done, so the teacher of these records is not known: run the configuration first")
    origin = _origin(config, table[TUNE].folder if TUNE in table else None)
    examples = read_task(table[TASK].folder)
    with locked(store.folder):
        return store, check_store(store.folder, {"train": examples.train, "test": examples.test}, origin)


def _origin(config: Config, tuned: Path | None) -> Origin:
    """Asks a process of its own: a tokenizer needs transformers, which the submit side does without."""
    request = {"teacher": config.teacher.model_dump(mode="json", exclude_unset=True), "tuned": str(tuned) if tuned else None}
    done = subprocess.run(
        _command(), input=json.dumps(request), env=worker_environment(1, cpu_count(), "cpu"), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError("the teacher's tokenizer or prompt cannot be read; the message stands above")
    return Origin(**json.loads(done.stdout.splitlines()[-1]))


def _command() -> Sequence[str]:
    return [sys.executable, "-m", _OPENING]
