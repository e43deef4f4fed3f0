"""Asks Slurm's programs and reads what they say. Imports no torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESIZING", "SUSPENDED"}
"""States of a job that is not over."""
_COLUMNS = "%i|%T|%r"
_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Queued:
    """What squeue says of a job, or of one task of an array."""

    label: str
    """12, or 12_3."""
    state: str
    reason: str

    @property
    def is_active(self) -> bool:
        """It is not over."""
        return self.state in ACTIVE


def has_slurm() -> bool:
    """Whether Slurm's programs are here."""
    return shutil.which("sbatch") is not None


def ask(command: Sequence[str]) -> str:
    """Runs a program of Slurm and gives what it prints.

    Raises:
        RuntimeError: if it is not here, or fails: with its own words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is not here: call stepdown on a login node of a Slurm cluster") from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{command[0]} did not answer within {_SECONDS} s: Slurm's controller may be down; try again later") from error
    if done.returncode:
        told = " ".join(line.removeprefix(f"{command[0]}: ").removeprefix("error: ") for line in done.stderr.strip().splitlines())
        raise RuntimeError(told or f"{command[0]} ended with status {done.returncode}")
    return done.stdout


def queued(numbers: Collection[str]) -> dict[str, Queued]:
    """The jobs of these numbers, array tasks one by one, as far as Slurm still knows them (some minutes after their end).

    Raises:
        RuntimeError: if Slurm does not answer.
    """
    if not numbers:
        return {}
    # All of the user's: asked for one by one, squeue fails where it has forgotten a job.
    found = parse_queue(ask(["squeue", "--me", "--noheader", "--array", "--states=all", f"--format={_COLUMNS}"]))
    return {label: job for label, job in found.items() if label.partition("_")[0] in numbers}


def parse_queue(text: str) -> dict[str, Queued]:
    """What squeue printed, by label."""
    rows = [line.strip().split("|", 2) for line in text.splitlines() if line.count("|") >= 2]
    return {label: Queued(label, state, reason) for label, state, reason in rows}


@dataclass(frozen=True, slots=True)
class Control:
    """What scontrol says of a job."""

    state: str
    is_preempted: bool
    """Slurm has begun to take its nodes away."""


def control(label: str) -> Control:
    """A job by its label.

    Raises:
        RuntimeError: if Slurm does not answer, or has forgotten it.
    """
    return parse_control(ask(["scontrol", "show", "job", "--oneliner", label]))


def parse_control(text: str) -> Control:
    """What scontrol printed of one job."""
    fields = dict(re.findall(r"(?:^|\s)(JobState|PreemptTime)=(\S+)", text))
    return Control(fields.get("JobState", "UNKNOWN"), fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A"))


def first_host(nodes: str) -> str:
    """The first node of a list as Slurm writes it, such as node[1-2].

    Raises:
        RuntimeError: if scontrol gives none.
    """
    hosts = ask(["scontrol", "show", "hostnames", nodes]).split()
    if not hosts:
        raise RuntimeError(f"scontrol show hostnames gives no node of {nodes!r}")
    return hosts[0]


def label_of(environment: Mapping[str, str]) -> str:
    """The job that runs here.

    The number of the last task of an array is also the number of the whole array, so a task is named by both of its numbers.
    """
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]
