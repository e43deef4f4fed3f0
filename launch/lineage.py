"""What of a run's stages W&B is shown: samples, figures, and which artifact came of which. Imports no torch.

task -> (tuned teacher) -> records -> student -> (pruned, recovered) -> deployed model -> report
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data.examples import read_examples
from data.store import MANIFEST
from launch.config import RESOLVED, Config
from launch.pipeline import PRUNE, RECOVER, TASK, TEACH, TUNE, Stage, deployed_from, made_by, shipped
from launch.rundir import run_folder
from launch.samples import first_of_each, written
from train.artifacts import ARTIFACT, Checkpoint, DeployedModel, EvalResult
from train.background import Background
from train.tracking import Product, Samples, Tracker, is_shown

SAMPLES = 16
"""Right and as many wrong ones in a table."""
_KINDS = {"task": "task", "teach": "records", "deploy": "deployed"}
_LARGE = ("*.jsonl", "*.parquet", "model/*")


def product(stage: Stage, group: str) -> Product:
    """What a finished stage made."""
    small = [stage.folder / name for name in (ARTIFACT, MANIFEST) if (stage.folder / name).is_file()]
    large = [path for pattern in _LARGE for path in sorted(stage.folder.glob(pattern)) if path.is_file() and path.name != "log.jsonl"]
    facts = json.loads((stage.folder / ARTIFACT).read_text())
    return Product(f"{group}-{stage.name}", _KINDS.get(stage.kind, "model"), stage.key, small, large, facts | {"stage": stage.name})


def report_product(folder: Path, group: str) -> Product:
    """The report of a run, with what it was run with."""
    names = ("report.html", "report.md", "report.json", RESOLVED, "provenance.json")
    key = json.loads((folder / "provenance.json").read_text())["started"]
    files = [folder / name for name in names if (folder / name).is_file()]
    return Product(f"{group}-report", "report", f"report-{key.replace(':', '').replace('+', '-')}", files, [])


def read_by(stage: Stage, config: Config, table: Mapping[str, Stage]) -> list[Stage]:
    """The stages whose work a stage reads."""
    if stage.kind == "deploy":
        return [deployed_from(config, table, stage)]
    names = {
        TUNE: [TASK],
        TEACH: [TASK, TUNE],
        "train": [TASK, TEACH],
        PRUNE: [TASK, TEACH, f"train.{config.student.arm}"],
        RECOVER: [TASK, TEACH, shipped(config, table).name],
    }[stage.kind]
    return [table[name] for name in names if name in table]


def record_samples(teach: Stage, task: Stage) -> Samples:
    """The first training records whose label is the gold one, and the first whose is not."""
    rows = [[w.input, w.gold, w.label or "", w.agrees, w.rationale, w.votes, w.hinted] for w in written(teach.folder, task.folder, SAMPLES)]
    return Samples("records", ["input", "gold", "teacher", "agrees", "rationale", "votes", "hinted"], rows)


def prediction_samples(evaluated: Sequence[Stage], task: Stage) -> Samples:
    """Of each rung the first test items that it gets right, and the first that it gets wrong."""
    examples = {example.id: example for example in read_examples(task.folder / "test.jsonl")}
    rows: list[list[Any]] = []
    for stage in evaluated:
        answers = map(json.loads, (stage.folder / "answers.jsonl").read_text(encoding="utf-8").splitlines())
        for found in first_of_each(((answer["correct"], answer) for answer in answers), SAMPLES):
            example = examples[found["id"]]
            rows.append([stage.detail, example.input, example.label, found["answer"] or "", found["correct"]])
    return Samples("predictions", ["rung", "input", "gold", "answer", "right"], rows)


# ---------------------------------------------------------------- what each stage shows


def hand_over(tracker: Tracker, stage: Stage, config: Config, table: Mapping[str, Stage]) -> None:
    """Shows what a finished stage read and made, and of a teacher's a sample."""
    for read in read_by(stage, config, table):
        tracker.reads(partial(product, read, config.name))
    if stage.kind == TEACH:
        tracker.samples(partial(record_samples, stage, table[TASK]))
    tracker.makes(partial(product, stage, config.name))


def track(config: Config, table: Mapping[str, Stage], *, reported: bool) -> None:
    """Shows the deployed files and the evaluations that are done, the report where it was just written, and what a kill left unshown."""
    try:
        _track(config, table, reported=reported)
    except OSError as error:  # records of somebody else's, in a folder that is not ours to write in
        logging.getLogger("stepdown").warning("Weights & Biases does not get all of this run: %s", error)
    Background.drain()


def _track(config: Config, table: Mapping[str, Stage], *, reported: bool) -> None:
    done = [stage for stage in table.values() if stage.is_done]
    for stage in done:
        if stage.kind in (TASK, "evaluate") or is_shown(stage.folder):
            continue
        # Of a training every line of the log is there already.
        with _opened(stage.folder, config, stage.name, stage.key, from_step=0 if stage.kind == "deploy" else sys.maxsize) as tracker:
            if stage.kind == "deploy":
                tracker.log(1, _present(_deployed_figures(DeployedModel.read(stage.folder))))
            hand_over(tracker, stage, config, table)
    evaluated = [stage for stage in done if stage.kind == "evaluate"]
    key = hashlib.sha256(" ".join(stage.key for stage in evaluated).encode()).hexdigest()[:12]
    folder = run_folder(config) / "evaluate" / key
    if evaluated and not is_shown(folder):
        with _opened(folder, config, "evaluate", key, from_step=0) as tracker:
            _track_evaluation(tracker, evaluated, config, table, reported=reported)


def _opened(folder: Path, config: Config, job_type: str, key: str, *, from_step: int) -> Tracker:
    settings = {"config": config.model_dump(mode="json"), "key": key}
    return Tracker(
        folder, config.tracking, group=config.name, job_type=job_type, settings=settings, enabled=True, from_step=from_step, key=key
    )


def _track_evaluation(tracker: Tracker, evaluated: Sequence[Stage], config: Config, table: Mapping[str, Stage], *, reported: bool) -> None:
    """One step a rung; the summary has all of them, and the validation figure by which a sweep of W&B may choose."""
    summary: dict[str, float] = {}
    for step, stage in enumerate(evaluated, start=1):
        values = _present({f"{stage.detail}/{name}": value for name, value in _measured_figures(EvalResult.read(stage.folder)).items()})
        tracker.log(step, values)
        summary |= values
    chosen = Checkpoint.read(shipped(config, table).folder).validation
    tracker.summary(summary | {f"validation_{name}": value for name, value in chosen.items()})
    tracker.samples(partial(prediction_samples, evaluated, table[TASK]))
    for source in dict.fromkeys(made_by(config, table, stage.detail).name for stage in evaluated):
        tracker.reads(partial(product, table[source], config.name))
    if reported:
        tracker.makes(partial(report_product, run_folder(config), config.name))


def _deployed_figures(made: DeployedModel) -> dict[str, float | None]:
    return {
        "bits_a_weight": made.bits_a_weight,
        "error_nats": made.error_nats,
        "weight_bytes": made.weight_bytes,
        "deploy_seconds": made.seconds,
    }


def _measured_figures(result: EvalResult) -> dict[str, float | None]:
    rates = {f"examples_per_second_batch_{size}": rate for size, rate in (result.examples_per_second or {}).items()}
    return {
        "accuracy": result.num_correct / result.num_items,
        "weight_bytes": result.weight_bytes,
        "first_token_seconds": result.first_token_seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        **rates,
    }


def _present(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
