"""The deploy stage: one file to ship, made from a checkpoint in a process of its own and verified in another.

    python -m train.deploy.stage REQUEST.json

leave out tokens (deploy.vocabulary) -> calibrate on training rows (what is_smoothed_here or is_calibrated_here) -> convert (the format's
module) -> verify in a fresh process (verify.py) -> rename
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from safetensors import safe_open

from data.examples import TaskExample, read_examples
from data.prompts import Encode, TextFormat
from data.store import read_records
from train.artifacts import ARTIFACT, DeployedModel
from train.deploy.request import DeployRequest
from train.deploy.targets import TARGETS, Sample, Target, check_possible, module_of
from train.deploy.verify import Probe, Verified, VerifyRequest, command
from train.runtimes import TransformersRuntime, model_bytes
from train.signals import die_with_parent
from train.told import run_told, status_of

MODEL = "model"
NUM_SAMPLES, NUM_PROBES = 256, 16
_LONGEST_PROBE = 24
"""Tokens of a probe's target: llama.cpp gives the probabilities of one token a request."""
_LONGEST_OTHER = 4
"""Of another text's target, which shows how log-probabilities are scaled."""


def run(request: DeployRequest) -> DeployedModel:
    """Makes and checks `model/` in the request's folder, then marks the folder as done.

    Raises:
        ValueError: if the target cannot be made of this model, or here.
        RuntimeError: if the file that was made is not what it should be, or the disk is full.
    """
    target, whole, folder = TARGETS[request.target], Path(request.checkpoint_folder) / MODEL, Path(request.out_folder)
    rows = list(read_examples(Path(request.task_folder) / "train.jsonl"))
    held_out = {example.input for example in read_examples(Path(request.task_folder) / "test.jsonl")}
    own = [row for row in rows if row.input not in held_out]
    rationales = {record.id: record.rationale for record in read_records(Path(request.records_folder), "train") if record.rationale}

    def samples(of: list[TaskExample], form: TextFormat, encode: Encode, most: int | None = None) -> list[Sample]:
        return list(islice(samples_of(of, rationales, form, encode), most))

    with _with_vocabulary(request.vocabulary, whole, folder, lambda form, encode: samples(own, form, encode)) as source:
        reference = TransformersRuntime(source, device="cpu")
        form, encode = reference.format, reference.encode
        # Where every input is one of the test split there is nothing to calibrate on; to compare two models any text will do.
        calibration, compared = samples(own, form, encode, NUM_SAMPLES), samples(own or rows, form, encode, NUM_PROBES)
        return deploy(target, source, folder, calibration, compared, reference, whole=whole)


def deploy(
    target: Target,
    source: Path,
    folder: Path,
    samples: Sequence[Sample],
    compared: Sequence[Sample],
    reference: TransformersRuntime,
    *,
    whole: Path | None = None,
) -> DeployedModel:
    """Makes `folder/model` of a model folder.

    The model is made under another name and renamed when it is verified: a run that is killed, or fails, leaves no half-made model.

    Args:
        target: what to make.
        source: a model folder of this project.
        folder: of this target alone.
        samples: to calibrate on.
        compared: to verify on; at least one.
        reference: the source in fp32; of no use afterwards.
        whole: the model that the source was made of by leaving out tokens, whose size is told as the fp32 model's; the source, if left out.

    Raises:
        ValueError: if the target cannot be made of this model, or here.
        RuntimeError: if the file that was made is not what it should be, or the disk is full.
    """
    begin, form, num_tokens = time.monotonic(), reference.format, reference.num_tokens
    check_possible(target, form.family)
    made, unchecked = folder / MODEL, folder / f".{MODEL}.unchecked"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(unchecked, ignore_errors=True)
    try:
        others = [(sample[0], other[1][:_LONGEST_OTHER]) for sample, other in zip(compared, [*compared[1:], compared[0]], strict=True)]
        probes = [*(_probe(reference, sample) for sample in compared), *(_probe(reference, other, is_other=True) for other in others)]
        reference.close()  # a converter loads the model again
        with _calibrated(target, source, folder, samples) as rounded:
            module_of(target).make(rounded, unchecked, target, samples)
        verified = _verified(target, source, unchecked, folder, probes)
    except BaseException as error:
        shutil.rmtree(unchecked, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise RuntimeError(f"deploy.targets: {target.name} needs more room than {folder} has left: free some, or set output") from error
        raise
    (folder / ARTIFACT).unlink(missing_ok=True)
    shutil.rmtree(made, ignore_errors=True)
    unchecked.rename(made)
    weight_bytes, total_bytes = model_bytes(made)
    artifact = DeployedModel(
        target=target.name,
        runtime=target.runtime,
        family=form.family,
        weight_bytes=weight_bytes,
        total_bytes=total_bytes,
        source_weight_bytes=fp32_bytes(whole or source),
        num_parameters=num_weights(source),
        num_tokens=num_tokens,
        max_input_tokens=form.max_input_tokens,
        max_label_tokens=form.max_label_tokens,
        seconds=time.monotonic() - begin,
        bits_a_parameter=verified.bits_a_parameter,
        bits_a_weight=verified.bits_a_weight,
        error_nats=verified.error_nats,
        types=verified.types,
        fallbacks=verified.fallbacks,
        cuts_as_trained=verified.cuts_as_trained,
    )
    artifact.write(folder)
    return artifact


@contextmanager
def _with_vocabulary(
    vocabulary: str | int, whole: Path, folder: Path, texts: Callable[[TextFormat, Encode], list[Sample]]
) -> Iterator[Path]:
    """The model's folder, or that of a copy without the tokens that no training row uses."""
    if vocabulary == "whole":
        yield whole
        return
    import torch

    from train.grids import read_scales, write_scales
    from train.models import encoder, load_folder, save_model
    from train.vocabulary import trim

    model, tokenizer, form = load_folder(whole, dtype=torch.float32)
    before = texts(form, encoder(tokenizer))
    if not before:
        raise ValueError(f"deploy.vocabulary is {vocabulary}, but every training input is one of the test split: set it to whole")
    used = {token for prompt, target in before for token in (*prompt, *target)}
    smaller, smaller_form, new = trim(model, tokenizer, form, used, 0 if isinstance(vocabulary, str) else vocabulary)
    after = texts(smaller_form, encoder(smaller))
    if any([new[token] for token in was] != list(now) for pair in zip(before, after, strict=True) for was, now in zip(*pair, strict=True)):
        raise RuntimeError(
            f"deploy.vocabulary is {vocabulary}, but without the other tokens training texts are cut otherwise: set it to whole"
        )
    with _for_a_while(folder / ".trimmed") as made:
        save_model(model, smaller, smaller_form, made / MODEL)
        if scales := read_scales(whole):
            write_scales(scales, made)
        del model
        yield made / MODEL


@contextmanager
def _calibrated(target: Target, source: Path, folder: Path, samples: Sequence[Sample]) -> Iterator[Path]:
    """The source, or a copy that training rows have made ready for the rounding; what recovered stands on its grid already."""
    if not samples or not (target.is_calibrated_here or target.is_smoothed_here):
        yield source
        return
    import torch

    from train.calibration import put_on_grids_by
    from train.grids import read_scales, write_scales
    from train.models import load_folder, save_model
    from train.smoothing import smooth

    if read_scales(source):
        yield source
        return
    model, tokenizer, form = load_folder(source, dtype=torch.float32)
    headers = {}
    if target.is_smoothed_here:
        smooth(samples, model)
    else:
        headers = put_on_grids_by(samples, model, module_of(target).grids(model, target))
    with _for_a_while(folder / f".{MODEL}.rounded") as made:
        save_model(model, tokenizer, form, made / MODEL)
        if headers:
            write_scales(headers, made)
        del model
        yield made / MODEL


@contextmanager
def _for_a_while(folder: Path) -> Iterator[Path]:
    """A folder that is empty first, and gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _verified(target: Target, source: Path, unchecked: Path, folder: Path, probes: list[Probe]) -> Verified:
    path, out = folder / "verify.json", folder / "verified.json"
    VerifyRequest(target.name, str(unchecked), fp32_bytes(source), probes, str(out)).write(path)
    run_told(command(path), f"{target.name}: what loads it")
    return Verified.read(out)


def samples_of(rows: Iterable[TaskExample], rationales: dict[str, str], form: TextFormat, encode: Encode) -> Iterator[Sample]:
    """Prompts and targets of rows as the student learnt them, those of one row side by side.

    Args:
        rows: of the training split.
        rationales: by the row's id, where there is one.
        form: how the student is called.
        encode: its tokenizer.
    """
    for row in rows:
        rationale = rationales.get(row.id) or row.rationale
        prompt = form.prompt_ids(form.part, row.input, encode)[0]
        if form.part == "solve":
            yield prompt, [token for segment in form.solution_ids(rationale or "", row.label, encode) for token in segment]
            continue
        yield prompt, form.label_ids(row.label, encode)[0]
        if rationale:
            yield form.prompt_ids("explain", row.input, encode)[0], form.rationale_ids(rationale, encode)[0]


def _probe(reference: TransformersRuntime, sample: Sample, *, is_other: bool = False) -> Probe:
    prompt, target = list(sample[0]), list(sample[1])[:_LONGEST_PROBE]
    return Probe(prompt, target, reference.log_probs(prompt, target), is_other)


def num_weights(model_folder: Path) -> int:
    """Numbers in a model's safetensors files, a tied matrix once.

    Raises:
        ValueError: if the folder has no safetensors file.
    """
    files = sorted(model_folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{model_folder} has no .safetensors file: it is not a model folder that stepdown made")
    total = 0
    for path in files:
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (it is no mapping)
    return total


def fp32_bytes(model_folder: Path) -> int:
    """Bytes of a model's safetensors files, were each tensor stored in fp32: what a quantized file is compared with."""
    headers = 0
    for path in model_folder.glob("*.safetensors"):
        with path.open("rb") as file:
            headers += 8 + int.from_bytes(file.read(8), "little")
    return headers + 4 * num_weights(model_folder)


def main(arguments: Sequence[str]) -> int:
    """Makes the file of the request named on the command line; the exit status. What a user can mend is told in one line."""
    # Libraries that look whether DeepSpeed is there have it print which accelerator it fell back to.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if len(arguments) != 1:
        print("usage: python -m train.deploy.stage REQUEST.json", file=sys.stderr)
        return 2
    return status_of(lambda: run(DeployRequest.read(Path(arguments[0]))))


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(sys.argv[1:]))
