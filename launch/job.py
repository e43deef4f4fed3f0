"""What a Slurm job becomes on the first of its nodes: it starts the steps, passes signals on, and has the job run again. Imports no torch.

    python -m launch.job RUN/jobs/NAME.json

Slurm calls a job that ends within its grace COMPLETED, whatever it left undone, and lets the jobs behind it start. So the job itself asks
to be put back in the queue, before it ends, if its processes stopped with their state saved and nobody cancelled it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.store import SPLITS
from launch.attempts import Attempts, attempt, attempts_file
from launch.chain import REPORT
from launch.config import RESOLVED, load_config
from launch.hardware import cpu_count
from launch.local import worker_environment
from launch.pipeline import TASK, parted
from launch.progress import reached
from launch.queueing import Control, ask, control, first_host, label_of
from launch.rundir import provenance, read_stages
from launch.slurm import JobRequest, rendezvous_of, steps
from train.artifacts import ARTIFACT, TaskFiles
from train.signals import PARENT, STOPPED, STOPPED_FILE, catching

_LOOK_SECONDS = 0.5
_REPEAT_SECONDS = 10.0
"""Between two times that a signal is passed on: a step that was just starting missed the first."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How the steps of a job ended."""

    status: int
    is_stopped: bool
    """They left the mark of having stopped in order."""
    is_asked: bool
    """Slurm had sent this job a signal."""


def is_to_requeue(ended: Ended, state: Control) -> bool:
    """Whether the job goes back to the queue: it was stopped, not finished and not failed, and it is still Slurm's to run.

    A cancelled job gets the same signals as a preempted one, but it is COMPLETING by then.
    """
    return state.state == "RUNNING" and (ended.is_stopped or ended.is_asked or state.is_preempted)


def is_finished(ended: Ended, state: Control) -> bool:
    """Whether steps whose results are not seen here ended well: their status alone does not say so.

    srun gives 0 where it gave up waiting for steps that Slurm was ending; and on a shared folder a file made on another node may be seen
    here seconds late.
    """
    return ended.status == 0 and state.state == "RUNNING" and not (ended.is_stopped or ended.is_asked or state.is_preempted)


def run(request: JobRequest, jobs_folder: Path, environment: Mapping[str, str]) -> int:
    """Runs the steps of a job to their end.

    Args:
        request: of the job.
        jobs_folder: of the run: its requests, scripts, and a configuration that no later command changes.
        environment: of the job.

    Returns:
        The job's exit status.

    Raises:
        RuntimeError: if it has restarted too often without progress, or Slurm's programs fail.
    """
    label = label_of(environment)
    names = [request.stages[int(environment["SLURM_ARRAY_TASK_ID"])]] if request.is_array else request.stages
    attempts, kept = Attempts(attempts_file(jobs_folder, request.name, label)), _kept(request, names)
    about = {"job": label, "nodes": environment.get("SLURM_JOB_NODELIST", ""), **provenance(sys.argv)}
    idle = attempts.begin(attempt(kept, about, environment))
    _check_restarts(idle, request, attempts)
    print(f"job {label} on {about['nodes']}, start {len(attempts.all)}: {', '.join(names)}", flush=True)
    mark = jobs_folder / "attempts" / f".{request.name}-{label}.stopped"
    mark.unlink(missing_ok=True)
    variables = _environment(request, jobs_folder, environment, mark)
    ended = _supervised(_command(request, jobs_folder, names, environment), variables, label, mark)
    is_done = ended.status == 0 and _is_done(request, names)
    state = Control("RUNNING", is_preempted=False) if is_done else control(label)
    if is_done or is_finished(ended, state):
        attempts.end("finished", 0)
        return 0
    if not is_to_requeue(ended, state):
        attempts.end("failed" if state.state == "RUNNING" else "ended by Slurm", ended.status)
        return ended.status if ended.status > 0 else 1
    _check_restarts(idle + 1 if _kept(request, names) == kept else 0, request, attempts)
    attempts.end("requeued", ended.status)
    print(f"job {label} stopped before its end and goes back to the queue", flush=True)
    ask(["scontrol", "requeue", label])
    return STOPPED


def _kept(request: JobRequest, names: Sequence[str]) -> list[list[int]]:
    """What a restart of these stages goes on from."""
    folders = read_stages(Path(request.run_folder))
    return [reached(folders[stage]).kept for stage in (parted(name)[0] for name in names) if stage in folders]


def _is_done(request: JobRequest, names: Sequence[str]) -> bool:
    """Whether what these stages make is there; the report is always made anew."""
    folders = read_stages(Path(request.run_folder))
    for stage, part in (parted(name) for name in names if name != REPORT):
        if part is None and not (folders[stage] / ARTIFACT).is_file():
            return False
        if part is not None and part.missing(folders[stage], {split: TaskFiles.read(folders[TASK]).rows[split] for split in SPLITS}):
            return False
    return True


def _check_restarts(idle: int, request: JobRequest, attempts: Attempts) -> None:
    if idle > request.max_restarts:
        attempts.end("failed", 1)
        raise RuntimeError(
            f"{request.name} was restarted {request.max_restarts} times in a row without progress (launch.slurm.max_restarts): see what "
            "ended it above, then submit again; a longer launch.slurm.time or a smaller student.save_every may be all it needs"
        )


def _command(request: JobRequest, jobs_folder: Path, names: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    meeting = None
    if request.nodes > 1:
        meeting = rendezvous_of(environment, first_host(environment["SLURM_JOB_NODELIST"]), request.nodes)
    return steps(request, jobs_folder, names, meeting, environment.get("SLURM_CPUS_PER_TASK"))


def _environment(request: JobRequest, jobs_folder: Path, environment: Mapping[str, str], mark: Path) -> dict[str, str]:
    made = dict(environment)
    if request.runs == "worker":
        cpus = int(environment.get("SLURM_CPUS_PER_TASK") or cpu_count())
        made = worker_environment(request.processes, cpus, load_config(jobs_folder / RESOLVED).launch.device)
    made.pop(PARENT, None)  # the parent of a step is Slurm's
    # Where processes end one after another, torch's stores warn of it in a page each.
    return {"TORCH_CPP_LOG_LEVEL": "ERROR", **made, STOPPED_FILE: str(mark)}


def _supervised(command: Sequence[str], environment: Mapping[str, str], label: str, mark: Path) -> Ended:
    """Runs the steps; a signal to this process is passed on to every process of theirs."""
    due = 0.0
    with catching() as request, subprocess.Popen(command, env=environment) as process:
        while True:
            try:
                status = process.wait(timeout=_LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                if request.asked is not None and time.monotonic() > due:
                    due = time.monotonic() + _REPEAT_SECONDS
                    subprocess.run(["scancel", "--signal=USR1", label], check=False, capture_output=True)
                continue
            return Ended(status, status == STOPPED or mark.is_file(), request.asked is not None)


def main(arguments: Sequence[str]) -> int:
    """Runs the job of the request named on the command line; the exit status."""
    if len(arguments) != 1:
        print("usage: python -m launch.job REQUEST.json", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    try:
        return run(JobRequest.read(path), path.parent, os.environ)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
