from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.attempts import Attempt
from launch.config import validate
from launch.queueing import Control, Queued, parse_control, parse_queue
from launch.status import error_of, judge, wandb_link
from launch.submission import Submitted


def starts(*ended: str | None) -> list[Attempt]:
    return [Attempt("now", n, [], {}, end) for n, end in enumerate(ended)]


def job(state: str, reason: str = "None") -> Queued:
    return Queued("12", state, reason)


BLOCKED = "teach, which failed"


@pytest.mark.parametrize(
    ("known", "noted", "blocked", "expected"),
    [
        (job("RUNNING"), starts(None), None, ("running", "")),
        (job("RUNNING"), starts("requeued", None), None, ("running", "start 2")),
        (job("COMPLETING"), starts(None), None, ("running", "its processes are ending")),
        (job("PENDING", "Dependency"), [], None, ("waiting", "for teach")),
        (job("PENDING", "Priority"), [], None, ("queued", "Slurm: Priority")),
        (job("PENDING", "BeginTime"), starts("requeued"), None, ("requeued", "was stopped, and goes on from what it kept (BeginTime)")),
        (job("COMPLETED"), starts("finished"), None, ("done", "")),
        (job("FAILED", "NonZeroExitCode"), starts("failed"), None, ("failed", "Slurm: FAILED")),
        (job("TIMEOUT", "TimeLimit"), starts(None), None, ("failed", "Slurm: TIMEOUT")),
        (job("OUT_OF_MEMORY"), starts(None), None, ("failed", "Slurm: OUT_OF_MEMORY")),
        (job("CANCELLED"), starts("ended by Slurm"), None, ("cancelled", "submit again to go on")),
        (job("CANCELLED"), [], None, ("cancelled", "before it started")),
        (job("CANCELLED", "DependencyNeverSatisfied"), [], BLOCKED, ("not run", f"needs {BLOCKED}; submit again when that is mended")),
        # Slurm has forgotten it: what the job noted itself.
        (None, starts("finished"), None, ("done", "")),
        (None, starts("failed"), None, ("failed", "Slurm: FAILED")),
        (None, starts("ended by Slurm"), None, ("cancelled", "submit again to go on")),
        (None, [], BLOCKED, ("not run", f"needs {BLOCKED}; submit again when that is mended")),
        (
            None,
            starts(None),
            None,
            ("unknown", "Slurm has forgotten it, and it noted no end: it was killed or cancelled; submit again"),
        ),
    ],
)
def test_what_became_of_a_job(known: Queued | None, noted: list[Attempt], blocked: str | None, expected: tuple[str, str]) -> None:
    assert judge(known, noted, blocked, ["teach"]) == expected


def test_what_squeue_prints_is_read() -> None:
    assert parse_queue("12|RUNNING|None\n13_4|PENDING|(a|b)\n\nslurm: noise\n") == {
        "12": Queued("12", "RUNNING", "None"),
        "13_4": Queued("13_4", "PENDING", "(a|b)"),
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("JobId=1 JobState=RUNNING Reason=None PreemptEligibleTime=x PreemptTime=None Z=1\n", Control("RUNNING", is_preempted=False)),
        ("JobId=1 JobState=RUNNING PreemptTime=2026-11-28T21:40:31", Control("RUNNING", is_preempted=True)),
        ("JobId=1 JobState=COMPLETING", Control("COMPLETING", is_preempted=False)),
        ("", Control("UNKNOWN", is_preempted=False)),
    ],
)
def test_what_scontrol_prints_is_read(text: str, expected: Control) -> None:
    assert parse_control(text) == expected


def test_jobs_and_tasks_of_an_array_are_found_by_their_stage() -> None:
    single = Submitted("evaluate", "7", ["evaluate.a", "evaluate.b"], None, [])
    assert (single.labels_of("evaluate.b"), list(single.labels), single.labels_of("x")) == (["7"], ["7"], [])
    array = Submitted("teach", "8", ["teach:0/3", "teach:1/3", "teach:2/3"], [0, 2], [])
    assert (array.labels_of("teach"), list(array.labels)) == (["8_0", "8_2"], ["8_0", "8_2"])
    assert Submitted("deploy", "9", ["deploy.a", "deploy.b"], [1], []).labels_of("deploy.a") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nerror: first\nb\nerror: the last one\nsrun: error: node1: task 0: Exited\n", "the last one"),
        ("1\n2\n\n3\n4\n5\n6\n", "2 / 3 / 4 / 5 / 6"),
        ("", ""),
    ],
)
def test_the_error_is_the_last_that_was_told(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(text)
    assert error_of(tmp_path / "log") == expected
    assert error_of(tmp_path / "none") == ""


def test_the_end_of_a_long_output_is_read(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"\xff" * 200000 + b"\nerror: here\n")
    assert error_of(tmp_path / "log") == "here"


@pytest.mark.parametrize(
    ("folders", "entity", "expected"),
    [
        (["run-20261128_211503-abc", "run-20261128_221503-def-1"], "us", "https://wandb.ai/us/mine/runs/def-1"),
        (["offline-run-20261128_211503-abc"], "us", ""),
        (["run-20261128_211503-abc"], None, ""),
        ([], "us", ""),
    ],
)
def test_a_run_of_wandb_has_an_address(folders: list[str], entity: str | None, expected: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "name": "one",
        "task": {"train": "a.jsonl", "test": "b.jsonl", "metric": "text"},
        "teacher": {"source": "recorded", "label": "{a}", "rationale": "{b}"},
        "student": {"model": "OWNER/small"},
        "tracking": {"project": "mine", **({"entity": entity} if entity else {})},
    }
    for folder in folders:
        (tmp_path / "wandb" / folder).mkdir(parents=True)
    assert wandb_link(tmp_path, validate(values, "file")) == expected
