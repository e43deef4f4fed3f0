"""llama.cpp's own quantizers, in the library that the wheel xllamacpp brings: for types that the package gguf can only read."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray


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


@cache
def _quantizer() -> Any:
    """`ggml_quantize_chunk` of ggml.h: type, weights, where to, first weight, rows, columns, importance of the columns (none)."""
    import xllamacpp.xllamacpp as library

    try:
        found = ctypes.CDLL(library.__file__).ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise ValueError(
            f"{library.__file__} does not show llama.cpp's quantizers, which K-quants are made by: install xllamacpp as the wheel that "
            "PyPI has, or choose gguf-q8_0, gguf-q5_1 or gguf-q4_0"
        ) from error
    found.restype = ctypes.c_size_t
    found.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    return found
