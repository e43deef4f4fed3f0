"""Whether a student is wide enough for a file to ship, before it is trained. Arithmetic only: imports no torch."""

from __future__ import annotations

from launch.architecture import Architecture
from train.deploy.targets import BLOCKS, SLACK_BITS, Target, fallback_of

HEAD_MULTIPLE = 16
"""Numbers of a head that ONNX Runtime's attention takes a multiple of (`train.deploy.onnx_decoder`)."""
LEAST_GROUP = 32
"""Weights of a row that share a scale in compressed-tensors of packed bits, at the least (`train.deploy.compressed_tensors`)."""
_PACKED = ("INT4", "INT3", "INT2")


def check_widths(target: Target, model: Architecture) -> None:
    """That the sizes of a student are such that the file can hold it.

    Args:
        target: the file.
        model: the student as it is shipped; one of which only the number of parameters is known is left alone.

    Raises:
        ValueError: if the file would be refused when it is made or verified, after the training.
    """
    if model.assumed:
        return
    named = f"deploy.targets holds {target.name}"
    if target.format == "onnx" and not model.encoder_layers and model.head_width % HEAD_MULTIPLE:
        raise ValueError(
            f"{named}, but a head of student.model has {model.head_width} numbers, and ONNX Runtime's attention takes multiples of "
            f"{HEAD_MULTIPLE}: choose a student of fewer or larger heads, or another target"
        )
    narrow = [inputs for inputs, _, _ in model.linears.values() if inputs % LEAST_GROUP]
    if target.format == "compressed_tensors" and target.type in _PACKED and narrow:
        raise ValueError(
            f"{named}, where {LEAST_GROUP} weights of a row or more share a scale, but student.model has rows of {min(narrow)}: choose "
            f"compressed-tensors-w8a16, or widths that are multiples of {LEAST_GROUP}"
        )
    if target.format == "gguf" and (bits := _held_bits(target, model)) > target.bits + SLACK_BITS:
        block, _ = BLOCKS[target.type]
        widths = " and ".join(map(str, sorted({inputs for inputs, _, _ in model.linears.values() if inputs % block})))
        raise ValueError(
            f"{named}, whose blocks are of {block} weights of a row, but student.model has rows of {widths}, which are stored as something "
            f"larger: {bits:.2f} bits a weight in place of {target.bits:g}; take a target of more bits, or a student whose sizes are "
            f"multiples of {block}"
        )


def _held_bits(target: Target, model: Architecture) -> float:
    """Bits a weight of the layers' matrices, or fewer: a recipe that mixes types takes none smaller than its own."""
    matrices = [(inputs, inputs * outputs * count) for inputs, outputs, count in model.linears.values()]
    return sum(BLOCKS[_type(target.type, inputs)][1] * size for inputs, size in matrices) / sum(size for _, size in matrices)


def _type(wished: str, inputs: int) -> str:
    while inputs % BLOCKS[wished][0]:
        wished = fallback_of(wished)
    return wished
