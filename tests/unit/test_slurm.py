from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.chain import Job
from launch.cluster import SiteConfig, load_site
from launch.config import Config, validate
from launch.queueing import label_of
from launch.slurm import (
    TEMPLATE,
    JobRequest,
    gpus_of,
    job_command,
    job_request,
    log_pattern,
    options,
    rendezvous_of,
    script,
    steps,
    submission,
)

CONFIG: dict[str, Any] = {
    "name": "one",
    "task": {"train": "a.jsonl", "test": "b.jsonl", "metric": "text"},
    "teacher": {"source": "deepspeed", "model": "OWNER/large"},
    "student": {"model": "OWNER/small"},
}
TRAIN, REPORT = Job("train.step_by_step", ("train.step_by_step",), nodes=2), Job("report", ("report",))
DEPLOY = Job("deploy", ("deploy.gguf-q8_0", "deploy.gguf-q4_0"), ("train.step_by_step",), indices=(0, 1))
DUMP = "import json, os, sys; json.dump({'words': sys.argv[2:], 'variables': dict(os.environ)}, open(sys.argv[1], 'w'))"


def config(**launch: Any) -> Config:
    return validate({**CONFIG, "launch": launch}, "file")


# ----- scripts -----


def test_options_of_a_job_over_nodes_and_gpus() -> None:
    made = config(gpus_per_node=8, nodes=2, slurm={"partition": "a100", "time": "12:00:00", "signal_seconds": 300})
    site = SiteConfig(partition="not-this", account="us", qos="long", cpus_per_node=64, sbatch_options=("--mem=0",))
    assert options(TRAIN, made, site) == [
        *["--job-name=one.train.step_by_step", "--partition=a100", "--account=us", "--qos=long", "--time=12:00:00", "--nodes=2"],
        *["--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=64", "--signal=B:USR1@300", "--open-mode=append"],
        *["--requeue", "--mem=0"],
    ]
    assert {"--nodes=1", "--gpus-per-node=1", "--cpus-per-task=8", "--array=0-1"} <= set(options(DEPLOY, made, site))
    assert not any(option.startswith("--gpus") for option in options(REPORT, made, site))


def test_options_that_nobody_asked_for_are_left_to_the_cluster() -> None:
    assert options(TRAIN, config(device="cpu", nodes=2), SiteConfig()) == [
        *["--job-name=one.train.step_by_step", "--nodes=2", "--ntasks-per-node=1", "--signal=B:USR1@120", "--open-mode=append"],
        "--requeue",
    ]
    assert "--partition=theirs" in options(TRAIN, config(device="cpu"), SiteConfig(partition="theirs"))


def test_a_number_of_gpus_must_be_said() -> None:
    told = r"\Alaunch.gpus_per_node is auto, but Slurm must be told how many GPUs to give: set it, or launch.device to cpu\Z"
    with pytest.raises(ValueError, match=told):
        gpus_of(config())


TEXTS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=40)
SHELL = st.text(st.sampled_from(" '\"$`\\\n\t!*?[]{}()<>|&;#~=%@ab{}é"), max_size=30)
VALUES = st.lists(TEXTS | SHELL, max_size=5)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(words=VALUES, variables=VALUES)
def test_any_values_arrive_unchanged_in_the_job(words: list[str], variables: list[str], tmp_path: Path) -> None:
    site = SiteConfig(environment={f"ODD_{n}": value for n, value in enumerate(variables)}, setup="export SET='a  b'")
    out, path = tmp_path / "out.json", tmp_path / "job.sbatch"
    path.write_text(script(TEMPLATE.read_text(), ["--nodes=1"], site, [sys.executable, "-S", "-c", DUMP, str(out), *words]))
    subprocess.run(["bash", str(path)], check=True, timeout=60)
    found = json.loads(out.read_text())
    assert found["words"] == words
    assert [found["variables"][f"ODD_{n}"] for n in range(len(variables))] == variables
    assert (found["variables"]["SET"], found["variables"]["PYTHONSAFEPATH"]) == ("a  b", "1")


@pytest.mark.parametrize("job", [TRAIN, DEPLOY, REPORT], ids=lambda job: job.name)
def test_a_script_passes_shellcheck_and_begins_with_its_options(job: Job, tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{Path('/usr/bin')}")
    assert shellcheck is not None, "the extra dev brings shellcheck"
    site = SiteConfig(environment={"A": "it's $x", "NCCL_DEBUG": "WARN"}, setup="module load cuda/12.8\n")
    made = options(job, config(gpus_per_node=8, nodes=2), site)
    path = tmp_path / "job.sbatch"
    path.write_text(script(TEMPLATE.read_text(), made, site, job_command("/a venv/bin/python", Path("/a run's/jobs/x.json"))))
    done = subprocess.run([shellcheck, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    lines = path.read_text().splitlines()
    assert lines[: len(made) + 1] == ["#!/bin/bash", *(f"#SBATCH {option}" for option in made)]
    assert lines[-1] == "exec '/a venv/bin/python' -m launch.job '/a run'\"'\"'s/jobs/x.json'"


def test_a_submission_waits_for_others_and_never_for_ever() -> None:
    log = log_pattern(Path("/runs/100 %/logs"), DEPLOY)
    assert submission(Path("/j/x.sbatch"), log, ["7", "8"]) == [
        *["sbatch", "--parsable", "--output=/runs/100 %%/logs/deploy-%A_%a.out", "--dependency=afterok:7:8", "--kill-on-invalid-dep=yes"],
        "/j/x.sbatch",
    ]
    assert submission(Path("x"), log_pattern(Path("l"), TRAIN), only_test=True) == [
        *["sbatch", "--parsable", "--test-only", "--output=l/train.step_by_step-%j.out", "--kill-on-invalid-dep=yes", "x"]
    ]


# ----- steps -----


def request(job: Job, tmp_path: Path, site: SiteConfig | None = None) -> JobRequest:
    made = job_request(job, config(gpus_per_node=8, nodes=2), Path("/run"), site or SiteConfig(), "/venv/bin/python")
    made.write(tmp_path / "job.json")
    return JobRequest.read(tmp_path / "job.json")


def test_one_torchrun_a_node_that_meet_on_the_first(tmp_path: Path) -> None:
    meeting = rendezvous_of({"SLURM_JOB_ID": "123456", "SLURM_RESTART_COUNT": "3"}, "node7", 2)
    asked = request(TRAIN, tmp_path, SiteConfig(srun_options=("--container-image=x",), container=("env", "a b"), python="/opt/python"))
    assert steps(asked, Path("/run/jobs"), ["train.step_by_step"], meeting, "64") == [
        *["srun", "--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1", "--cpus-per-task", "64", "--kill-on-bad-exit=1", "--wait=60"],
        *["--container-image=x", "env", "a b", "/opt/python", "-m", "launch.agent", "--nnodes", "2", "--nproc-per-node", "8"],
        *["--rdzv-backend", "c10d", "--rdzv-endpoint", "node7:23456", "--rdzv-id", "123456-3", "--max-restarts", "0"],
        *["-m", "launch.worker", "/run/jobs", "teach", "train.step_by_step"],
    ]
    assert rendezvous_of({"SLURM_JOB_ID": "9"}, "n", 2).id == "9-0"


def test_files_rungs_and_report_are_made_by_one_process_of_a_node(tmp_path: Path) -> None:
    assert steps(request(DEPLOY, tmp_path), Path("/run/jobs"), ["deploy.gguf-q4_0"], None, None) == [
        *["srun", "--nodes", "1", "--ntasks", "1", "--ntasks-per-node", "1", "--kill-on-bad-exit=1", "--wait=60", "/venv/bin/python"],
        *["-m", "launch.node", "/run/jobs", "deploy.gguf-q4_0"],
    ]


def test_the_last_task_of_an_array_is_not_the_whole_array() -> None:
    assert label_of({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}) == "12_3"
    assert label_of({"SLURM_JOB_ID": "12"}) == "12"


# ----- the site -----


def test_the_repositorys_site_file_asks_for_nothing() -> None:
    assert load_site(None) == SiteConfig()


def test_every_line_of_the_repositorys_site_file_is_one_to_use(tmp_path: Path) -> None:
    lines = (TEMPLATE.parent / "site.yaml").read_text().splitlines()
    keys = [line.removeprefix("# ") for line in lines if line.startswith(("# ", "#   ")) and (":" in line or line.startswith("#   "))]
    text = "\n".join(key for key in keys if not key[0].isupper())
    assert yaml.safe_load(text).keys() == SiteConfig.model_fields.keys()
    path = tmp_path / "site.yaml"
    path.write_text(text)
    assert load_site(path).environment == {"NCCL_SOCKET_IFNAME": "ib0", "NCCL_IB_HCA": "mlx5"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("partitoin: a", "partitoin: unknown key; did you mean partition?"),
        ("partition: a b", "partition: is 'a b'; string should match pattern"),
        ("sbatch_options: [-N2]", "sbatch_options.0: is '-N2'; string should match pattern"),
        ("python: /x", "python has no effect without container or srun_options: remove it, or submit with that Python"),
        (
            "environment: {WANDB_API_KEY: abc}",
            "environment.WANDB_API_KEY would be written into every job script: remove it and export WANDB_API_KEY in the shell that",
        ),
        ('setup: "a\\0b"', "environment, container and setup cannot hold a NUL byte, which no program takes: remove it"),
        ("- a", "holds a list, not keys with values"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_wrong_site_file_is_told(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_site(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_site_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.yaml does not exist: copy the repository's slurm/site.yaml and edit it"):
        load_site(tmp_path / "none.yaml")
