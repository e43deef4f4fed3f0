"""llama.cpp's own quantizers, in the library that the wheel xllamacpp brings: for types that the package gguf can only read.

A block of such a type is a header, of which a scale and an offset for each of its weights follow, and the weights' codes: value = offset +
scale x code. The codes can be chosen otherwise than by the quantizer, which takes the nearest.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class _Plane:
    """Bytes of a block that hold some bits of each code: the first byte those of weights 0, run, 2 x run, ... from its lowest bits on."""

    at: int
    """The first byte."""
    bits: int
    """Of a code."""
    run: int
    """Weights from one that a byte holds to the next, and bytes after which the next weights begin."""
    shift: int = 0
    """Bits of a code that lie in other planes, below these."""


_PLANES = {
    "Q5_1": (_Plane(8, 4, 16), _Plane(4, 1, 1, shift=4)),
    "Q2_K": (_Plane(16, 2, 32),),
    "Q3_K": (_Plane(32, 2, 32), _Plane(0, 1, 32, shift=2)),
    "Q4_K": (_Plane(16, 4, 32),),
    "Q5_K": (_Plane(48, 4, 32), _Plane(16, 1, 32, shift=4)),
    "Q6_K": (_Plane(0, 4, 64), _Plane(128, 2, 32, shift=4)),
}
"""Of each type whose codes can be set here. Source: the structs block_q* of ggml-common.h and dequantize_row_q* of ggml-quants.c."""
CODED = tuple(_PLANES)


def quantize(values: NDArray[np.float32], type: str) -> NDArray[np.uint8]:
    """The blocks of a matrix.

    Args:
        values: [rows, columns]; the type's block divides the columns.
        type: by gguf's name.

    Returns:
        [rows, bytes of a row].

    Raises:
        ValueError: if the library is one that does not show its quantizers.
    """
    kind = gguf.GGMLQuantizationType[type]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = values.shape
    given = np.ascontiguousarray(values, dtype=np.float32)
    packed = np.empty((rows, columns // block * size), np.uint8)
    written = _quantizer()(int(kind), given.ctypes.data, packed.ctypes.data, 0, rows, columns, None)
    assert written == packed.nbytes, f"{type}: {written} bytes of {packed.nbytes}"
    return packed


def block_of(type: str) -> int:
    """Weights of a block."""
    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]][0])


def highest_code(type: str) -> int:
    """The lowest is 0."""
    return int(2 ** sum(plane.bits for plane in _PLANES[type]) - 1)


def levels_of(blocks: NDArray[np.uint8], type: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and offset of each weight, [rows, columns]; the codes of the blocks ([rows, bytes of a row]) are not looked at."""
    kind, high = gguf.GGMLQuantizationType[type], highest_code(type)
    columns = blocks.shape[1] // gguf.GGML_QUANT_SIZES[kind][1] * block_of(type)
    lowest, highest = (
        gguf.quants.dequantize(with_codes(blocks, np.full((len(blocks), columns), code, np.uint8), type), kind) for code in (0, high)
    )
    return (highest - lowest) / np.float32(high), lowest


def coded(values: NDArray[np.float32], blocks: NDArray[np.uint8], type: str) -> NDArray[np.uint8]:
    """The blocks with the codes whose values are nearest to these.

    Args:
        values: [rows, columns].
        blocks: [rows, bytes of a row]; their codes are not looked at.
        type: one of `CODED`.
    """
    scale, offset = levels_of(blocks, type)
    codes = np.rint((values - offset) / np.where(scale == 0, 1, scale)).clip(0, highest_code(type))
    return with_codes(blocks, codes.astype(np.uint8), type)


def with_codes(blocks: NDArray[np.uint8], codes: NDArray[np.uint8], type: str) -> NDArray[np.uint8]:
    """The blocks, [rows, bytes of a row], with these codes, [rows, columns], in place of theirs."""
    packed = blocks.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]][1]).copy()
    codes = codes.reshape(len(packed), -1)
    for plane in _PLANES[type]:
        fields = (codes >> plane.shift & (2**plane.bits - 1)).reshape(len(packed), -1, 8 // plane.bits, plane.run)
        fields <<= np.arange(0, 8, plane.bits, dtype=np.uint8)[:, None]
        held = np.bitwise_or.reduce(fields, axis=2).reshape(len(packed), -1)
        packed[:, plane.at : plane.at + held.shape[1]] = held
    return packed.reshape(len(blocks), -1)


@cache
def _quantizer() -> Any:
    """`ggml_quantize_chunk` of ggml.h: type, weights, where to, first weight, rows, columns, importance of the columns (none)."""
    import xllamacpp.xllamacpp as library

    try:
        found = ctypes.CDLL(library.__file__).ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise ValueError(
            f"{library.__file__} does not show llama.cpp's quantizers, which K-quants are made by, and gguf-q5_1 on training rows: install "
            "xllamacpp as the wheel that PyPI has, or choose gguf-q8_0, gguf-q5_0 or gguf-q4_0"
        ) from error
    found.restype = ctypes.c_size_t
    found.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    return found
