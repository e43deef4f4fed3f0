"""Whole runs as chains of jobs on a real Slurm of two nodes: what happens to them, and what `stepdown status` says of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.progress import reached
from launch.rundir import read_stages
from train.tracking import LOG_FILE, read_log

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

SECRETS = {"WANDB_API_KEY": "wandb-0123456789abcdef", "HF_TOKEN": "hf_planted0123456789", "OPENAI_API_KEY": "sk-planted0123456789"}
TARGETS = ["ctranslate2-int8", "ctranslate2-float32"]
TRAIN = "train.step_by_step_soft"


@pytest.fixture(autouse=True)
def _empty_queue(cluster: Any) -> Iterator[None]:
    yield
    cluster.drain()


def write(folder: Path, config: dict[str, Any], **sections: Any) -> None:
    launch = {"device": "cpu", "nodes": 2}
    (folder / "run.yaml").write_text(yaml.safe_dump({**config, "launch": launch, **sections}))


ROW = re.compile(r"^  (\S+(?: \d/\d)?) +(\S.*?)(?: {2,}([\d_]+(?:, [\d_]+)*))?(?: {2,}.*)?$", re.MULTILINE)


def table(cluster: Any, folder: Path, run: str = "tiny") -> dict[str, tuple[str, str]]:
    """What `stepdown status` shows: stage -> (state, job)."""
    return {stage: (state, job) for stage, state, job in ROW.findall(cluster.stepdown(folder, "status", run)) if stage != "stage"}


def states(cluster: Any, folder: Path, run: str = "tiny") -> dict[str, str]:
    return {stage: state for stage, (state, _) in table(cluster, folder, run).items()}


def starts(run_folder: Path, name: str) -> list[dict[str, Any]]:
    (path,) = (run_folder / "jobs" / "attempts").glob(f"{name}-*.json")
    return json.loads(path.read_text())


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_log(folder / LOG_FILE) if "loss" in line}


def test_a_chain_is_preempted_loses_a_task_and_is_mended(cluster: Any, wait: Any, tiny: dict[str, Any], tmp_path: Path) -> None:
    student = {**tiny["student"], "baselines": [], "epochs": 40, "save_every": 1000}
    write(tmp_path, tiny, student=student, deploy={"targets": TARGETS}, evaluate={"timed_examples": 1})
    run = tmp_path / "runs" / "tiny"
    told = cluster.stepdown(tmp_path, "submit", "run.yaml", **SECRETS)
    chain = [line.split(maxsplit=2)[1:] for line in told.splitlines() if re.match(r" *\d+  ", line)]
    assert [name for name, _ in chain] == ["tune", "teach[0-1]", TRAIN, "deploy[0-1]", "evaluate", "report"]
    folders = read_stages(run)
    assert states(cluster, tmp_path)[TRAIN] == "waiting"
    refused = cluster.stepdown(tmp_path, "submit", "run.yaml", status=1)
    assert "has jobs in the queue" in refused

    # A job of higher priority takes both nodes in the middle of the training.
    wait(lambda: (reached(folders[TRAIN]).step or 0) > 60, "60 steps")
    found = table(cluster, tmp_path)
    number = found[TRAIN][1]
    assert found[TRAIN][0] == "running"
    assert {found[stage][0] for stage in ("tune", "teach")} == {"done"}
    folders["deploy.ctranslate2-float32"].write_text("stands in the way")
    other = cluster.ask("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=srun sleep 3")
    wait(lambda: cluster.state(other) == "RUNNING", "the other job")
    found = table(cluster, tmp_path)
    assert found[TRAIN] == ("requeued", number)
    assert found["deploy.ctranslate2-int8"][0] == "waiting"
    saved = reached(folders[TRAIN]).saved_step
    assert saved > 60

    # It goes on by itself, and only when it is over the next jobs start; one of them fails.
    wait(lambda: (reached(folders[TRAIN]).step or 0) > saved, "steps after the restart")
    assert not list((run / "logs").glob("deploy-*"))
    first, second = starts(run, TRAIN)
    assert (first["ended"], first["kept"], second["kept"]) == ("requeued", [[0, 0, 0]], [[0, saved, 0]])
    wait(lambda: not cluster.ask("squeue", "--noheader"), "the chain's end")
    shown = cluster.stepdown(tmp_path, "status", "tiny")
    found = states(cluster, tmp_path)
    assert found[TRAIN] == found["deploy.ctranslate2-int8"] == "done"
    assert found["deploy.ctranslate2-float32"] == "failed"
    assert {found[stage] for stage in found if stage.startswith(("evaluate.", "report"))} == {"not run"}
    assert "deploy.ctranslate2-float32: Slurm: FAILED: cannot write" in shown
    assert "a file stands where a folder should be" in shown
    assert "evaluate.ctranslate2-int8, evaluate.ctranslate2-float32: needs deploy, which failed; submit again when that is mended" in shown

    # Mended, only what is missing runs.
    folders["deploy.ctranslate2-float32"].unlink()
    told = cluster.stepdown(tmp_path, "submit", "run.yaml", **SECRETS)
    chain = [line.split(maxsplit=2)[1:] for line in told.splitlines() if re.match(r" *\d+  ", line)]
    assert [name for name, _ in chain] == ["deploy[1]", "evaluate", "report"]

    # Meanwhile: the same training, undisturbed, in two processes of one node.
    alone = ["name=alone", "launch.nodes=1", "launch.cpu_processes=2"]
    cluster.stepdown(tmp_path, "train", "run.yaml", *alone)
    undisturbed = losses(read_stages(tmp_path / "runs" / "alone")[TRAIN])
    assert losses(folders[TRAIN]) == undisturbed
    assert len(undisturbed) == 760

    wait(lambda: not cluster.ask("squeue", "--noheader"), "the chain's end")
    assert set(states(cluster, tmp_path).values()) == {"done"}
    assert (run / "report.html").is_file()
    assert "right" in cluster.stepdown(tmp_path, "logs", "tiny", "report")
    assert cluster.stepdown(tmp_path, "submit", "run.yaml").count("every stage is done") == 1
    assert secrets_in(tmp_path) == []


def secrets_in(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".sbatch" for path in files)
    assert any(path.suffix == ".out" for path in files)
    return [str(path) for path in files if any(secret.encode() in path.read_bytes() for secret in SECRETS.values())]


def test_a_training_outlives_its_node_and_its_time_limit_but_not_scancel(
    cluster: Any, wait: Any, tiny: dict[str, Any], tmp_path: Path
) -> None:
    """Everything in a folder whose name no shell would take unquoted."""
    odd = 'it\'s $HOME "x"\n%j'
    (tmp_path / odd).mkdir()
    recorded = {"source": "recorded", "label": "{label}", "rationale": "{rationale}"}
    student = {**tiny["student"], "loss": {"label": 0.5, "rationale": 0.5}, "baselines": [], "epochs": 400, "save_every": 100000}
    task = {key: value for key, value in tiny["task"].items() if key != "rationale"}
    write(tmp_path, tiny, output=odd, task=task, teacher=recorded, student=student)
    run, train = tmp_path / odd / "tiny", "train.step_by_step"
    cluster.stepdown(tmp_path, "submit", "run.yaml")
    folder = read_stages(run)[train]

    def shown() -> tuple[str, str]:
        return table(cluster, tmp_path, str(run))[train]

    def trained(beyond: int) -> int:
        wait(lambda: (reached(folder).step or 0) > beyond, f"more than {beyond} steps")
        return reached(folder).step or 0

    # A node goes down.
    trained(60)
    state, number = shown()
    assert state == "running"
    cluster.ask("scontrol", "update", "nodename=node2", "state=down", "reason=a test")
    wait(lambda: cluster.state(number) == "PENDING", "the requeue")
    assert shown()[0] == "requeued"
    step = reached(folder).step or 0
    cluster.ask("scontrol", "update", "nodename=node2", "state=resume")

    # The signal before the time limit, as `--signal=B:USR1@N` has Slurm send it.
    step = trained(step)
    cluster.ask("scancel", "--signal=USR1", "--batch", number)
    wait(lambda: cluster.state(number) == "PENDING", "the requeue")
    saved = reached(folder).saved_step
    assert saved >= step
    assert starts(run, train)[-1]["ended"] == "requeued"

    # `scontrol requeue` by hand.
    step = trained(saved)
    cluster.ask("scontrol", "requeue", number)
    wait(lambda: cluster.state(number) == "PENDING", "the requeue")

    # Cancelled, it stays so.
    trained(reached(folder).saved_step)
    assert [start["kept"][0][1] for start in starts(run, train)][2] == saved
    assert f"cancelled: {number}, " in cluster.stepdown(tmp_path, "cancel", str(run))
    wait(lambda: cluster.state(number) == "CANCELLED", "the end")
    assert starts(run, train)[-1]["ended"] in ("ended by Slurm", None)  # Slurm may end it before it has noted that
    cluster.ask("sleep", "7")  # longer than a requeued job waits
    assert cluster.state(number) == "CANCELLED"
    assert len(starts(run, train)) == 4
    found = states(cluster, tmp_path, str(run))
    assert (found["teach"], found[train], found["deploy.ctranslate2-int8"], found["report"]) == ("done", "cancelled", "not run", "not run")
    assert "step" in cluster.stepdown(tmp_path, "logs", str(run), train)


def test_restarts_without_progress_are_counted(cluster: Any, wait: Any, tiny: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, tiny, launch={"device": "cpu", "slurm": {"max_restarts": 0}})
    cluster.stepdown(tmp_path, "submit", "run.yaml")
    number = table(cluster, tmp_path)["tune"][1]
    log = tmp_path / "runs" / "tiny" / "logs" / f"tune-{number}.out"
    wait(lambda: log.is_file() and "start 1" in log.read_text(), "its start")
    wait(lambda: cluster.ask("squeue", "--steps", "--noheader", "--format=%i", f"--jobs={number}").count(f"{number}.0"), "its step")
    cluster.ask("scancel", "--signal=USR1", "--batch", number)
    wait(lambda: cluster.state(number) == "FAILED", "its end")
    shown = cluster.stepdown(tmp_path, "status", "tiny")
    assert "tune: Slurm: FAILED: tune was restarted 0 times in a row without progress (launch.slurm.max_restarts)" in shown
    assert states(cluster, tmp_path)["teach"] == "not run"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("launch.slurm.partition=nowhere", "invalid partition specified: nowhere"),
        ("launch.nodes=3", "Slurm refuses tune: "),
        ("launch={device: cuda, gpus_per_node: 3}", "Requested node configuration is not available"),
    ],
)
def test_what_slurm_would_refuse_is_refused_before_anything_is_queued(
    cluster: Any, tiny: dict[str, Any], tmp_path: Path, override: str, said: str
) -> None:
    write(tmp_path, tiny)
    told = cluster.stepdown(tmp_path, "submit", "run.yaml", override, status=1)
    assert said in told
    assert "Nothing was queued" in told
    assert cluster.ask("squeue", "--noheader") == ""
    assert not (tmp_path / "runs" / "tiny" / "jobs" / "submission.json").exists()
