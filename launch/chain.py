"""A pipeline as a chain of Slurm jobs: which jobs there are, what each runs, and which come before it. Imports no torch.

Only what is missing makes a job: a stage whose folder holds an artifact is done, and a part of the records whose shards are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from data.store import SPLITS, Part
from launch.config import Config
from launch.pipeline import RECOVER, TEACH, TUNE, Stage, deployed_from, made_by, shipped
from train.deploy.targets import RECOVERED

REPORT = "report"
Runs = Literal["worker", "node"]
"""worker: torchrun on every node of the job (`launch.worker`); node: processes of one node, one after another (`launch.node`)."""
_NODE_KINDS = ("deploy", "evaluate", REPORT)


@dataclass(frozen=True, slots=True)
class Job:
    """One job, or an array of them."""

    name: str
    stages: tuple[str, ...]
    """What it runs, as `launch.worker` and `launch.node` take it; of an array, what each index runs."""
    after: tuple[str, ...] = ()
    """Jobs of this chain that must have succeeded."""
    indices: tuple[int, ...] | None = None
    """Of an array: the ones to run; None for a single job."""
    at_once: int | None = None
    """Of an array: how many may run together; None for all."""
    nodes: int = 1

    @property
    def runs(self) -> Runs:
        """What its steps are."""
        return "node" if self.stages[0].partition(".")[0] in _NODE_KINDS else "worker"

    @property
    def array(self) -> str | None:
        """As sbatch takes it, such as 0-3,7%2."""
        if self.indices is None:
            return None
        limit = "" if self.at_once is None else f"%{self.at_once}"
        return ranges(self.indices) + limit


def ranges(indices: Sequence[int]) -> str:
    """Numbers in rising order, neighbours joined: 0-3,7."""
    runs: list[list[int]] = []
    for n in indices:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def missing_jobs(config: Config, table: Mapping[str, Stage], rows: Mapping[str, int]) -> list[Job]:
    """The jobs that make what is missing of a run, each after those that it needs; the last one writes the report.

    Args:
        config: of the run.
        table: its stages.
        rows: of each split of the task.

    Returns:
        Nothing where every stage is done.
    """
    wanted = [stage for stage in table.values() if stage.place != "here" and not stage.is_done]
    jobs: dict[str, Job] = {}
    made: dict[str, str] = {}  # stage -> the job that makes it
    before: dict[str, set[str]] = {}  # job -> all that come before it

    def add(job: Job, needs: Sequence[Stage], makes: Sequence[Stage]) -> None:
        after = dict.fromkeys(made[stage.name] for stage in needs if stage.name in made)
        implied = {earlier for name in after for earlier in before[name]}
        before[job.name] = {*after, *implied}
        jobs[job.name] = replace(job, after=tuple(name for name in after if name not in implied))
        made.update({stage.name: job.name for stage in makes})

    for stage in (s for s in wanted if s.place == "worker"):
        job = _teacher(config, stage, rows) if stage.kind == TEACH else Job(stage.name, (stage.name,), nodes=config.launch.nodes)
        add(job, _needs(config, table, stage), [stage])
    for name, chosen in _deploys(table).items():
        missing = [stage for stage in chosen if stage in wanted]
        if missing:
            indices = tuple(n for n, stage in enumerate(chosen) if stage in missing)
            needs = [deployed_from(config, table, stage) for stage in missing]
            add(Job(name, tuple(stage.name for stage in chosen), indices=indices), [*needs, table[TEACH]], missing)
    rungs = [stage for stage in wanted if stage.kind == "evaluate"]
    if rungs:
        # One job, so that the rungs are timed on one node, one after another.
        needs = [made_by(config, table, stage.detail) for stage in rungs]
        add(Job("evaluate", tuple(stage.name for stage in rungs)), [*needs, table[TEACH]], rungs)
    if wanted:
        add(Job(REPORT, (REPORT,)), wanted, [])
    return list(jobs.values())


def teacher_tasks(config: Config) -> int:
    """Array tasks that share the teacher's records."""
    launch = config.launch
    fitting = 1 if config.teacher.source == "recorded" else max(1, launch.nodes // launch.slurm.teacher_nodes)
    return launch.slurm.teacher_tasks or fitting


def _teacher(config: Config, stage: Stage, rows: Mapping[str, int]) -> Job:
    """The teacher's records; the task that finds all of them written marks the stage as done."""
    slurm, of, counted = config.launch.slurm, teacher_tasks(config), {split: rows[split] for split in SPLITS}
    if of == 1:
        return Job(TEACH, (TEACH,), nodes=slurm.teacher_nodes)
    missing = [n for n in range(of) if Part(n, of).missing(stage.folder, counted)]
    # Where all is written and none has said so, one of them does.
    indices = tuple(missing) or (0,)
    return Job(
        TEACH,
        tuple(f"{TEACH}:{n}/{of}" for n in range(of)),
        indices=indices,
        at_once=slurm.teacher_tasks_at_once,
        nodes=slurm.teacher_nodes,
    )


def _needs(config: Config, table: Mapping[str, Stage], stage: Stage) -> list[Stage]:
    """The stages that one under torchrun reads."""
    if stage.kind == TUNE:
        return []
    if stage.kind == TEACH:
        return [table[TUNE]] if TUNE in table else []
    if stage.kind == "train":
        return [table[TEACH]]
    # A pruned student, or one that recovers, is made of a trained one.
    return [shipped(config, table) if stage.kind == RECOVER else table[f"train.{config.student.arm}"], table[TEACH]]


def _deploys(table: Mapping[str, Stage]) -> dict[str, list[Stage]]:
    """The two arrays of files to ship: of the student as it was trained, and of students that recovered."""
    every = [stage for stage in table.values() if stage.kind == "deploy"]
    recovered = [stage for stage in every if stage.detail.endswith(RECOVERED)]
    return {"deploy": [s for s in every if s not in recovered], "deploy-recovered": recovered}


def chain(jobs: Sequence[Job]) -> list[str]:
    """The chain as a user reads it, one line a job."""
    width = max(len(_title(job)) for job in jobs)
    return [f"{_title(job):{width}}  {job.nodes} node{'s'[: job.nodes - 1]}  {_when(job)}" for job in jobs]


def _when(job: Job) -> str:
    return f"after {', '.join(job.after)}" if job.after else "at once"


def _title(job: Job) -> str:
    return job.name if job.array is None else f"{job.name}[{job.array}]"
