"""A file to ship looked at before it counts, in a fresh process that has nothing but the file's own runtime.

    python -m train.deploy.verify REQUEST.json

It must load, give finite numbers near those of the fp32 model, be smaller, and hold what its name says, tensor by tensor.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from train.artifacts import Request, write_json
from train.deploy.targets import SLACK_BITS, TARGETS, Stored, Target, module_of
from train.runtimes import Runtime, open_runtime
from train.signals import die_with_parent
from train.told import status_of

FLOOR = -10.0
"""Nats: all that is less probable counts as being so improbable. A sure model's least tokens are far apart and mean nothing."""
_BOUNDS = {16: 0.05, 8: 0.25, 5: 0.4, 4: 1.0}
"""Most nats a token, on average, that a target of at least so many bits may be off; below there is no bound, only finiteness."""
_SLOPES = (0.5, 2.0)
"""Between these lies what log-probabilities are multiplied by, for targets of 4 bits and more: logits scaled otherwise, by T5's root of
d_model say, change no sure answer, so that `_BOUNDS` does not see it."""
_SURE = 1.0
"""Sum of squares, nats: so sure of all tokens is a model of which no slope can be told."""
_SOURCE_BITS = _SCALE_BITS = 32


@dataclass(frozen=True, slots=True)
class Probe:
    """A text of a training row, and what the fp32 model thinks of its end."""

    prompt: list[int]
    target: list[int]
    log_probs: list[float]
    """Natural, of each token of the target."""
    is_other: bool = False
    """The target is that of another text, and improbable: it shows how the numbers are scaled, not how well the model is kept."""


@dataclass(frozen=True, slots=True)
class VerifyRequest(Request):
    """What to look at."""

    target: str
    model_folder: str
    source_weight_bytes: int
    """Of the fp32 model's file."""
    probes: list[Probe]
    out: str
    """File of the `Verified`."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "probes": [Probe(**probe) for probe in values["probes"]]})


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found."""

    error_nats: float
    """Mean distance of the log-probabilities of the probes' tokens to the fp32 model's, none taken as less than `FLOOR`."""
    bits_a_parameter: float
    """Of the whole file's tensors."""
    bits_a_weight: float
    """Of the matrices of the model's layers, with scales and zero points."""
    types: dict[str, int]
    """Tensors by what they are stored as."""
    fallbacks: list[str]
    """Matrices of the layers that are stored as something else than the target says."""
    cuts_as_trained: bool | None
    """Whether the engine's own tokenizer gives texts the tokens that the student learnt; None where it has none."""
    load_seconds: float

    @classmethod
    def read(cls, path: Path) -> Self:
        """What the process wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def run(request: VerifyRequest) -> Verified:
    """Looks at a file, and writes what was found.

    Raises:
        RuntimeError: if it is not what it should be; the message says in what.
    """
    target, folder = TARGETS[request.target], Path(request.model_folder)
    tensors: list[Stored] = module_of(target).stored(folder)
    check_stored(target, tensors, request.source_weight_bytes)
    begin = time.perf_counter()
    runtime = open_runtime(target.runtime, folder, device="cpu")
    loaded = time.perf_counter() - begin
    given = [runtime.log_probs(probe.prompt, probe.target) for probe in request.probes]
    error = check_error(target, request.probes, given)
    check_slope(target, request.probes, given)
    runtime.answer([probe.prompt for probe in request.probes[:2]], max_new_tokens=2)
    matrices = [tensor for tensor in tensors if tensor.is_matrix]
    found = Verified(
        error_nats=error,
        bits_a_parameter=_bits(tensors),
        bits_a_weight=_bits(matrices),
        types=dict(Counter(tensor.type for tensor in tensors)),
        fallbacks=[tensor.name for tensor in matrices if tensor.type not in target.types] if target.quantizes else [],
        cuts_as_trained=_cuts_as_trained(runtime, request.probes),
        load_seconds=loaded,
    )
    write_json(Path(request.out), asdict(found))
    return found


def _cuts_as_trained(runtime: Runtime, probes: Sequence[Probe]) -> bool | None:
    check = getattr(runtime, "cuts_as_trained", None)
    return None if check is None else all(check(runtime.decode(probe.prompt)) for probe in probes)


def check_stored(target: Target, tensors: Sequence[Stored], source_bytes: int) -> None:
    """What the file holds, by its own account.

    Args:
        target: what it should be.
        tensors: of the file.
        source_bytes: of the fp32 model's file.

    Raises:
        RuntimeError: if it is no smaller than its source, or its matrices take more bits than its name says.
    """
    matrices = [tensor for tensor in tensors if tensor.is_matrix]
    if not matrices:
        raise RuntimeError(f"deploy.targets: {target.name} holds no matrix of the model's layers: the file is not what its name says")
    size = sum(tensor.num_bytes for tensor in tensors)
    if target.bits < _SOURCE_BITS and size >= source_bytes:
        raise RuntimeError(
            f"deploy.targets: {target.name} takes {size:,} bytes, not fewer than its fp32 source ({source_bytes:,}): the model is too "
            "small to gain from it; remove the target"
        )
    bits, weights = _bits(matrices), sum(tensor.num_weights for tensor in matrices)
    # A scale a row is what such a format is; only of rows of some 40 weights is it more than the slack.
    slack = max(SLACK_BITS, _SCALE_BITS * sum(tensor.num_scaled_rows for tensor in matrices) / weights)
    if bits > target.bits + slack:
        others = Counter(tensor.type for tensor in matrices if tensor.type not in target.types)
        kinds = ", ".join(f"{count} of {len(matrices)} as {kind}" for kind, count in others.items()) or "none as anything else"
        raise RuntimeError(
            f"deploy.targets: {target.name} holds {bits:.2f} bits a weight of the layers' matrices, its name says {target.bits:g} "
            f"({kinds}): rows that the type's blocks do not divide are stored as something larger; take a target of more bits, or a "
            "student whose sizes are multiples of 256"
        )


def check_error(target: Target, probes: Sequence[Probe], found: Sequence[Sequence[float]]) -> float:
    """Mean distance, in nats a token, of what the file gives to what the fp32 model gave.

    Args:
        target: whose bits bound it.
        probes: with the fp32 model's log-probabilities.
        found: those of the file, of the same tokens.

    Raises:
        RuntimeError: if a number is not finite, or the distance is over the bound.
    """
    for probe, values in zip(probes, found, strict=True):
        if len(values) != len(probe.target) or not all(map(math.isfinite, values)):
            raise RuntimeError(
                f"deploy.targets: {target.name} gives log-probabilities that are not finite ({list(values)}): the checkpoint's weights are "
                "not finite, or overflow in this type; train again, or choose a target of more bits"
            )
    compared = [(probe, values) for probe, values in zip(probes, found, strict=True) if not probe.is_other]
    distances = [
        abs(max(ours, FLOOR) - max(theirs, FLOOR))
        for probe, values in compared
        for ours, theirs in zip(values, probe.log_probs, strict=True)
    ]
    error = sum(distances) / len(distances)
    bound = next((most for bits, most in _BOUNDS.items() if target.bits >= bits), math.inf)
    if error > bound:
        raise RuntimeError(
            f"deploy.targets: {target.name} is {error:.2f} nats a token away from the fp32 model on {len(compared)} training rows, more "
            f"than {bound:g}: it is not the same model any more; choose a target of more bits"
        )
    return error


def check_slope(target: Target, probes: Sequence[Probe], found: Sequence[Sequence[float]]) -> None:
    """That log-probabilities are not the fp32 model's times something: the slope of the line through 0 that fits them best.

    Args:
        target: below 4 bits a model may well be less sure of itself.
        probes: with the fp32 model's log-probabilities.
        found: those of the file, of the same tokens.

    Raises:
        RuntimeError: if the slope is not near 1.
    """
    pairs = [pair for probe, values in zip(probes, found, strict=True) for pair in zip(probe.log_probs, values, strict=True)]
    squares = sum(theirs**2 for theirs, _ in pairs)
    if squares < _SURE or target.bits < min(_BOUNDS):
        return
    slope = sum(theirs * ours for theirs, ours in pairs) / squares
    if not _SLOPES[0] < slope < _SLOPES[1]:
        raise RuntimeError(
            f"deploy.targets: {target.name} gives log-probabilities {slope:.2g} times those of the fp32 model: its logits are scaled "
            "otherwise, a fault of what writes this file for such a model; choose a target of another format"
        )


def _bits(tensors: Sequence[Stored]) -> float:
    return 8 * sum(tensor.num_bytes for tensor in tensors) / sum(tensor.num_weights for tensor in tensors)


def command(path: Path) -> list[str]:
    """The command line of a process that verifies the request in the file `path`."""
    return [sys.executable, "-m", "train.deploy.verify", str(path)]


if __name__ == "__main__":
    die_with_parent()
    sys.exit(status_of(lambda: run(VerifyRequest.read(Path(sys.argv[1])))))
