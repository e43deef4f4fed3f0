"""What `stepdown submit`, `status`, `cancel` and `logs` do, with programs that stand in for Slurm's."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from launch import cli
from launch.config import Config, validate
from launch.rundir import read_stages
from launch.submission import read_submission
from launch.submit import submit
from train.artifacts import ARTIFACT

SMALL: dict[str, Any] = {"from_scratch": "t5", "d_model": 16, "layers": 1, "heads": 2}
CONFIG: dict[str, Any] = {
    "name": "mine",
    "task": {
        "train": "builtin:arithmetic",
        "test": "builtin:arithmetic",
        "metric": "number",
        "arithmetic": {"train_rows": 9, "test_rows": 2},
    },
    "teacher": {"source": "recorded", "label": "{label}", "rationale": "{rationale}"},
    "student": {"model": SMALL, "baselines": []},
    "launch": {"device": "cpu", "nodes": 2},
}
CHAIN = ["teach", "train.step_by_step", "deploy", "evaluate", "report"]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that note how they were called; sbatch gives the numbers 101, 102, ..."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    program(folder, "sbatch", f'[[ "$*" == *--test-only* ]] || echo $((100 + $(grep -c "^sbatch --parsable --output" {folder}/calls)))')
    program(folder, "squeue", f"cat {folder}/queue 2>/dev/null || true")
    program(folder, "scancel", "")
    return folder


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f'#!/bin/bash\necho {name} "$@" >> {folder}/calls\n{body}\n')
    path.chmod(0o755)


def calls(folder: Path, name: str) -> list[str]:
    return [line for line in (folder / "calls").read_text().splitlines() if line.startswith(f"{name} ")]


def config(**sections: Any) -> Config:
    return validate({**CONFIG, **sections}, "file")


def submitted(made: Config, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=300)
    submit(made, console, **options)
    return console.file.getvalue()  # type: ignore[attr-defined]


def command(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200"})
    assert done.exit_code == status, done.output
    return done.output


# ----- submit -----


def test_a_chain_is_tried_first_and_then_queued_each_job_behind_those_it_needs(slurm: Path) -> None:
    told = submitted(config())
    made = calls(slurm, "sbatch")
    assert ["--test-only" in line for line in made] == [True] * 5 + [False] * 5
    assert [f"--dependency=afterok:{n}" in line for n, line in zip(range(101, 105), made[6:], strict=True)] == [True] * 4
    assert "--dependency" not in made[5]
    assert all("--kill-on-invalid-dep=yes" in line for line in made)
    assert [(job.name, job.number) for job in read_submission(Path("runs/mine"))] == list(
        zip(CHAIN, map(str, range(101, 106)), strict=True)
    )
    assert "     103  deploy[0]           1 node  after train.step_by_step\n" in told
    assert told.endswith("`stepdown status runs/mine` shows how it goes\n")
    folder = Path("runs/mine")
    assert json.loads((folder / "provenance.json").read_text())["commit"]
    assert (folder / "jobs" / "config.yaml").read_bytes() == (folder / "config.yaml").read_bytes()
    assert {path.stem for path in (folder / "jobs").glob("*.sbatch")} == set(CHAIN)


def test_a_dry_run_asks_nobody_and_queues_nothing(slurm: Path) -> None:
    for name in ("sbatch", "squeue", "scancel"):
        (slurm / name).unlink()
    (slurm / "calls").touch()
    told = submitted(config(), dry_run=True)
    assert (slurm / "calls").read_text() == ""
    assert told.count("\n  sbatch --parsable") == 5
    assert "'--dependency=afterok:<number of teach>'" in told
    assert read_submission(Path("runs/mine")) == []
    assert {path.stem for path in Path("runs/mine/jobs").glob("*.sbatch")} == set(CHAIN)


def test_without_slurm_the_way_out_is_told(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match=r"\Asbatch is not here: submit on a login node .* --dry-run, or use `stepdown run`\Z"):
        submitted(config())
    assert not Path("runs").exists()


def test_what_slurm_refuses_is_told_and_nothing_is_queued(slurm: Path) -> None:
    program(slurm, "sbatch", 'if [[ "$*" == *deploy.sbatch ]]; then echo "sbatch: error: no such partition" >&2; exit 1; fi')
    with pytest.raises(ValueError, match=r"\ASlurm refuses deploy: no such partition. Nothing was queued; launch.nodes, "):
        submitted(config())
    assert all("--test-only" in line for line in calls(slurm, "sbatch"))
    assert read_submission(Path("runs/mine")) == []


def test_a_chain_that_breaks_off_is_taken_back(slurm: Path) -> None:
    program(
        slurm, "sbatch", 'case "$*" in *--test-only*) ;; *teach.sbatch) echo "101;here";; *) echo "sbatch: error: full" >&2; exit 1;; esac'
    )
    with pytest.raises(RuntimeError, match=r"\Afull; what had been queued of this chain was cancelled\Z"):
        submitted(config())
    assert calls(slurm, "scancel") == ["scancel 101"]


def test_a_run_whose_jobs_are_in_the_queue_is_not_submitted_again(slurm: Path) -> None:
    submitted(config())
    (slurm / "queue").write_text("101|COMPLETED|None\n102|PENDING|Resources\n777|RUNNING|None\n")
    with pytest.raises(RuntimeError, match=r"\Aruns/mine has jobs in the queue \(102\): wait for them, `stepdown cancel runs/mine`, or "):
        submitted(config())
    (slurm / "queue").write_text("102|FAILED|NonZeroExitCode\n777|RUNNING|None\n")
    submitted(config())


def test_a_run_with_nothing_missing_says_so(slurm: Path) -> None:
    submitted(config(), dry_run=True)
    for folder in read_stages(Path("runs/mine")).values():
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / ARTIFACT).exists():
            (folder / ARTIFACT).touch()
    assert submitted(config()).endswith("every stage is done: `stepdown report runs/mine` shows the ladder\n")
    assert not (slurm / "calls").exists()


def test_a_backslash_in_the_folder_is_refused(slurm: Path) -> None:
    with pytest.raises(ValueError, match=r"\Aoutput: the run's folder .*a\\b/mine holds a backslash, which Slurm does not take"):
        submitted(config(output="a\\b"))


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "MY_SERVER"])
def test_secrets_are_nowhere_in_the_run_folder_and_refused_where_a_user_puts_them(
    name: str, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "planted-secret")
    endpoint = {"url": "http://localhost:1/v1", "key_variable": "MY_SERVER"}
    served = config(teacher={"source": "endpoint", "model": "m", "endpoint": endpoint})
    submitted(served)
    files = [path for path in Path("runs").rglob("*") if path.is_file()]
    assert len(files) > 12
    assert not [path for path in files if b"planted-secret" in path.read_bytes()]
    Path("site.yaml").write_text("setup: export X=planted-secret\n")
    (slurm / "calls").unlink()
    told = rf"\Athe value of {name} would stand in .*teach.sbatch: take it out of the configuration and the site file"
    with pytest.raises(ValueError, match=told):
        submitted(served, site=Path("site.yaml"))
    assert not [path for path in Path("runs").rglob("*") if path.is_file() and b"planted-secret" in path.read_bytes()]
    with pytest.raises(ValueError, match=rf"\Athe value of {name} would stand in runs/mine/config.yaml"):
        submitted(
            served.model_copy(update={"output": "runs", "tracking": served.tracking.model_copy(update={"project": "planted-secret"})})
        )


# ----- status, cancel, logs -----


def test_status_shows_every_stage_with_its_job_and_why_it_stopped(slurm: Path) -> None:
    submitted(config())
    folder = Path("runs/mine")
    train = read_stages(folder)["train.step_by_step"]
    train.mkdir()
    (train / "log.jsonl").write_text('{"step": 7, "loss": 1.25}\n{"step": 8, "validation_loss": 2}\n')
    (folder / "logs" / "train.step_by_step-102.out").write_text("job 102\nerror: the loss is not finite at step 8\nsrun: error: node1: 1\n")
    (slurm / "queue").write_text("101|RUNNING|None\n102|FAILED|NonZeroExitCode\n103_0|CANCELLED|DependencyNeverSatisfied\n")
    shown = command("status", "mine")
    assert [line.split()[:3] for line in shown.splitlines() if line.startswith(("  task", "  teach", "  train", "  deploy"))] == [
        ["task", "done"],
        ["teach", "running", "101"],
        ["train.step_by_step", "failed", "102"],
        ["deploy.ctranslate2-int8", "not", "run"],
    ]
    assert "step 7, loss 1.250" in shown
    assert "train.step_by_step: Slurm: FAILED: the loss is not finite at step 8\n" in shown
    assert "deploy.ctranslate2-int8: needs train.step_by_step, which failed; submit again when that is mended\n" in shown
    assert "report: needs evaluate, which was not run; submit again when that is mended\n" in shown


def test_a_report_that_failed_says_why(slurm: Path) -> None:
    submitted(config())
    Path("runs/mine/logs/report-105.out").write_text("error: no finished evaluation to report\n")
    (slurm / "queue").write_text("105|FAILED|NonZeroExitCode\n")
    assert "report: Slurm: FAILED: no finished evaluation to report\n" in command("status", "mine")


def test_a_run_that_was_never_submitted_has_a_status_too(slurm: Path) -> None:
    submitted(config(), dry_run=True)
    (slurm / "squeue").unlink()
    assert "not submitted" in command("status", "mine")


def test_cancel_ends_what_is_not_over(slurm: Path) -> None:
    submitted(config())
    (slurm / "queue").write_text("101|COMPLETED|None\n102|RUNNING|None\n103_0|PENDING|Dependency\n")
    assert command("cancel", "mine") == "cancelled: 102, 103_0\n"
    assert calls(slurm, "scancel") == ["scancel 102 103"]
    (slurm / "queue").write_text("")
    assert command("cancel", "mine") == "no job of this run is in the queue\n"


def test_logs_are_those_of_the_last_submission(slurm: Path) -> None:
    submitted(config())
    assert "error: teach has written nothing yet: `stepdown status runs/mine` says what it waits for" in command(
        "logs", "mine", "teach", status=1
    )
    (Path("runs/mine/logs") / "teach-101.out").write_text("ready\n")
    assert command("logs", "mine", "teach") == "ready\n"
    assert "has no stage nothing; it has: teach, train.step_by_step, deploy.ctranslate2-int8, " in command(
        "logs", "mine", "nothing", status=1
    )


# ----- run, on several nodes without Slurm -----


def test_run_tells_what_to_start_on_each_node_and_ends(slurm: Path) -> None:
    Path("run.yaml").write_text(json.dumps({**CONFIG, "launch": {"device": "cpu", "nodes": 2, "cpu_processes": 3}}))
    told = command("run", "run.yaml", status=1)
    lines = [line for line in told.splitlines() if line.startswith("node ")]
    assert [line[:8] for line in lines] == ["node 0: ", "node 1: "]
    for line, is_host in zip(lines, ("true", "false"), strict=True):
        assert "--nnodes 2 --nproc-per-node 3 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 --rdzv-id mine" in line
        assert f"--rdzv-conf is_host={is_host} --max-restarts 0 -m launch.worker runs/mine teach train.step_by_step" in line
    assert "error: launch.nodes is 2, and `stepdown run` starts processes on this machine only: start the lines above together" in told
    assert "`stepdown submit` does all this" in told
