"""Rendered scripts under a real Slurm: it takes them, and what they hold arrives in the job unchanged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.chain import Job
from launch.cluster import SiteConfig
from launch.slurm import TEMPLATE, log_pattern, script, submission

pytestmark = pytest.mark.slurm

ODD = ["", " ", "a b", "it's", '"', "$HOME ${x} $(date) `date`", "two\nlines\n", "\\", "back\\slash\\n", "é ☃", "*?[a]", "!!", "#"]
ODD += ["@options@ @command@", "%j", "~", "a=b;c&d|e>f"]
DUMP = "import json, os, sys; json.dump({'words': sys.argv[2:], 'variables': dict(os.environ)}, open(sys.argv[1], 'w'))"


def test_odd_values_arrive_in_the_job_unchanged(cluster: Any, wait: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "inherited 'not' written")
    folder = tmp_path / 'a folder\'s "$name"\n%j'
    folder.mkdir()
    site = SiteConfig(environment={f"ODD_{n}": value for n, value in enumerate(ODD)}, setup="export FROM_SETUP='a  b'\n")
    path, out = folder / "job.sbatch", folder / "dumped.json"
    path.write_text(script(TEMPLATE.read_text(), ["--job-name=odd"], site, [sys.executable, "-c", DUMP, str(out), *ODD]))
    log = log_pattern(folder, Job("odd", ("report",)))
    number = cluster.ask(*submission(path, log))
    wait(lambda: cluster.state(number) == "COMPLETED", "the job")
    found = json.loads(out.read_text())
    assert found["words"] == ODD
    assert [found["variables"][f"ODD_{n}"] for n in range(len(ODD))] == ODD
    assert (found["variables"]["FROM_SETUP"], found["variables"]["WANDB_API_KEY"]) == ("a  b", "inherited 'not' written")
    assert (folder / f"odd-{number}.out").is_file()


def test_slurm_takes_every_script_of_a_run_on_gpus(cluster: Any, tiny: dict[str, Any], tmp_path: Path) -> None:
    slurm = {"partition": "low", "time": "1-00:00:00", "teacher_tasks": 2, "teacher_tasks_at_once": 1}
    launch = {"device": "cuda", "gpus_per_node": 2, "nodes": 2, "slurm": slurm}
    site = {"cpus_per_node": 2, "sbatch_options": ["--mem=0"], "environment": {"NCCL_DEBUG": "WARN"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**tiny, "launch": launch}))
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    told = cluster.stepdown(tmp_path, "submit", "run.yaml", "--dry-run", "--site", "site.yaml")
    scripts = sorted((tmp_path / "runs" / "tiny" / "jobs").glob("*.sbatch"))
    assert {path.stem for path in scripts} >= {"tune", "teach", "train.labels_only", "deploy", "evaluate", "report"}
    for path in scripts:
        cluster.ask("sbatch", "--test-only", str(path))
        assert str(path) in told
    assert cluster.ask("squeue", "--noheader") == ""
