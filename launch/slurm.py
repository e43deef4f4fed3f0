"""Job scripts and the command lines of Slurm's programs, as text and words: nothing here runs anything. Imports no torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.chain import REPORT, Job
from launch.cluster import SLURM_FOLDER, SiteConfig
from launch.config import Config
from launch.pipeline import TEACH
from launch.torchrun import Rendezvous, torchrun
from train.artifacts import Request

TEMPLATE = SLURM_FOLDER / "job.sbatch"
_SLOT = re.compile(r"@(options|environment|setup|command)@")
_FIRST_PORT, _NUM_PORTS = 20000, 10000
"""Below the range that Linux gives to outgoing connections."""


@dataclass(frozen=True, slots=True)
class JobRequest(Request):
    """What a job is asked to do; `launch.job` reads it on the first of its nodes."""

    name: str
    run_folder: str
    stages: list[str]
    """Of an array, what each index runs."""
    is_array: bool
    runs: str
    """`launch.chain.Runs`."""
    nodes: int
    processes: int
    """On each node."""
    max_restarts: int
    """In a row without progress."""
    srun: list[str]
    """Words in front of Python's arguments: srun's own options, the container, Python."""
    srun_options: list[str]


def job_request(job: Job, config: Config, run_folder: Path, site: SiteConfig, python: str) -> JobRequest:
    """What a job of the chain is asked to do.

    Args:
        job: of the chain.
        config: of the run.
        run_folder: absolute.
        site: the cluster.
        python: the interpreter that submits.
    """
    return JobRequest(
        name=job.name,
        run_folder=str(run_folder),
        stages=list(job.stages),
        is_array=job.indices is not None,
        runs=job.runs,
        nodes=job.nodes,
        processes=processes_of(config),
        max_restarts=config.launch.slurm.max_restarts,
        srun=[*site.container, site.python or python],
        srun_options=list(site.srun_options),
    )


def gpus_of(config: Config) -> int:
    """GPUs of each node; 0 where the CPU is wanted.

    Raises:
        ValueError: if nobody has said how many: a login node cannot look.
    """
    launch = config.launch
    if launch.device == "cpu":
        return 0
    if launch.gpus_per_node == "auto":
        raise ValueError("launch.gpus_per_node is auto, but Slurm must be told how many GPUs to give: set it, or launch.device to cpu")
    return launch.gpus_per_node


def processes_of(config: Config) -> int:
    """Processes of each node: one a GPU, or `launch.cpu_processes`."""
    return gpus_of(config) or config.launch.cpu_processes


def options(job: Job, config: Config, site: SiteConfig) -> list[str]:
    """The options of a job that hold no path: they stand in its script."""
    slurm, gpus = config.launch.slurm, gpus_of(config)
    # What runs on one node takes its processes one after another, and the report needs no GPU.
    taken = gpus if job.runs == "worker" else min(gpus, 0 if job.name == REPORT else 1)
    cpus = site.cpus_per_node if job.runs == "worker" or not gpus else _share(site.cpus_per_node, gpus)
    asked = {
        "job-name": f"{config.name}.{job.name}",
        "partition": slurm.partition or site.partition,
        "account": site.account,
        "qos": site.qos,
        "time": slurm.time,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": taken or None,
        "cpus-per-task": cpus,
        "array": job.array,
        "signal": f"B:USR1@{slurm.signal_seconds}",
        "open-mode": "append",
    }
    return [*(f"--{name}={value}" for name, value in asked.items() if value is not None), "--requeue", *site.sbatch_options]


def _share(cpus: int | None, gpus: int) -> int | None:
    return None if cpus is None else max(1, cpus // gpus)


def script(template: str, job_options: Sequence[str], site: SiteConfig, command: Sequence[str]) -> str:
    """A job script.

    Args:
        template: `slurm/job.sbatch`.
        job_options: of sbatch.
        site: the cluster.
        command: what the job becomes.
    """
    filled = {
        "options": "\n".join(f"#SBATCH {option}" for option in job_options),
        "environment": "\n".join(f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()),
        "setup": site.setup.rstrip("\n"),
        "command": shlex.join(command),
    }
    return _SLOT.sub(lambda slot: filled[slot[1]], template)


def job_command(python: str, request: Path) -> list[str]:
    """The command line that a job's script becomes."""
    return [python, "-m", "launch.job", str(request)]


def submission(path: Path, log: Path, after: Sequence[str] = (), *, only_test: bool = False) -> list[str]:
    """The command line that submits a script.

    Args:
        path: of the script.
        log: its output; see `log_pattern`.
        after: numbers of jobs that must succeed.
        only_test: ask whether Slurm would take it.
    """
    waits = [f"--dependency=afterok:{':'.join(after)}"] if after else []
    # Without --kill-on-invalid-dep a job whose dependency failed would wait for ever.
    return [
        "sbatch",
        "--parsable",
        *(["--test-only"] if only_test else []),
        f"--output={log}",
        *waits,
        "--kill-on-invalid-dep=yes",
        str(path),
    ]


def log_pattern(folder: Path, job: Job) -> Path:
    """Where a job's output goes, as sbatch takes it: a percent sign of the path itself is doubled."""
    number = "%j" if job.indices is None else "%A_%a"
    return Path(f"{folder}".replace("%", "%%")) / f"{job.name}-{number}.out"


def steps(request: JobRequest, folder: Path, names: Sequence[str], rendezvous: Rendezvous | None, cpus: str | None) -> list[str]:
    """The srun of a job.

    Args:
        request: of the job.
        folder: that holds the configuration.
        names: of the stages it runs now.
        rendezvous: where the processes of several nodes meet; None for one node.
        cpus: of each task, as Slurm says: srun does not take them over from sbatch by itself.
    """
    several = ["--nodes", str(request.nodes), "--ntasks", str(request.nodes), "--ntasks-per-node", "1"]
    cores = [] if cpus is None else ["--cpus-per-task", cpus]
    started = ["srun", *several, *cores, "--kill-on-bad-exit=1", "--wait=60", *request.srun_options, *request.srun]
    if request.runs == "node":
        return [*started, "-m", "launch.node", str(folder), *names]
    # A node's view of a shared folder may be seconds old: the last part of the records may not have seen that the others were there.
    first = [TEACH] if names[0].startswith("train.") else []
    return [*started, "-m", "launch.agent", *torchrun(request.processes, rendezvous), "-m", "launch.worker", str(folder), *first, *names]


def rendezvous_of(environment: Mapping[str, str], host: str, nodes: int) -> Rendezvous:
    """The rendezvous of a job by its number, and the number of its restarts.

    Args:
        environment: of the job.
        host: its first node.
        nodes: how many it has.
    """
    number = environment["SLURM_JOB_ID"]
    return Rendezvous(nodes, host, _FIRST_PORT + int(number) % _NUM_PORTS, f"{number}-{environment.get('SLURM_RESTART_COUNT', '0')}")
