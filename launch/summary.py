"""Brings the files of a run together for its report. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.card import write_card
from launch.config import RESOLVED, load_config
from launch.ladder import SAMPLES, Report, ReportInputs, StageCost, build
from launch.local import made
from launch.peaks import stage_peaks
from launch.pipeline import ARTIFACT_OF, PRUNE, PRUNED, RECOVER, TASK, TEACH, TEACHER, Stage
from launch.report import terminal_table, write
from launch.rundir import read_stages
from launch.samples import written
from train.artifacts import ARTIFACT, Checkpoint, Records, TaskFiles
from train.deploy.targets import RECOVERED


def report(folder: Path, console: Console, skipped: frozenset[str] = frozenset()) -> Report:
    """Builds the report of a run from its files, writes report.md, report.json and report.html, and prints the ladder.

    Args:
        folder: of the run.
        console: where the ladder is printed.
        skipped: stages that were done before this command.

    Raises:
        RuntimeError: if the task or every evaluation is missing.
    """
    stages = {name: Stage(name, path.name.rpartition("-")[2], path, "here") for name, path in read_stages(folder).items()}
    done = {name: stage for name, stage in stages.items() if (stage.folder / ARTIFACT).is_file()}
    rungs = [stage.folder for stage in done.values() if stage.kind == "evaluate"]
    if not rungs:
        raise RuntimeError(f"{folder} has no finished evaluation to report: run `stepdown run` with its configuration first")
    config = load_config(folder / RESOLVED)
    built = build(
        ReportInputs(
            name=folder.resolve().name,
            run_folder=folder,
            student=[stage.detail for stage in stages.values() if stage.kind == "train"][-1],
            rungs=rungs,
            stages=_costs(done, skipped),
            task=TaskFiles.read(stages[TASK].folder),
            records=Records.read(done[TEACH].folder) if TEACH in done else None,
            checkpoints={_trained_name(stage): stage.folder for stage in done.values() if ARTIFACT_OF[stage.kind] is Checkpoint},
            deployed={stage.detail: stage.folder for stage in done.values() if stage.kind == "deploy"},
            config=config.model_dump(mode="json", exclude_unset=True),
            provenance=json.loads((folder / "provenance.json").read_text()),
            test_file=stages[TASK].folder / "test.jsonl",
            written=written(done[TEACH].folder, stages[TASK].folder, SAMPLES) if TEACH in done else [],
            memory=stage_peaks(config, done),
        )
    )
    write(built, folder)
    for rung in built.rungs:
        if rung.name in built.deployed:
            write_card(built, rung, stages[f"deploy.{rung.name}"].folder / "model")
    terminal_table(built, console)
    console.print(f"report: {folder / 'report.html'} (also report.md and report.json)", soft_wrap=True, highlight=False, markup=False)
    return built


def _trained_name(stage: Stage) -> str:
    if stage.kind == RECOVER:
        return f"{stage.detail}{RECOVERED}"
    return PRUNED if stage.kind == PRUNE else stage.detail or TEACHER


def _costs(done: Mapping[str, Stage], skipped: frozenset[str]) -> list[StageCost]:
    costs = []
    for name, stage in done.items():
        artifact: Any = ARTIFACT_OF[stage.kind].read(stage.folder)
        costs.append(StageCost(name, artifact.seconds, getattr(artifact, "processes", 1), name in skipped, made(artifact)))
    return costs
