"""The deploy stage: one file to ship for each target, made from a checkpoint."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import cast

from train.artifacts import ARTIFACT, Checkpoint, DeployedModel
from train.config import DeployTarget
from train.deploy.ctranslate2 import WEIGHTS, Compute, Ctranslate2Runtime, convert
from train.runtimes import model_bytes

MODEL = "model"
_PROBE = "What is 1 + 1?"


def run(target: DeployTarget, checkpoint: Checkpoint, checkpoint_folder: Path, folder: Path) -> DeployedModel:
    """Makes and checks `folder/model`, then marks the folder as done.

    The model is made under another name and renamed when it has loaded and answered: a run that is killed leaves no half-made model.

    Args:
        target: runtime and type of the weights, such as ctranslate2-int8.
        checkpoint: what the training stage handed on.
        checkpoint_folder: the training stage's folder; the model lies in its `model/`.
        folder: this target's own folder.

    Raises:
        ValueError: if the target cannot be made of this model.
        RuntimeError: if the file that was made does not load, gives numbers that are not finite, or is not smaller than its source.
    """
    begin = time.monotonic()
    source = checkpoint_folder / MODEL
    runtime, compute = target.split("-", 1)
    made, unchecked = folder / MODEL, folder / f".{MODEL}.unchecked"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(unchecked, ignore_errors=True)
    convert(source, unchecked, cast(Compute, compute))
    source_bytes = fp32_bytes(source)
    check(target, unchecked, source_bytes)
    (folder / ARTIFACT).unlink(missing_ok=True)
    shutil.rmtree(made, ignore_errors=True)
    unchecked.rename(made)
    weight_bytes, total_bytes = model_bytes(made)
    artifact = DeployedModel(
        target=target,
        runtime=runtime,
        family=checkpoint.family,
        weight_bytes=weight_bytes,
        total_bytes=total_bytes,
        source_weight_bytes=source_bytes,
        num_parameters=checkpoint.num_parameters,
        max_input_tokens=checkpoint.max_input_tokens,
        max_label_tokens=checkpoint.max_label_tokens,
        seconds=time.monotonic() - begin,
    )
    artifact.write(folder)
    return artifact


def check(target: DeployTarget, model_folder: Path, source_bytes: int) -> None:
    """Loads a deployed model and looks at what it is: size, finite log-probabilities, an answer.

    Raises:
        RuntimeError: if one of these fails; the message says which.
    """
    weight_bytes = (model_folder / WEIGHTS).stat().st_size
    if not target.endswith("float32") and weight_bytes >= source_bytes:
        raise RuntimeError(
            f"deploy.targets: {target} takes {weight_bytes:,} bytes, not fewer than its fp32 source ({source_bytes:,}): "
            "the model is too small to gain from it; remove the target"
        )
    runtime = Ctranslate2Runtime(model_folder, device="cpu")
    form = runtime.format
    prompt, _ = form.prompt_ids(form.part, _PROBE, runtime.encode)
    solution = [token for segment in form.solution_ids("One more is 2.", "2", runtime.encode) for token in segment]
    scores = runtime.log_probs(prompt, solution if form.part == "solve" else form.label_ids("2", runtime.encode)[0])
    if not all(map(math.isfinite, scores)):
        raise RuntimeError(
            f"deploy.targets: {target} gives log-probabilities that are not finite ({scores}): the checkpoint's weights are not finite, "
            "or overflow in this type; train again, or choose ctranslate2-float32"
        )
    runtime.answer([prompt], max_new_tokens=2)


def fp32_bytes(model_folder: Path) -> int:
    """Bytes of a model's safetensors files, were each tensor stored in fp32: what a quantized file is compared with.

    Raises:
        ValueError: if the folder has no safetensors file.
    """
    files = sorted(model_folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{model_folder} has no .safetensors file: it is not a model folder that stepdown made")
    return sum(map(_fp32_file_bytes, files))


def _fp32_file_bytes(path: Path) -> int:
    # The format: the header's length in 8 bytes, little-endian; the header in JSON; the numbers.
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    elements: int = sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return 8 + header_bytes + 4 * elements
