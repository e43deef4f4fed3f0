"""Answers with a run's deployed model, in the runtime that serves it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from data.prompts import label_of
from launch.rundir import read_stages
from train.artifacts import ARTIFACT, DeployedModel
from train.cores import usual_threads
from train.runtimes import RuntimeKind, answers, open_runtime


def predict(folder: Path, inputs: Sequence[str], target: str | None) -> list[str]:
    """The model's answer to each input: the label; all that it wrote where that holds none.

    Args:
        folder: of the run.
        inputs: as the task's template renders them.
        target: which deployed file; None for the run's last.

    Raises:
        ValueError: if the run has no such file, or an input is empty.
    """
    deployed = {name.partition(".")[2]: path for name, path in read_stages(folder).items() if name.startswith("deploy.")}
    done = {name: path for name, path in deployed.items() if (path / ARTIFACT).is_file()}
    if not done:
        raise ValueError(f"{folder} has no deployed model yet: run `stepdown run` with its configuration first")
    if target is not None and target not in done:
        raise ValueError(f"--target is {target}, but {folder} has {', '.join(done)}")
    if not inputs or any(not text.strip() for text in inputs):
        raise ValueError("an input is empty: give the text to answer, or `-` to read one a line from standard input")
    made = done[target] if target is not None else list(done.values())[-1]
    artifact = DeployedModel.read(made)
    runtime = open_runtime(cast(RuntimeKind, artifact.runtime), made / "model", device="auto", dtype="float32", threads=usual_threads())
    part, most = runtime.format.part, runtime.format.max_answer_tokens
    texts = answers(runtime, inputs, part, batch_size=32, max_new_tokens=most)
    return [label if (label := label_of(text, part)) is not None else text for text in texts]
