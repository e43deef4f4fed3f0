"""What a job does on its first node, with programs that stand in for Slurm's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.attempts import Attempts, attempt
from launch.job import Ended, is_to_requeue
from launch.queueing import Control
from launch.rundir import write_stages
from launch.slurm import JobRequest
from train.artifacts import TaskFiles

ROOT = Path(__file__).resolve().parents[2]
RUNNING = "JobId=12 JobName=x JobState=RUNNING Reason=None PreemptEligibleTime=now PreemptTime=None"
PREEMPTED = RUNNING.replace("PreemptTime=None", "PreemptTime=2026-11-28T21:40:31")
CANCELLED = RUNNING.replace("RUNNING", "COMPLETING")


@pytest.mark.parametrize(
    ("ended", "state", "expected"),
    [
        (Ended(75, is_stopped=True, is_asked=False), Control("RUNNING", is_preempted=False), True),
        (Ended(137, is_stopped=False, is_asked=True), Control("RUNNING", is_preempted=False), True),  # killed in its start
        (Ended(143, is_stopped=False, is_asked=False), Control("RUNNING", is_preempted=True), True),
        (Ended(1, is_stopped=False, is_asked=False), Control("RUNNING", is_preempted=False), False),  # failed
        (Ended(75, is_stopped=True, is_asked=True), Control("COMPLETING", is_preempted=False), False),  # cancelled
        (Ended(75, is_stopped=True, is_asked=True), Control("COMPLETING", is_preempted=True), False),
        (Ended(75, is_stopped=True, is_asked=True), Control("PENDING", is_preempted=False), False),  # requeued by hand
    ],
)
def test_only_what_stopped_and_was_not_cancelled_goes_back_to_the_queue(ended: Ended, state: Control, expected: bool) -> None:
    assert is_to_requeue(ended, state) is expected


class Job:
    """A job in a folder, whose steps are a script of the test."""

    def __init__(self, tmp_path: Path, *, state: str = RUNNING, steps: str = "exit 0", **changes: Any) -> None:
        self.folder, self.bin = tmp_path / "run", tmp_path / "bin"
        (self.folder / "jobs").mkdir(parents=True)
        self.bin.mkdir()
        self.stage = self.folder / "train.a-1"
        write_stages(self.folder, {"teach": self.folder / "teach-1", "train.a": self.stage})
        (self.folder / "jobs" / "config.yaml").write_text(
            "name: run\ntask: {train: a.jsonl, test: b.jsonl, metric: text}\nteacher: {source: recorded, label: '{a}', rationale: '{b}'}\n"
            "student: {model: OWNER/small}\nlaunch: {device: cpu}\n"
        )
        values: dict[str, Any] = {"name": "train.a", "run_folder": str(self.folder), "stages": ["train.a"], "is_array": False}
        values |= {"runs": "worker", "nodes": 1, "processes": 1, "max_restarts": 1, "srun": ["python"], "srun_options": [], **changes}
        JobRequest(**values).write(self.folder / "jobs" / "job.json")
        self.program("srun", steps)
        self.program("scontrol", f'case "$1 $2" in "show hostnames") echo node7; echo node8;; "show job") echo "{state}";; esac')
        self.program("scancel", f"kill -USR1 $(cat {tmp_path}/pid)")

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/bash\nprintf "%s " {name} "$@" >> {self.bin}/calls; echo >> {self.bin}/calls\n{body}\n')
        path.chmod(0o755)

    def start(self, **variables: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
        environment |= {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node[7-8]", "HF_TOKEN": "planted", **variables}
        command = [sys.executable, "-m", "launch.job", str(self.folder / "jobs" / "job.json")]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, **variables: str) -> tuple[int, str]:
        process = self.start(**variables)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    @property
    def calls(self) -> list[str]:
        return [line.strip() for line in (self.bin / "calls").read_text().splitlines()]

    def attempts(self, label: str = "12") -> list[dict[str, Any]]:
        text = (self.folder / "jobs" / "attempts" / f"train.a-{label}.json").read_text()
        assert "planted" not in text
        return json.loads(text)


STOPS = 'touch "$STEPDOWN_STOPPED_FILE"; exit 137'


def test_a_job_whose_steps_end_well_is_finished(tmp_path: Path) -> None:
    job = Job(tmp_path)
    assert job.run() == (0, "job 12 on node[7-8], start 1: train.a\n")
    (found,) = job.attempts()
    assert (found["ended"], found["restart"], found["kept"], found["about"]["nodes"]) == ("finished", 0, [[0, 0, 0]], "node[7-8]")
    assert found["about"]["environment"]["SLURM_JOB_ID"] == "12"
    assert [call.partition(" ")[0] for call in job.calls] == ["srun", "scontrol"]


def test_a_job_whose_results_are_there_is_finished_whatever_slurm_is_doing(tmp_path: Path) -> None:
    job = Job(tmp_path, state=PREEMPTED, steps=f"touch {tmp_path}/run/train.a-1/artifact.json")
    job.stage.mkdir()
    assert job.run()[0] == 0
    assert len(job.calls) == 1


@pytest.mark.parametrize(("state", "status", "ended"), [(PREEMPTED, 75, "requeued"), (CANCELLED, 1, "ended by Slurm")])
def test_a_status_of_zero_is_no_result(state: str, status: int, ended: str, tmp_path: Path) -> None:
    """Of srun where it gave up waiting for steps that Slurm was ending."""
    job = Job(tmp_path, state=state, steps="exit 0")
    assert job.run()[0] == status
    assert job.attempts()[0]["ended"] == ended


def test_a_part_of_the_records_is_finished_with_its_shards(tmp_path: Path) -> None:
    job = Job(tmp_path, state=CANCELLED, is_array=True, stages=["teach:0/2", "teach:1/2"])
    folders = {"task": job.folder / "task-1", "teach": job.folder / "teach-1"}
    write_stages(job.folder, folders)
    TaskFiles("digest", {"train": 300, "validation": 1, "test": 5}, {}).write(folders["task"])
    folders["teach"].mkdir()
    (folders["teach"] / "train-000000.parquet").touch()
    variables = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0"}
    assert job.run(**variables)[0] == 1
    (folders["teach"] / "test-000000.parquet").touch()
    assert job.run(**variables)[0] == 0


def test_processes_of_several_nodes_meet_on_the_first(tmp_path: Path) -> None:
    job = Job(tmp_path, nodes=2)
    job.run(SLURM_CPUS_PER_TASK="4", SLURM_RESTART_COUNT="2")
    assert job.calls[0] == "scontrol show hostnames node[7-8]"
    assert "--cpus-per-task 4 " in job.calls[1]
    assert "--rdzv-endpoint node7:20012 --rdzv-id 12-2 " in job.calls[1]


def test_a_step_knows_its_device_and_not_our_process_as_its_parent(tmp_path: Path) -> None:
    job = Job(tmp_path, steps=f"env > {tmp_path}/env")
    assert job.run(STEPDOWN_PARENT_PID="1", SLURM_CPUS_PER_TASK="6", OMP_NUM_THREADS="6")[0] == 0
    variables = (tmp_path / "env").read_text().splitlines()
    assert {"CUDA_VISIBLE_DEVICES=", "OMP_NUM_THREADS=6", "HF_TOKEN=planted"} <= set(variables)
    assert not any(line.startswith("STEPDOWN_PARENT_PID") for line in variables)


def test_a_preempted_job_puts_itself_back_and_a_cancelled_one_does_not(tmp_path: Path) -> None:
    job = Job(tmp_path / "a", state=PREEMPTED, steps=STOPS)
    assert job.run() == (75, "job 12 on node[7-8], start 1: train.a\njob 12 stopped before its end and goes back to the queue\n")
    assert job.calls[-2:] == ["scontrol show job --oneliner 12", "scontrol requeue 12"]
    assert job.attempts()[0]["ended"] == "requeued"
    job = Job(tmp_path / "b", state=CANCELLED, steps=STOPS)
    assert job.run() == (137, "job 12 on node[7-8], start 1: train.a\n")
    assert job.calls[-1] == "scontrol show job --oneliner 12"
    assert job.attempts()[0]["ended"] == "ended by Slurm"


def test_a_failed_job_fails(tmp_path: Path) -> None:
    job = Job(tmp_path, steps="exit 3")
    assert job.run()[0] == 3
    assert job.attempts()[0]["ended"] == "failed"


def test_a_task_of_an_array_runs_its_share_and_requeues_only_itself(tmp_path: Path) -> None:
    job = Job(tmp_path, steps=STOPS, is_array=True, stages=["teach:0/2", "teach:1/2"])
    variables = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"}
    assert job.run(**variables)[1].startswith("job 12_1 on node[7-8], start 1: teach:1/2\n")
    assert job.calls[0].endswith("teach:1/2")
    assert job.calls[-1] == "scontrol requeue 12_1"
    assert job.attempts("12_1")


def test_the_signal_before_the_time_limit_reaches_the_steps(tmp_path: Path) -> None:
    steps = f"trap 'touch \"$STEPDOWN_STOPPED_FILE\"; exit 75' USR1; echo $$ > {tmp_path}/pid; while true; do sleep 0.05; done"
    job = Job(tmp_path, steps=steps)
    process = job.start()
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").is_file() and (tmp_path / "pid").read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output.splitlines()[-1]) == (75, "job 12 stopped before its end and goes back to the queue")
    assert job.calls[1:] == ["scancel --signal=USR1 12", "scontrol show job --oneliner 12", "scontrol requeue 12"]


def test_restarts_without_progress_end_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path, steps=STOPS)
    told = "error: train.a was restarted 1 times in a row without progress (launch.slurm.max_restarts): see what ended it above"
    assert job.run()[0] == 75
    status, output = job.run(SLURM_RESTART_COUNT="1")
    assert (status, told in output) == (1, True)
    assert job.calls.count("scontrol requeue 12") == 1
    assert [found["ended"] for found in job.attempts()] == ["requeued", "failed"]
    # Slurm restarts a job by itself, too, where a node fails.
    status, output = job.run(SLURM_RESTART_COUNT="2")
    assert (status, told in output) == (1, True)
    assert sum(call.startswith("srun") for call in job.calls) == 2


def test_progress_makes_up_for_restarts(tmp_path: Path) -> None:
    state = '{"step": %d, "state": {}, "tag": "t", "processes": 1, "zero_stage": 0}'
    job = Job(tmp_path, steps=STOPS)
    (job.stage / "state").mkdir(parents=True)
    for restart in range(5):
        (job.stage / "state" / "resume.json").write_text(state % restart)
        assert job.run(SLURM_RESTART_COUNT=str(restart))[0] == 75
    assert job.run(SLURM_RESTART_COUNT="5")[0] == 1


@pytest.mark.parametrize(
    ("kept", "idle"), [([0], 0), ([0, 0], 1), ([0, 0, 0], 2), ([0, 5], 0), ([5, 0, 0], 1), ([0, 0, 5, 5, 5], 2), ([0, 5, 0], 0)]
)
def test_idle_restarts_are_those_up_to_the_last(kept: list[int], idle: int, tmp_path: Path) -> None:
    attempts = Attempts(tmp_path / "a.json")
    found = [attempts.begin(attempt([[0, step, 0]], {}, {})) for step in kept]
    assert found[-1] == idle
    assert Attempts(tmp_path / "a.json").idle == idle
