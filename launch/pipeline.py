"""The table of stages: what each one reads, and the key that follows from it. Imports no torch.

A stage whose folder holds an artifact is done. Its folder's name ends in a hash of all that it reads - the parts of the configuration
below and the keys of the stages before it - so that the same inputs are found again and changed ones make a new folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.sealing import CODEC
from data.store import Part
from data.tasks import fingerprint
from launch.config import Config, hashed
from launch.rundir import SHARED, run_folder
from train.artifacts import ARTIFACT, Artifact, Checkpoint, DeployedModel, EvalResult, Records, TaskFiles
from train.config import Arm, LossConfig
from train.deploy.targets import RECOVERED, TARGETS

Place = Literal["here", "worker", "process"]
"""here: in the command's own process; worker: under torchrun, one start for several stages; process: a fresh process of its own."""

TASK, TUNE, TEACH, TEACHER, PRUNE, PRUNED, RECOVER = "task", "tune", "teach", "teacher", "prune", "pruned", "recover"
ARTIFACT_OF: dict[str, type[Artifact]] = {
    "task": TaskFiles,
    "tune": Checkpoint,
    "teach": Records,
    "train": Checkpoint,
    "prune": Checkpoint,
    "recover": Checkpoint,
    "deploy": DeployedModel,
    "evaluate": EvalResult,
}
"""What a stage of each kind makes."""
KINDS = tuple(ARTIFACT_OF)


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the pipeline, with its own folder."""

    name: str
    """kind, or kind.detail: train.step_by_step, recover.gguf-q4_0, deploy.ctranslate2-int8, evaluate.teacher."""
    key: str
    folder: Path
    place: Place

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return self.name.partition(".")[0]

    @property
    def detail(self) -> str:
        """The arm, target or rung; empty for a stage that is the only one of its kind."""
        return self.name.partition(".")[2]

    @property
    def is_done(self) -> bool:
        """Its artifact is there."""
        return (self.folder / ARTIFACT).is_file()


def task_stage(config: Config) -> Stage:
    """The first stage; its key covers the bytes of the files it reads.

    Raises:
        ValueError: if a file is missing or a source is malformed.
    """
    return _stage(config, TASK, {"fingerprint": fingerprint(config.task, config.seed)}, "here")


def stages(config: Config, task: TaskFiles) -> dict[str, Stage]:
    """All stages of a run, in an order in which each comes after what it reads."""
    table: dict[str, Stage] = {TASK: task_stage(config)}
    common = {"seed": config.seed, "task": task.digest}
    if config.teacher.tune is not None:
        inputs = {**common, "model": _model(config.teacher.model), "tune": hashed(config.teacher.tune)}
        table[TUNE] = _stage(config, TUNE, inputs, "worker", shared=True)
    table[TEACH] = _stage(config, TEACH, {**common, **_teach_inputs(config, table)}, "worker", shared=True)
    for arm, loss in config.student.arms.items():
        inputs = {**common, **_training(config, arm, loss), "model": _model(config.student.model), "teach": table[TEACH].key}
        table[f"train.{arm}"] = _stage(config, f"train.{arm}", inputs, "worker")
    trained = table[f"train.{config.student.arm}"]
    if config.student.prune is not None:
        prune, arm = config.student.prune, config.student.arm
        inputs = {**common, **_training(config, arm, prune.loss or config.student.loss), "teach": table[TEACH].key}
        table[PRUNE] = _stage(config, PRUNE, {**inputs, "prune": hashed(prune), "train": trained.key}, "worker")
    table |= _deploys(config, table, common)
    for rung, of in _rungs(config, table).items():
        inputs = {
            "task": task.digest,
            "metric": config.task.metric,
            **hashed(config.evaluate),
            "teach": table[TEACH].key,
            "of": table[of].key,
        }
        table[f"evaluate.{rung}"] = _stage(config, f"evaluate.{rung}", inputs, "process")
    return table


def parted(name: str) -> tuple[str, Part | None]:
    """A stage as the command line names it: the stage, and the part of it where one is named."""
    stage, _, part = name.partition(":")
    if not part:
        return stage, None
    index, _, of = part.partition("/")
    return stage, Part(int(index), int(of))


def _deploys(config: Config, table: Mapping[str, Stage], common: Mapping[str, Any]) -> dict[str, Stage]:
    """The files to ship, each that recovers behind the training that it is made of."""
    arm, recover, source = config.student.arm, config.deploy.recover, shipped(config, table)
    tokens = {} if config.deploy.vocabulary == "whole" else {"vocabulary": config.deploy.vocabulary}
    found: dict[str, Stage] = {}
    for target in config.deploy.targets:
        found[f"deploy.{target}"] = _stage(config, f"deploy.{target}", {"target": target, "train": source.key, **tokens}, "process")
        if recover is not None and TARGETS[target].can_recover:
            inputs = {**common, **_training(config, arm, recover.loss or config.student.loss), "teach": table[TEACH].key}
            inputs |= {"recover": hashed(recover), "target": target, "train": source.key}
            found[f"recover.{target}"] = _stage(config, f"recover.{target}", inputs, "worker")
            name = f"deploy.{target}{RECOVERED}"
            found[name] = _stage(config, name, {"target": target, "train": found[f"recover.{target}"].key, **tokens}, "process")
    return found


def shipped(config: Config, table: Mapping[str, Stage]) -> Stage:
    """The stage whose checkpoint the files to ship are made of."""
    return table[PRUNE] if PRUNE in table else table[f"train.{config.student.arm}"]


def deployed_from(config: Config, table: Mapping[str, Stage], stage: Stage) -> Stage:
    """The stage whose checkpoint a deploy stage makes a file of."""
    is_recovered = stage.detail.endswith(RECOVERED)
    return table[f"recover.{stage.detail.removesuffix(RECOVERED)}"] if is_recovered else shipped(config, table)


def made_by(config: Config, table: Mapping[str, Stage], rung: str) -> Stage:
    """The stage that made what a rung measures."""
    return table[_rungs(config, table)[rung]]


def _training(config: Config, arm: Arm, loss: LossConfig) -> dict[str, Any]:
    """What of the configuration a training of an arm reads, but for the model."""
    student = hashed(config.student.of_arm(arm), without=("model", "loss", "baselines", "seed", "prune"))
    uses_rationales = loss.rationale or arm == "single_task" or config.teacher.rationales.drop_rows
    chosen = hashed(config.teacher.rationales) if uses_rationales else {}
    # The same where the student's seed is left out and where the run's is written out.
    student["student_seed"] = config.seed if config.student.seed is None else config.student.seed
    return {**student, "loss": hashed(loss), **{key: chosen[key] for key in ("keep", "drop_rows") if key in chosen}}


def _rungs(config: Config, table: Mapping[str, Stage]) -> dict[str, str]:
    """The ladder from top to bottom: rung -> the stage that made what it measures."""
    arms: dict[str, str] = {arm: f"train.{arm}" for arm in config.student.arms}
    if config.student.prune is not None:
        arms[PRUNED] = PRUNE
    files = {name.partition(".")[2]: name for name in table if name.startswith("deploy.")}
    return {TEACHER: TEACH, **arms, **files}


def _teach_inputs(config: Config, table: Mapping[str, Stage]) -> dict[str, Any]:
    teacher = hashed(config.teacher, without=("model", "tune", "rationales"))
    rationales = hashed(config.teacher.rationales, without=("keep", "drop_rows", "examples", "temperature"))
    rationales["temperature"] = config.teacher.rationales.sampling_temperature  # the same where left out and where written out
    examples = config.teacher.rationales.examples
    written = None if examples is None else _file_hash(Path(examples))
    tuned = table[TUNE].key if TUNE in table else None
    judged = {"metric": config.task.metric, "choices": config.task.choices}
    # A store of another codec is not read: it gets a folder of its own.
    asked = {"rationales": rationales, "examples": written, "codec": CODEC}
    return {**teacher, **asked, "model": _model(config.teacher.model), "tuned": tuned, **judged}


def _model(source: Any) -> Any:
    """What of a model source decides its weights: for a folder or file also the names, sizes and times of what is there."""
    if not isinstance(source, str):
        return None if source is None else hashed(source)
    path = Path(source)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
    return {"name": source, "files": [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]}


def _file_hash(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"teacher.rationales.examples: {path} does not exist; give a YAML file of few-shot examples")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _stage(config: Config, name: str, inputs: Mapping[str, Any], place: Place, *, shared: bool = False) -> Stage:
    key = hashlib.sha256(json.dumps({"stage": name, **inputs}, sort_keys=True).encode()).hexdigest()[:12]
    root = Path(config.output) / SHARED if shared else run_folder(config)
    return Stage(name, key, root / f"{name}-{key}", place)
