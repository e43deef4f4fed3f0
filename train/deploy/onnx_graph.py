"""An ONNX graph in the making, its matrices stored in blocks of few bits, and the file of weights that all graphs of a model share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

WEIGHTS = "weights.bin"
MICROSOFT = "com.microsoft"
HEAD = "lm_head"
EMBEDDING = "embedding"
WIDENED = ".float32"
FORBIDDEN = np.float32(-1e9)
"""Added to the score of a key that a query must not see."""
BLOCK = 32
"""Weights of a row that share a scale."""
_TABLE_BITS = 8
"""Of embedding and head where matrices have 8 bits or fewer: they cost 14 MB more of SmolLM2 at 4, and bring KL from 0.33 to 0.25."""
_OPSETS = {"": 22, MICROSOFT: 1}
_LOOSE_BYTES = 128
"""Arrays below this stay in the graph: shapes are inferred from constants, which must not lie in another file."""
_ALIGNED = 64
"""Bytes; what the widest vector instructions load at once."""


class Weights:
    """The file that all graphs of a model read their arrays from; equal bytes are written once."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._places: dict[bytes, int] = {}

    def tensor(self, name: str, array: Array) -> Any:
        """The array as a tensor of a graph: a place in the file, or, where it is small, the numbers themselves."""
        from onnx import StringStringEntryProto, TensorProto, numpy_helper

        array = np.ascontiguousarray(array)
        if array.nbytes < _LOOSE_BYTES:
            return numpy_helper.from_array(array, name)
        place = {"location": WEIGHTS, "offset": self._offset(array), "length": array.nbytes}
        kind = numpy_helper.from_array(array.reshape(-1)[:0]).data_type
        tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        tensor.external_data.extend(StringStringEntryProto(key=key, value=str(value)) for key, value in place.items())
        return tensor

    def _offset(self, array: Array) -> int:
        raw = array.reshape(-1).view(np.uint8)
        digest = hashlib.sha256(raw.data).digest()
        if digest not in self._places:
            self._file.write(bytes(-self._file.tell() % _ALIGNED))
            self._places[digest] = self._file.tell()
            self._file.write(raw.data)
        return self._places[digest]


def quantize(weight: Array, bits: int) -> tuple[Array, Array]:
    """Rounds a matrix to integers in blocks along its rows, each with the scale that keeps its largest weight.

    A weight is `(code - 2^(bits-1)) x scale`. The last block of a row is padded with zeros.

    Args:
        weight: [rows, columns].
        bits: 4 or 8.

    Returns:
        Codes, uint8 [rows, blocks, 32 x bits / 8], of 4 bits the earlier one in the lower half; and scales, float16 [rows, blocks].
    """
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK)
    padded = np.zeros((rows, blocks * BLOCK), np.float32)
    padded[:, :columns] = weight
    padded = padded.reshape(rows, blocks, BLOCK)
    half = 2 ** (bits - 1)
    largest = np.take_along_axis(padded, np.abs(padded).argmax(-1)[..., None], -1)
    # The range of the codes is one longer on the negative side: there goes the largest weight, whatever its sign.
    scales = (largest / -half).astype(np.float16)
    steps = np.where(scales == 0, np.float32(1), scales.astype(np.float32))
    codes = np.clip(np.rint(padded / steps) + half, 0, 2 * half - 1).astype(np.uint8)
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes, scales[..., 0]


class Graph:
    """A graph in the making."""

    def __init__(self, weights: Weights, bits: int) -> None:
        self._weights, self._bits = weights, bits
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {}

    def add(self, kind: str, inputs: Sequence[str], out: str, *more: str, domain: str = "", **attributes: Any) -> str:
        """A node; gives the name of its first output."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [out, *more], name=f"{out}/{kind}", domain=domain, **attributes))
        return out

    def constant(self, name: str, value: Array | Sequence[int] | int) -> str:
        """An array of the graph, by its name; integers are int64."""
        if name not in self.tensors:
            self.tensors[name] = self._weights.tensor(name, np.asarray(value))
        return name

    def linear(self, x: str, name: str, weight: Array, out: str) -> str:
        """`x` times the transpose of a matrix [outputs, inputs]."""
        if self._bits == 32:
            return self.add("MatMul", [x, self.constant(name, weight.T)], out)
        return self._quantized_linear(x, name, weight, out, self._bits)

    def head(self, hidden: str, weight: Array, out: str, positions: str | None = None) -> str:
        """Logits [tokens, vocabulary] of the rows of `hidden`; of those at `positions`, counted through the batch, where given."""
        flat = self.add("Reshape", [hidden, self.constant("flat_shape", [-1, weight.shape[1]])], f"{out}.rows")
        if positions is not None:
            flat = self.add("Gather", [flat, positions], f"{out}.chosen", axis=0)
        if self._bits == 32:
            # As the embedding is laid out, so that tied ones are one array.
            return self.add("Gemm", [flat, self.constant(HEAD, weight)], out, transB=1)
        return self._quantized_linear(flat, HEAD, weight, out, _TABLE_BITS)

    def embedding(self, ids: str, weight: Array, out: str) -> str:
        """The rows of a matrix [vocabulary, width]."""
        if self._bits == 32:
            return self.add("Gather", [self.constant(EMBEDDING, weight), ids], out, axis=0)
        codes, scales = quantize(weight, _TABLE_BITS)
        table = self.constant(f"{EMBEDDING}.codes", codes.reshape(len(codes), -1))
        layout = {"bits": _TABLE_BITS, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        inputs = [table, ids, self._scales(EMBEDDING, scales)]
        if (width := weight.shape[1]) % BLOCK == 0:
            return self.add("GatherBlockQuantized", inputs, out, domain=MICROSOFT, **layout)
        wide = self.add("GatherBlockQuantized", inputs, f"{out}.padded", domain=MICROSOFT, **layout)
        ends = [self.constant(f"{out}.{key}", [value]) for key, value in (("first", 0), ("end", width), ("axis", -1))]
        return self.add("Slice", [wide, *ends], out)

    def _quantized_linear(self, x: str, name: str, weight: Array, out: str, bits: int) -> str:
        codes, scales = quantize(weight, bits)
        inputs = [x, self.constant(f"{name}.codes", codes), self._scales(name, scales)]
        layout = {"N": weight.shape[0], "K": weight.shape[1], "bits": bits, "block_size": BLOCK}
        # 4: multiply in integers; each row of x gets scales of its own, so that no row depends on the rest of the batch.
        return self.add("MatMulNBits", inputs, out, domain=MICROSOFT, accuracy_level=4, **layout)

    def _scales(self, name: str, scales: Array) -> str:
        from onnx import TensorProto

        # The kernels take scales of the inputs' type only; ONNX Runtime widens these once, while it loads.
        half = self.constant(f"{name}.scales", scales)
        wide = half + WIDENED
        if not any(wide in node.output for node in self.nodes):
            self.add("Cast", [half], wide, to=TensorProto.FLOAT)
        return wide

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any], **notes: int) -> Any:
        """The finished model.

        Args:
            inputs: as onnx describes values.
            outputs: likewise.
            notes: what a runtime must know of the model, kept in the file.
        """
        from onnx import helper

        graph = helper.make_graph(self.nodes, "student", inputs, outputs, list(self.tensors.values()))
        opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="stepdown")
        helper.set_model_props(model, {name: str(value) for name, value in notes.items()})
        return model


def value(name: str, kind: str, *shape: int | str) -> Any:
    """What a graph takes or gives, as onnx describes it."""
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape)
