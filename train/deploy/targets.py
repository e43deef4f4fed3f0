"""The files that a student can become: which runtime loads each, and what its weights are stored as.

Imports no library of any runtime. A format is a module of this folder with three names:

    make(source, out, target, calibration)   writes a complete folder from a model folder of this project (safetensors, tokenizer,
                                             stepdown.json), and copies tokenizer.json and stepdown.json into it
    grids(model, target)                     of a format with targets of few bits: how each matrix is rounded (train/grids.py), by its
                                             name; what `make` writes of values that stand on these grids is the same values, where a
                                             grid has headers with those beside the source
    stored(folder)                           what the file holds, tensor by tensor, read from the file itself
    a runtime, opened by train/runtimes.py   answers prompts, and gives log-probabilities of targets (`log_probs`)
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from train.artifacts import Family
from train.runtimes import RuntimeKind

Format = Literal["ctranslate2", "gguf", "onnx", "compressed_tensors"]
TOKENIZER = "tokenizer.json"
GGUF_FILE = "model.gguf"
Sample = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of what follows it: of a training row, to calibrate on."""

_BOTH: tuple[Family, ...] = ("decoder_only", "encoder_decoder")
_DECODERS: tuple[Family, ...] = ("decoder_only",)
RECOVERED = "-recovered"
"""Ends the name of the file, and the rung, whose weights were trained through the rounding."""
MAX_RECOVERED_BITS = 4
SLACK_BITS = 0.7
"""Bits a weight of the quantized matrices that scales, zero points and padding may add to what a target's name says."""


BLOCKS: dict[str, tuple[int, float]] = {
    "F16": (1, 16.0),
    "Q8_0": (32, 8.5),
    "Q5_1": (32, 6.0),
    "Q5_0": (32, 5.5),
    "Q4_0": (32, 4.5),
    "Q6_K": (256, 6.5625),
    "Q5_K": (256, 5.5),
    "Q4_K": (256, 4.5),
    "Q3_K": (256, 3.4375),
    "Q2_K": (256, 2.625),
    "TQ2_0": (256, 2.0625),
    "TQ1_0": (256, 1.6875),
    "Q1_0": (128, 1.125),
}
"""Of gguf's types: weights of a row that a block holds, and bits a weight with the block's scales. Source: the package gguf, which a
login node need not have."""
_FALLBACKS = {
    **dict.fromkeys(("TQ2_0", "TQ1_0", "Q1_0", "Q2_K", "Q3_K"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


def fallback_of(type: str) -> str:
    """What gguf stores a matrix as whose rows are no multiple of this type's block."""
    return _FALLBACKS.get(type, "F16")


@dataclass(frozen=True, slots=True)
class Target:
    """One kind of file."""

    name: str
    format: Format
    type: str
    """What the matrices of its layers are stored as, by the format's own name."""
    bits: float
    """Of a weight of a quantized matrix, by that name."""
    families: tuple[Family, ...]
    mixed_with: tuple[str, ...] = ()
    """Types that the format's own recipe of this name gives some of the matrices."""

    @property
    def types(self) -> tuple[str, ...]:
        """All that its quantized matrices are stored as."""
        return self.type, *self.mixed_with

    @property
    def runtime(self) -> RuntimeKind:
        """What loads it."""
        return _RUNTIMES[self.format]

    @property
    def quantizes(self) -> bool:
        """Weights lose more than the rounding to a float of 16 bits."""
        return self.bits < 16

    @property
    def holds_zeros(self) -> bool:
        """A weight that pruning has set to zero is zero in the file, or next to it.

        A single bit is plus or minus; of Q2_K's few codes that begin at a group's least weight, none need be near 0.
        """
        return self.type not in ("Q1_0", "Q2_K")

    @property
    def is_calibrated_here(self) -> bool:
        """Its rounding is chosen on training rows before the format's module stores it; compressed-tensors files have their own library."""
        return self.type in ("Q6_K", "Q5_1", "Q5_0", "Q4_K", "Q4_0", "Q3_K", "Q2_K", "int4")

    @property
    def is_smoothed_here(self) -> bool:
        """Its runtime rounds what matrices read to 8 bits, one scale a token: the channels are brought to like sizes before."""
        return self.format == "ctranslate2" and self.type == "int8"

    @property
    def can_recover(self) -> bool:
        """So few bits that training through the rounding pays; a K-quant's scales are found by a search that is not repeated here."""
        return self.bits <= MAX_RECOVERED_BITS and not self.mixed_with


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file."""

    name: str
    """By the format's own naming."""
    num_weights: int
    """Numbers of the model that it holds."""
    num_bytes: int
    """That it takes, its scales and zero points too."""
    type: str
    """By the format's own name."""
    is_matrix: bool
    """A matrix of the model's layers, which a quantized target quantizes; not an embedding, the head or a vector."""
    num_scaled_rows: int = 0
    """Rows that have one scale each, in a format without smaller groups: how much that adds depends on their length."""

    @property
    def bits(self) -> float:
        """A weight."""
        return 8 * self.num_bytes / self.num_weights


def _of(format: Format, prefix: str, families: tuple[Family, ...], types: dict[str, tuple[str, float]]) -> dict[str, Target]:
    return {f"{prefix}-{name}": Target(f"{prefix}-{name}", format, type, bits, families) for name, (type, bits) in types.items()}


TARGETS: dict[str, Target] = {
    **_of(
        "ctranslate2",
        "ctranslate2",
        _BOTH,
        {"float32": ("float32", 32), "float16": ("float16", 16), "int8": ("int8", 8), "int8_float16": ("int8", 8)},
    ),
    **_of(
        "gguf",
        "gguf",
        _DECODERS,
        {
            "f16": ("F16", 16),
            "q8_0": ("Q8_0", 8),
            "q5_1": ("Q5_1", 5.5),  # by its definition 6: a scale and a minimum, of 16 bits each, for 32 weights
            "q5_0": ("Q5_0", 5),
            "q4_0": ("Q4_0", 4),
            "tq2_0": ("TQ2_0", 2),
            "tq1_0": ("TQ1_0", 1.6),
            "q1_0": ("Q1_0", 1),
        },
    ),
    # Bits by the definition of the type: a super-block of 256 weights has scales of its scales.
    "gguf-q6_k": Target("gguf-q6_k", "gguf", "Q6_K", 6, _DECODERS),
    "gguf-q4_k_m": Target("gguf-q4_k_m", "gguf", "Q4_K", 4.5, _DECODERS, ("Q6_K",)),
    "gguf-q3_k_m": Target("gguf-q3_k_m", "gguf", "Q3_K", 3.4375, _DECODERS, ("Q4_K", "Q5_K")),
    "gguf-q2_k": Target("gguf-q2_k", "gguf", "Q2_K", 2.625, _DECODERS, ("Q3_K", "Q4_K")),
    **_of("onnx", "onnx", _BOTH, {"float32": ("float32", 32), "int8": ("int8", 8), "int4": ("int4", 4)}),
    **_of(
        "compressed_tensors",
        "compressed-tensors",
        _BOTH,
        {"bf16": ("BF16", 16), "w8a8": ("I8", 8), "fp8": ("F8_E4M3", 8)},
    ),
    # Packed weights of a T5 do not load again in transformers 5.17: it looks for each matrix's `weight` while it loads.
    **_of(
        "compressed_tensors",
        "compressed-tensors",
        _DECODERS,
        {"w8a16": ("INT8", 8), "w4a16": ("INT4", 4), "w3a16": ("INT3", 3), "w2a16": ("INT2", 2)},
    ),
}
"""By name; the names are those of `train.config.DeployTarget`."""

_RUNTIMES: dict[Format, RuntimeKind] = {
    "ctranslate2": "ctranslate2",
    "gguf": "llama_cpp",
    "onnx": "onnx",
    "compressed_tensors": "compressed_tensors",
}
_LIBRARIES: dict[Format, tuple[tuple[str, ...], str]] = {
    "ctranslate2": (("ctranslate2",), "stepdown"),
    "gguf": (("gguf", "xllamacpp"), "stepdown[gguf]"),
    "onnx": (("onnx", "onnxruntime", "onnxruntime_genai"), "stepdown[onnx]"),
    "compressed_tensors": (("compressed_tensors", "llmcompressor"), "stepdown[vllm]"),
}


def target_of(rung: str) -> Target | None:
    """The target of a rung of the ladder, or of a deploy stage; None where it is no file to ship."""
    return TARGETS.get(rung.removesuffix(RECOVERED))


def module_of(target: Target) -> Any:
    """The module of a target's format; its libraries are imported with it."""
    return importlib.import_module(f"train.deploy.{target.format}")


def check_possible(target: Target, family: Family) -> None:
    """That a model of this family can become such a file here.

    Raises:
        ValueError: if the runtime does not know the family, or a library is not installed.
    """
    if family not in target.families:
        others = ", ".join(name for name, other in TARGETS.items() if family in other.families)
        raise ValueError(
            f"deploy.targets holds {target.name}, which is for {target.families[0]} models, but the student is {family}: use {others}"
        )
    check_installed(target)


def check_installed(target: Target) -> None:
    """That a file of this kind can be made here.

    Raises:
        ValueError: if a library is not installed.
    """
    needed, extra = _LIBRARIES[target.format]
    missing = [library for library in needed if importlib.util.find_spec(library) is None]
    if missing:
        raise ValueError(f"deploy.targets holds {target.name}, which needs {' and '.join(missing)}: pip install '{extra}', or remove it")
