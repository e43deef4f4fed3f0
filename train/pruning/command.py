"""What `stepdown prune` runs in a process of its own: prunes any transformers model, or scans how much each kind of matrix can lose.

    python -m train.pruning.command REQUEST.json

A scan takes the same fractions out of one kind of matrix at a time, all others whole, and measures the loss on the texts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.texts import read_texts
from train.activity import Sample
from train.artifacts import write_json
from train.config import PruneConfig
from train.models import family_of, load_model, num_parameters
from train.progress import StageProgress
from train.pruning.once import mean_loss, prunable, prune
from train.pruning.requests import MEASURED, Pruned, PruneRequest, Scan
from train.pruning.sizes import file_sizes, sparsities
from train.signals import die_with_parent
from train.sources import quiet
from train.tokenization import load_tokenizer, save_tokenizer
from train.told import status_of

KEY = "prune"
_TEXTS, _TOKENS = 64, 512
"""Texts that are read, and tokens of each."""


def run(request: PruneRequest) -> None:
    """Writes the pruned model, or the scan, into the request's folder.

    Raises:
        ValueError: if the model, the texts or what is asked for do not go together.
        RuntimeError: if files are broken.
    """
    tokenizer = load_tokenizer(request.model, texts=None, folder=None, key="MODEL")
    model = load_model(request.model, tokenizer, seed=0, dtype=torch.float32, key="MODEL")
    model.to("cuda" if torch.cuda.is_available() and request.device != "cpu" else "cpu")
    samples = samples_of(request, model, tokenizer)
    out = Path(request.out)
    if request.fractions:
        found = scan(model, PruneConfig.model_validate(request.prune), samples, request.fractions)
        write_json(out / MEASURED, asdict(found))
        return
    config = PruneConfig.model_validate(request.prune)
    before, parameters = mean_loss(model, samples) if samples else None, num_parameters(model)
    prune(model, config, samples, KEY)
    after = mean_loss(model, samples) if samples else None
    with quiet():
        model.cpu().save_pretrained(out / "model")
    save_tokenizer(tokenizer, out / "model")
    sizes = file_sizes(out / "model")
    kinds = {kind.kind: (kind.weights, kind.zeros) for kind in sparsities(out / "model")}
    made = Pruned(parameters, num_parameters(model), before, after, sizes.file_bytes, sizes.compressed_bytes, kinds)
    write_json(out / MEASURED, asdict(made))


def samples_of(request: PruneRequest, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """The texts as token ids; an encoder-decoder reads the first half of each and predicts the second. None where there are no texts."""
    if request.texts is None:
        return []
    most = min(_TOKENS, getattr(model.config, "max_position_embeddings", None) or _TOKENS)
    rows = [tokenizer(text)["input_ids"][:most] for text in read_texts(Path(request.texts), _TEXTS)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ValueError(f"{request.texts} holds no text of two tokens or more")
    if family_of(model) == "encoder_decoder":
        return [(row[: len(row) // 2], row[len(row) // 2 :]) for row in rows]
    return [((), row) for row in rows]


def scan(model: PreTrainedModel, config: PruneConfig, samples: Sequence[Sample], fractions: Sequence[float]) -> Scan:
    """The loss with each of the fractions out of each kind of matrix.

    Args:
        model: as it was afterwards.
        config: magnitude or Wanda; the fraction is not looked at.
        samples: on which both scores and losses are measured.
        fractions: to take out.
    """
    names = list(prunable(model, config.exclude, KEY))
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    losses: dict[str, list[float]] = {kind: [] for kind in kinds}
    dense = mean_loss(model, samples)
    with StageProgress("scan", len(kinds) * len(fractions), "prunings") as progress:
        for kind in kinds:
            others = [name for name in names if name.rpartition(".")[2] != kind]
            parameters = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in set(names) - set(others)}
            whole = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            for fraction in fractions:
                prune(model, config.model_copy(update={"fraction": fraction, "exclude": [*config.exclude, *others]}), samples, KEY)
                losses[kind].append(mean_loss(model, samples))
                with torch.no_grad():
                    for name, parameter in parameters.items():
                        parameter.copy_(whole[name])
                progress.advance(1, f"{kind} at {fraction:g}: loss {losses[kind][-1]:.3f}")
    return Scan(config.method, list(fractions), dense, losses, sum(len(targets) for _, targets in samples))


def main(arguments: Sequence[str]) -> int:
    """Runs the request named on the command line; the exit status. What a user can mend is told in one line."""
    if len(arguments) != 1:
        print("usage: python -m train.pruning.command REQUEST.json", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        # Libraries that look whether DeepSpeed is there have it print which accelerator it fell back to.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return status_of(lambda: run(PruneRequest.read(Path(arguments[0]))))


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(sys.argv[1:]))
