"""What `stepdown quantize` runs in a process of its own: files to ship made of any transformers model.

python -m train.deploy.command REQUEST.json
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data.texts import read_texts
from train.artifacts import Family
from train.deploy.request import QuantizeRequest
from train.deploy.stage import NUM_PROBES, NUM_SAMPLES, deploy
from train.deploy.targets import GGUF_FILE, TARGETS, Sample
from train.models import family_of, load_model, save_model
from train.progress import StageProgress
from train.runtimes import TransformersRuntime
from train.signals import die_with_parent
from train.tokenization import load_tokenizer, text_format
from train.told import status_of

_TOKENS = 256
"""Most of a text."""
_LONGEST = 2048
"""Tokens of a prompt that the files have places for."""


def run(request: QuantizeRequest) -> None:
    """Makes each target in a folder of its own; one that fails is told, and the others are made.

    Raises:
        ValueError: if the model or the texts cannot be read.
        RuntimeError: if a target was not made.
    """
    out = Path(request.out_folder)
    source, lost = out / ".source", []
    shutil.rmtree(source, ignore_errors=True)
    try:
        samples = _opened(request, source)
        with StageProgress("quantize", len(request.targets), "files") as progress:
            for name in request.targets:
                try:
                    reference = TransformersRuntime(source, device="cpu")
                    made = deploy(TARGETS[name], source, out / name, samples, samples[:NUM_PROBES], reference)
                    if (told := out / name / "model" / "Modelfile").is_file():
                        told.write_text(f"FROM ./{GGUF_FILE}\n")  # the model's own template, not a task's
                    progress.advance(1, f"{name}: {made.weight_bytes:,} bytes")
                except Exception as error:  # of a converter: whatever it is, the others are made
                    lost.append(name)
                    kind = "" if isinstance(error, ValueError | RuntimeError) else f"{name}: {type(error).__name__}: "
                    print(f"error: {kind}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
                    progress.advance(1, f"{name}: not made")
    finally:
        shutil.rmtree(source, ignore_errors=True)
    if lost:
        raise RuntimeError(f"not made: {', '.join(lost)} (the reason stands above)")


def _opened(request: QuantizeRequest, source: Path) -> list[Sample]:
    """Writes the model as a folder of this project, and reads the texts with its tokenizer."""
    tokenizer = load_tokenizer(request.model, texts=None, folder=None, key="MODEL")
    texts = read_texts(Path(request.texts), NUM_SAMPLES)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:_TOKENS] for text in texts]
    if not any(len(row) > 1 for row in rows):
        raise ValueError(f"{request.texts} holds no text of two tokens or more")
    model = load_model(request.model, tokenizer, seed=0, dtype=torch.float32, key="MODEL")
    family = family_of(model)
    longest = min(_LONGEST, getattr(model.config, "max_position_embeddings", None) or _LONGEST)
    form = text_format(tokenizer, family, max_input_tokens=longest, max_label_tokens=_TOKENS, max_rationale_tokens=_TOKENS)
    save_model(model, tokenizer, form, source)
    return [_sample(row, form.prefix_ids, form.eos_id, family) for row in rows if len(row) > 1]


def _sample(row: list[int], prefix: Sequence[int], end: int, family: Family) -> Sample:
    """The first half of a text, and the second to predict."""
    first, second = row[: len(row) // 2], row[len(row) // 2 :]
    return ([*prefix, *first], second) if family == "decoder_only" else ([*first, end], second)


def main(arguments: Sequence[str]) -> int:
    """Runs the request named on the command line; the exit status. What a user can mend is told in one line."""
    if len(arguments) != 1:
        print("usage: python -m train.deploy.command REQUEST.json", file=sys.stderr)
        return 2
    # Libraries that look whether DeepSpeed is there have it print which accelerator it fell back to.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return status_of(lambda: run(QuantizeRequest.read(Path(arguments[0]))))


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(sys.argv[1:]))
