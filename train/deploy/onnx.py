"""ONNX: one file of weights and its graphs, for decoder-only and T5 models.

    weights.bin     each array once: a tied embedding is read from one place by every graph and node that uses it
    decoder.onnx    tokens, and keys and values of those before them, to logits
    encoder.onnx    of a T5: what it reads, to the keys and values that the decoder looks at

A decoder-only model's graph comes from onnxruntime-genai's model builder, in fp32; a T5's, which that does not know, is written here. The
same code then quantizes the matrices of both, in blocks of 32 weights of a row with a scale of 16 bits: 8.5 and 4.5 bits a weight.
Embedding and head keep 8.5.

Modules onnx_* hold the parts: the graph and its weights, the two kinds of model, and the loop that serves them.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.prompts import FORMAT_FILE, TextFormat
from train.deploy.onnx_decoder import DECODER, DecoderGraph
from train.deploy.onnx_graph import BLOCK, EMBEDDING, HEAD, WEIGHTS, WIDENED, Weights
from train.deploy.onnx_t5 import ENCODER, T5Graphs
from train.deploy.targets import TOKENIZER, Sample, Stored, Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from train.grids import Grid

_BITS = {"float32": 32, "int8": 8, "int4": 4}


def make(source: Path, out: Path, target: Target, calibration: Sequence[Sample]) -> None:
    """Writes a complete folder: graphs, weights, tokenizer and `stepdown.json`.

    Args:
        source: a model of this project (safetensors, tokenizer.json, stepdown.json).
        out: the folder to make, which does not exist yet.
        target: its type is float32, int8 or int4; of the last two, all matrices, the embedding and the head are stored so.
        calibration: not used: weights are rounded block by block, to where they stand if they were rounded before (train/calibration.py).

    Raises:
        ValueError: if the folder is no model of this project, or there is no graph for its architecture.
    """
    if not (source / TOKENIZER).is_file():
        raise ValueError(f"{source} has no {TOKENIZER}, which the deployed model needs: give the student a fast tokenizer")
    form = TextFormat.load(source)
    out.mkdir(parents=True)
    # Within `out`, which goes with all that is in it where this is killed.
    with tempfile.TemporaryDirectory(dir=out, prefix=".build.") as folder:
        writer = T5Graphs(source) if form.family == "encoder_decoder" else DecoderGraph(source, Path(folder), form)
        with (out / WEIGHTS).open("wb") as file:
            graphs = writer.graphs(Weights(file), _BITS[target.type])
    for name, graph in graphs.items():
        (out / name).write_bytes(graph.SerializeToString())
    for name in (TOKENIZER, FORMAT_FILE):
        shutil.copyfile(source / name, out / name)


def grids(model: PreTrainedModel, target: Target) -> dict[str, Grid]:
    """How each matrix is rounded, by its name."""
    from train.grids import Grid, matrices

    return dict.fromkeys(matrices(model), Grid("signed", _BITS[target.type], BLOCK))


def stored(folder: Path) -> list[Stored]:
    """What a folder's graphs read, tensor by tensor; the integers that shapes are made of are left out.

    A place of the file that several nodes read counts once, under the first name: of tied weights, that of the embedding.
    """
    import onnx

    found: dict[object, Stored] = {}
    for name in (ENCODER, DECODER):
        if not (folder / name).is_file():
            continue
        for place, entry in _entries(name, onnx.load(folder / name, load_external_data=False)):
            found.setdefault(place, entry)
    return list(found.values())


def _entries(file: str, model: Any) -> Iterator[tuple[object, Stored]]:
    from onnx import helper

    graph = model.graph
    width = next(int(note.value) for note in model.metadata_props if note.key == "width")
    left = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        codes = left.pop(node.input[1 if node.op_type == "MatMulNBits" else 0])
        scales = left.pop(node.input[2].removesuffix(WIDENED))
        values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        name = codes.name.removesuffix(".codes")
        bytes_ = _num_bytes(codes) + _num_bytes(scales)
        num_weights = codes.dims[0] * values.get("K", width)
        yield _place(file, codes), Stored(name, num_weights, bytes_, f"int{values['bits']}", name not in (HEAD, EMBEDDING))
    matrices = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for name, tensor in left.items():
        kind = helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        if not kind.startswith("int"):
            yield _place(file, tensor), Stored(name, math.prod(tensor.dims), _num_bytes(tensor), kind, name in matrices)


def _num_bytes(tensor: Any) -> int:
    from onnx import helper

    return int(math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _place(file: str, tensor: Any) -> object:
    offsets = [entry.value for entry in tensor.external_data if entry.key == "offset"]
    return offsets[0] if offsets else (file, tensor.name)
