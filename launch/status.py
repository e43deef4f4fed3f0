"""How a submitted run goes: each stage with its job, and why it stopped where it did. Imports no torch.

stepdown status runs/svamp
stepdown logs runs/svamp train.step_by_step
stepdown cancel runs/svamp
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.attempts import Attempt, Attempts, attempts_file
from launch.chain import REPORT
from launch.config import RESOLVED, Config, load_config
from launch.pipeline import parted
from launch.progress import reached
from launch.queueing import Queued, ask, queued
from launch.rundir import read_stages
from launch.submission import JOBS, Submitted, log_of, read_submission

State = Literal["done", "running", "queued", "waiting", "requeued", "failed", "cancelled", "not run", "not submitted", "unknown"]
LOST: tuple[State, ...] = ("failed", "cancelled", "not run", "unknown")
"""What ends the jobs behind it."""
_TAIL_LINES, _TAIL_BYTES = 5, 65536
_WANDB_RUN = re.compile(r"run-\d{8}_\d{6}-(.+)")


@dataclass(frozen=True, slots=True)
class Row:
    """What there is to say of a stage, or of one array task of it."""

    stage: str
    job: str
    """Its label; empty where it was not submitted."""
    state: State
    progress: str = ""
    why: str = ""
    """What it waits for, or what ended it."""
    link: str = ""
    """To its W&B run."""


def status(run_folder: Path) -> list[Row]:
    """Every stage of a run in the pipeline's order, and its report.

    Raises:
        RuntimeError: if jobs were submitted and Slurm does not answer.
    """
    jobs, config = read_submission(run_folder), load_config(run_folder / RESOLVED)
    known = queued([job.number for job in jobs])
    states = job_states(run_folder, jobs, known)
    rows = [row for stage, folder in read_stages(run_folder).items() for row in _rows(run_folder, stage, folder, jobs, states, config)]
    for job in (job for job in jobs if job.name == REPORT):
        rows.append(Row(REPORT, job.number, states[job.number][0], why=_why(run_folder, job, job.number, states)))
    return rows


def _rows(
    run_folder: Path, stage: str, folder: Path, jobs: Sequence[Submitted], states: Mapping[str, tuple[State, str]], config: Config
) -> list[Row]:
    found, link = reached(folder), wandb_link(folder, config)
    made_by = [(job, label) for job in jobs for label in job.labels_of(stage)]
    if found.is_done:
        return [Row(stage, ", ".join(label for _, label in made_by), "done", found.told(), link=link)]
    if not made_by:
        return [Row(stage, "", "not submitted", found.told(), link=link)]
    rows = []
    for job, label in made_by:
        name = job.stages[int(label.partition("_")[2])] if job.indices is not None else stage
        part = parted(name)[1]
        shown = f"{stage} {part.index + 1}/{part.of}" if part is not None else stage
        rows.append(Row(shown, label, states[label][0], found.told(), _why(run_folder, job, label, states), link))
    return rows


def _why(run_folder: Path, job: Submitted, label: str, states: Mapping[str, tuple[State, str]]) -> str:
    state, why = states[label]
    error = error_of(log_of(run_folder, job, label)) if state == "failed" else ""
    return f"{why}: {error}" if error else why


def job_states(run_folder: Path, jobs: Sequence[Submitted], known: Mapping[str, Queued]) -> dict[str, tuple[State, str]]:
    """State of each job and array task of a submission by its label, with what it waits for or what ended it.

    Args:
        run_folder: where the jobs note their starts.
        jobs: in the chain's order.
        known: to Slurm.
    """
    states: dict[str, tuple[State, str]] = {}
    lost: dict[str, State] = {}
    for job in jobs:
        blocked = next((f"{name}, which {_ended(lost[name])}" for name in job.after if name in lost), None)
        for label in job.labels:
            starts = Attempts(attempts_file(run_folder / JOBS, job.name, label)).all
            states[label] = judge(known.get(label), starts, blocked, job.after)
        worst = [states[label][0] for label in job.labels if states[label][0] in LOST]
        if worst:
            lost[job.name] = worst[0]
    return states


def judge(job: Queued | None, starts: Sequence[Attempt], blocked: str | None, after: Sequence[str]) -> tuple[State, str]:
    """What became of a job.

    Args:
        job: as Slurm knows it; None where it has forgotten it.
        starts: of the job, as it noted them itself.
        blocked: a job before this one that did not succeed.
        after: names of the jobs before this one.
    """
    again = f"start {len(starts)}" if len(starts) > 1 else ""
    ended = starts[-1].ended if starts else None
    state = job.state if job is not None else {"finished": "COMPLETED", "failed": "FAILED", "ended by Slurm": "CANCELLED"}.get(ended or "")
    reason = job.reason if job is not None else ""
    if state in ("RUNNING", "CONFIGURING"):
        return "running", again
    if state == "COMPLETING":
        return "running", "its processes are ending"
    if state is not None and job is not None and job.is_active:
        if starts:
            return "requeued", f"was stopped, and goes on from what it kept ({reason})"
        return ("waiting", f"for {', '.join(after)}") if reason == "Dependency" else ("queued", f"Slurm: {reason}")
    if state == "COMPLETED":
        return "done", again
    if blocked is not None and not starts and state in (None, "CANCELLED"):
        return "not run", f"needs {blocked}; submit again when that is mended"
    if state == "CANCELLED":
        return "cancelled", "submit again to go on" if starts else "before it started"
    if state is None:
        return "unknown", "Slurm has forgotten it, and it noted no end: it was killed or cancelled; submit again"
    return "failed", f"Slurm: {state}"


def _ended(state: State) -> str:
    return {"failed": "failed", "cancelled": "was cancelled", "not run": "was not run"}.get(state, "ended unseen")


def error_of(log: Path) -> str:
    """The last error that a job's output tells, else its last lines; empty where there is no output."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    # srun tells of its own end after what ended it.
    told = [line for line in lines if line.startswith("error: ")]
    return told[-1].removeprefix("error: ") if told else " / ".join(lines[-_TAIL_LINES:])


def wandb_link(folder: Path, config: Config) -> str:
    """Address of the W&B run of a stage; empty where it has none online, or the configuration does not name its entity."""
    runs = [found[1] for path in sorted(folder.glob("wandb/run-*")) if (found := _WANDB_RUN.fullmatch(path.name))]
    if not runs or config.tracking.entity is None:
        return ""
    host = os.environ.get("WANDB_BASE_URL", "https://wandb.ai").replace("https://api.wandb.ai", "https://wandb.ai").rstrip("/")
    return f"{host}/{config.tracking.entity}/{config.tracking.project}/runs/{runs[-1]}"


def cancel(run_folder: Path) -> list[str]:
    """Cancels the jobs of a run that are not over; what they have kept stays.

    Returns:
        Their labels.

    Raises:
        RuntimeError: if Slurm does not answer.
    """
    jobs = read_submission(run_folder)
    known = queued([job.number for job in jobs])
    active = [label for job in jobs for label in job.labels if label in known and known[label].is_active]
    if active:
        ask(["scancel", *dict.fromkeys(label.partition("_")[0] for label in active)])
    return active


def logs(run_folder: Path, stage: str) -> list[Path]:
    """The outputs of the last submission's jobs that make a stage.

    Raises:
        ValueError: if there is no such stage, or none of its jobs has started.
    """
    jobs = read_submission(run_folder)
    wanted = [(job, label) for job in jobs for label in job.labels_of(stage)]
    if not wanted:
        known = dict.fromkeys(parted(name)[0] for job in jobs for name in job.stages)
        raise ValueError(f"the last submission of {run_folder} has no stage {stage}; it has: {', '.join(known) or 'none, submit it first'}")
    found = [path for job, label in wanted if (path := log_of(run_folder, job, label)).is_file()]
    if not found:
        raise ValueError(f"{stage} has written nothing yet: `stepdown status {run_folder}` says what it waits for")
    return found
