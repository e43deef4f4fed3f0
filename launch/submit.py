"""Submits a pipeline to Slurm as a chain of jobs. Imports no torch.

stepdown submit configs/svamp.yaml
stepdown submit configs/svamp.yaml --dry-run
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from launch.chain import Job, chain, missing_jobs
from launch.cluster import SiteConfig, load_site
from launch.config import RESOLVED, Config, dump_config
from launch.local import check_targets, made, prepare_task
from launch.pipeline import TASK, stages
from launch.preflight import check_recorded
from launch.queueing import ask, has_slurm, queued
from launch.rundir import command_line, locked, open_run, run_folder, write_stages, writing
from launch.slurm import TEMPLATE, job_command, job_request, log_pattern, options, processes_of, script, submission
from launch.submission import JOBS, LOGS, Submitted, read_submission, write_submission

_SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY")
_SHORTEST_SECRET = 8


@dataclass(frozen=True, slots=True)
class Written:
    """A job whose script is on disk."""

    job: Job
    path: Path
    """Of its script."""
    log: Path
    """Of its output, as sbatch takes it."""


def submit(config: Config, console: Console, *, site: Path | None = None, dry_run: bool = False) -> None:
    """Submits what is missing of a run; nothing is queued unless Slurm would take every job.

    Args:
        config: of the run.
        console: where the chain is told.
        site: the site file; None for the repository's.
        dry_run: only write the scripts and tell the chain.

    Raises:
        ValueError: for what the user wrote, or asked of Slurm in vain.
        RuntimeError: if Slurm is not here, or jobs of the run are in its queue.
    """
    cluster, folder = load_site(site), run_folder(config)
    processes_of(config)
    if "\\" in str(folder.absolute()):
        raise ValueError(f"output: the run's folder {folder.absolute()} holds a backslash, which Slurm does not take: change it")
    if not dry_run and not has_slurm():
        raise RuntimeError(
            "sbatch is not here: submit on a login node of a Slurm cluster, write the scripts with --dry-run, or use `stepdown run`"
        )
    with locked(folder), writing(folder):
        if has_slurm():
            _check_idle(folder)
        named = {folder / RESOLVED: dump_config(config), folder / "provenance.json": shlex.join(command_line())}
        _check_no_secrets(named, config, os.environ)
        open_run(config, command_line())
        task = prepare_task(config)
        _tell(console, f"task: {made(task.artifact)}")
        table = stages(config, task.artifact)
        write_stages(folder, {name: stage.folder for name, stage in table.items()})
        if not cluster.is_contained:
            check_targets(config, [stage for stage in table.values() if stage.place != "here"])
        check_recorded(config, {stage.kind for stage in table.values() if not stage.is_done}, table[TASK].folder)
        jobs = missing_jobs(config, table, task.artifact.rows)
        if not jobs:
            _tell(console, f"every stage is done: `stepdown report {shlex.quote(str(folder))}` shows the ladder")
            return
        written = _write(jobs, config, cluster, folder)
        if dry_run:
            _tell_scripts(written, console)
        else:
            _queue(written, folder, console)


def _check_idle(folder: Path) -> None:
    submitted = read_submission(folder)
    active = [job.label for job in queued([job.number for job in submitted]).values() if job.is_active]
    if active:
        raise RuntimeError(
            f"{folder} has jobs in the queue ({', '.join(active)}): wait for them, `stepdown cancel {folder}`, or give this run another "
            "name"
        )


def _write(jobs: Sequence[Job], config: Config, site: SiteConfig, folder: Path) -> list[Written]:
    """The requests and scripts, and the configuration that the jobs read: a later command of this run does not change it."""
    jobs_folder, logs = folder.absolute() / JOBS, folder.absolute() / LOGS
    for made_folder in (jobs_folder, logs):
        made_folder.mkdir(exist_ok=True)
    texts: dict[Path, str] = {jobs_folder / RESOLVED: dump_config(config)}
    requests = {jobs_folder / f"{job.name}.json": job_request(job, config, folder.absolute(), site, sys.executable) for job in jobs}
    written = []
    for job, asked in zip(jobs, requests, strict=True):
        path, command = asked.with_suffix(".sbatch"), job_command(sys.executable, asked)
        texts[path] = script(TEMPLATE.read_text(), options(job, config, site), site, command)
        written.append(Written(job, path, log_pattern(logs, job)))
    _check_no_secrets({**texts, **{path: str(request) for path, request in requests.items()}}, config, os.environ)
    for path, text in texts.items():
        path.write_text(text)
    for path, request in requests.items():
        request.write(path)
    return written


def _check_no_secrets(texts: Mapping[Path, str], config: Config, environment: Mapping[str, str]) -> None:
    own = [config.teacher.endpoint.key_variable] if config.teacher.endpoint is not None and config.teacher.endpoint.key_variable else []
    for name in (*_SECRETS, *own):
        secret = environment.get(name, "")
        if len(secret) >= _SHORTEST_SECRET and (path := next((path for path, text in texts.items() if secret in text), None)):
            raise ValueError(
                f"the value of {name} would stand in {path}: take it out of the configuration and the site file; jobs inherit the variable "
                "from the shell that submits"
            )


def _tell_scripts(written: Sequence[Written], console: Console) -> None:
    for line in chain([w.job for w in written]):
        _tell(console, line)
    _tell(console, "not submitted; the scripts, in their order:")
    for w in written:
        after = [f"<number of {name}>" for name in w.job.after]
        _tell(console, f"  {shlex.join(submission(w.path, w.log, after))}")


def _queue(written: Sequence[Written], folder: Path, console: Console) -> None:
    for w in written:
        try:
            ask(submission(w.path, w.log, only_test=True))
        except RuntimeError as error:
            raise ValueError(
                f"Slurm refuses {w.job.name}: {error}. Nothing was queued; launch.nodes, launch.gpus_per_node, launch.slurm and the site "
                f"file say what is asked for, {w.path} how"
            ) from error
    submitted: list[Submitted] = []
    numbers: dict[str, str] = {}
    try:
        for w, line in zip(written, chain([w.job for w in written]), strict=True):
            # `--parsable` gives NUMBER;CLUSTER where there are several clusters.
            number = ask(submission(w.path, w.log, [numbers[name] for name in w.job.after])).strip().partition(";")[0]
            numbers[w.job.name] = number
            submitted.append(Submitted(w.job.name, number, list(w.job.stages), _list(w.job.indices), list(w.job.after)))
            write_submission(folder, submitted)
            _tell(console, f"{number:>8}  {line}")
    except RuntimeError as error:
        with suppress(RuntimeError):
            ask(["scancel", *numbers.values()]) if numbers else None
        raise RuntimeError(f"{error}; what had been queued of this chain was cancelled") from error
    _tell(console, f"`stepdown status {shlex.quote(str(folder))}` shows how it goes")


def _list(indices: Sequence[int] | None) -> list[int] | None:
    return None if indices is None else list(indices)


def _tell(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)
