from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.store import shard_path
from launch.chain import Job, chain, missing_jobs, ranges
from launch.config import Config, validate
from launch.pipeline import Stage, stages
from train.artifacts import ARTIFACT, TaskFiles

SMALL: dict[str, Any] = {"from_scratch": "llama", "d_model": 16, "layers": 1, "heads": 2}
ROWS = {"train": 1000, "validation": 5, "test": 300}  # 4 + 2 chunks


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config(**sections: Any) -> Config:
    base: dict[str, Any] = {
        "name": "one",
        "task": {"train": "builtin:arithmetic", "test": "builtin:arithmetic", "metric": "number"},
        "teacher": {"source": "deepspeed", "model": SMALL, "tune": {}},
        "student": {"model": SMALL, "baselines": ["labels_only"]},
        "deploy": {"targets": ["gguf-q8_0", "gguf-q4_0"]},
        "launch": {"nodes": 2},
    }
    return validate({**base, **sections}, "file")


def table(made: Config) -> dict[str, Stage]:
    return stages(made, TaskFiles("digest", ROWS, {}))


def jobs(made: Config) -> dict[str, Job]:
    return {job.name: job for job in missing_jobs(made, table(made), ROWS)}


def finish(made: Config, *names: str) -> None:
    for name in names:
        folder = table(made)[name].folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ARTIFACT).touch()


def test_a_whole_run_is_a_chain_that_ends_in_the_report() -> None:
    assert chain(missing_jobs(config(), table(config()), ROWS)) == [
        "tune                2 nodes  at once",
        "teach[0-1]          1 node  after tune",
        "train.labels_only   2 nodes  after teach",
        "train.step_by_step  2 nodes  after teach",
        "deploy[0-1]         1 node  after train.step_by_step",
        "evaluate            1 node  after train.labels_only, deploy",
        "report              1 node  after evaluate",
    ]
    made = jobs(config())
    assert made["evaluate"].stages == tuple(name for name in table(config()) if name.startswith("evaluate."))
    assert {name for name, job in made.items() if job.runs == "node"} == {"deploy", "evaluate", "report"}


def test_pruned_and_recovered_students_come_behind_what_they_are_made_of() -> None:
    student = {"model": SMALL, "baselines": [], "prune": {"method": "neuron", "fraction": 0.5, "epochs": 1}}
    made = jobs(config(student=student, deploy={"targets": ["gguf-q8_0", "gguf-q4_0"], "recover": {}}))
    assert {name: job.after for name, job in made.items()} == {
        "tune": (),
        "teach": ("tune",),
        "train.step_by_step": ("teach",),
        "prune": ("train.step_by_step",),
        "recover.gguf-q4_0": ("prune",),
        "deploy": ("prune",),
        "deploy-recovered": ("recover.gguf-q4_0",),
        "evaluate": ("deploy", "deploy-recovered"),
        "report": ("evaluate",),
    }
    assert made["deploy-recovered"].stages == ("deploy.gguf-q4_0-recovered",)


def test_what_is_done_makes_no_job_and_holds_nobody_up() -> None:
    made = config()
    finish(made, "tune", "teach", "train.labels_only", "train.step_by_step", "deploy.gguf-q8_0", "evaluate.teacher")
    found = jobs(made)
    assert list(found) == ["deploy", "evaluate", "report"]
    assert (found["deploy"].array, found["deploy"].after) == ("1", ())
    assert "evaluate.teacher" not in found["evaluate"].stages
    finish(made, *table(made))
    assert jobs(made) == {}


def test_only_parts_of_the_records_with_a_missing_shard_are_written() -> None:
    made = config(launch={"slurm": {"teacher_tasks": 3, "teacher_tasks_at_once": 2, "teacher_nodes": 4}, "nodes": 8})
    teach = jobs(made)["teach"]
    assert (teach.array, teach.nodes, teach.stages) == ("0-2%2", 4, ("teach:0/3", "teach:1/3", "teach:2/3"))
    folder = table(made)["teach"].folder
    folder.mkdir(parents=True)
    # Chunks in turn: train 0 1 2 3, test 0 1.
    for split, chunk in (("train", 0), ("train", 3), ("train", 2)):
        shard_path(folder, split, chunk).touch()
    assert jobs(made)["teach"].array == "1-2%2"
    for split, chunk in (("train", 1), ("test", 0), ("test", 1)):
        shard_path(folder, split, chunk).touch()
    assert jobs(made)["teach"].array == "0%2"  # one, to mark the stage as done


@pytest.mark.parametrize(
    ("launch", "array"),
    [
        ({}, None),
        ({"nodes": 2}, "0-1"),
        ({"nodes": 5, "slurm": {"teacher_nodes": 2}}, "0-1"),
        ({"nodes": 2, "slurm": {"teacher_tasks": 1}}, None),
        ({"slurm": {"teacher_tasks": 12, "teacher_tasks_at_once": 3}}, "0-5%3"),  # more tasks than chunks
    ],
)
def test_a_teacher_takes_a_task_a_node_where_nothing_else_is_said(launch: dict[str, Any], array: str | None) -> None:
    assert jobs(config(launch=launch))["teach"].array == array


def test_a_recorded_teacher_is_one_job() -> None:
    task = {"train": "builtin:arithmetic", "test": "builtin:arithmetic", "metric": "number"}
    recorded = {"source": "recorded", "label": "{label}", "rationale": "{rationale}"}
    made = jobs(config(task=task, teacher=recorded))
    assert (made["teach"].array, made["teach"].stages) == (None, ("teach",))


@pytest.mark.parametrize(("numbers", "text"), [((0,), "0"), ((0, 1, 2), "0-2"), ((0, 2, 3, 7), "0,2-3,7")])
def test_neighbouring_numbers_are_joined(numbers: tuple[int, ...], text: str) -> None:
    assert ranges(numbers) == text
