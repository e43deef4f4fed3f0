"""The ONNX graph of a decoder-only model: that of onnxruntime-genai's model builder, with our matrices and our head in it."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.prompts import TextFormat
from train.deploy.onnx_graph import Graph, Weights, value

DECODER = "decoder.onnx"
_HEAD_SIZES = 16


def _build(source: Path, folder: Path) -> None:
    """The model builder's fp32 graph of a decoder-only model."""
    with _quiet():
        try:
            # Importing it puts its own folder on the path, under names as common as `quantization`.
            path = list(sys.path)
            from onnxruntime_genai.models.builder import create_model, parse_extra_options

            sys.path[:] = path
            place = ("", str(source), str(folder), "fp32", "cpu", str(folder / "cache"))
            create_model(*place, **parse_extra_options(*place, ["hf_token=false"]))
        except NotImplementedError as error:
            raise ValueError(
                f"deploy.targets: onnxruntime-genai cannot build a graph of the student ({error}); choose a student of a family that it "
                "knows, such as llama, mistral, qwen2 or qwen3, or another target"
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The builder prints each layer and draws bars, and no setting turns that off.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


class DecoderGraph:
    """The model builder's graph with its matrices stored our way, and a head that works only on the tokens whose logits are asked for."""

    def __init__(self, source: Path, folder: Path, form: TextFormat) -> None:
        import onnx

        _build(source, folder)
        self._built = onnx.load(folder / "model.onnx").graph
        self._settings: dict[str, Any] = json.loads((folder / "genai_config.json").read_text())["model"]
        known = ("input_ids", "attention_mask", "past_key_values.")
        attends = any(node.op_type == "GroupQueryAttention" for node in self._built.node)
        if not attends or not all(entry.name.startswith(known) for entry in self._built.input):
            raise ValueError(
                f"deploy.targets: onnxruntime-genai builds another graph than ours for a student of type {self._settings['type']!r}; "
                "choose a student of a family such as llama, mistral, qwen2 or qwen3, or another target"
            )
        if (size := self._settings["decoder"]["head_size"]) % _HEAD_SIZES:
            raise ValueError(
                f"deploy.targets: a head of the student has {size} numbers, but ONNX Runtime's attention takes multiples of {_HEAD_SIZES}: "
                "choose a student of fewer or larger heads, or another target"
            )
        self._arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in self._built.initializer}
        self._places = self._shorten_positions(form)

    def graphs(self, weights: Weights, bits: int) -> dict[str, Any]:
        """The one graph, by its file's name."""
        self._graph = Graph(weights, bits)
        transposes = [node for node in self._built.node if node.op_type == "Transpose" and node.input[0] in self._arrays]
        turned = {node.output[0]: node.input[0] for node in transposes}
        for node in self._built.node:
            if node.output[0] not in turned:
                self._take(node, turned)
        inputs = [*map(self._fixed, self._built.input), value("positions", "INT64", "num_logits")]
        outputs = [value("logits", "FLOAT", "num_logits", self._settings["vocab_size"]), *map(self._fixed, self._built.output[1:])]
        return {DECODER: self._graph.model(inputs, outputs, max_positions=self._places, width=self._settings["decoder"]["hidden_size"])}

    def _shorten_positions(self, form: TextFormat) -> int:
        # The tables of the rotary embedding are as long as the longest input of the architecture: of a small model they are half the
        # file. Ours are as long as twice what the student was trained on, and the runtime refuses what is longer.
        rows = 2 * (form.max_input_tokens + max(form.max_answer_tokens, form.max_rationale_tokens))
        for name in {"cos_cache", "sin_cache"} & self._arrays.keys():
            self._arrays[name] = self._arrays[name][:rows]
            rows = len(self._arrays[name])
        return rows

    def _take(self, node: Any, turned: dict[str, str]) -> None:
        weight = self._arrays.get(node.input[1]) if len(node.input) > 1 else None
        if node.name == "/lm_head/MatMul" and weight is not None:
            self._graph.head(node.input[0], weight.T, node.output[0], "positions")
        elif node.op_type == "MatMul" and weight is not None:
            self._graph.linear(node.input[0], node.input[1].replace(".MatMul.weight", ""), weight.T, node.output[0])
        elif node.op_type == "Gather" and (table := turned.get(node.input[0], node.input[0])) in self._arrays and "embed" in node.name:
            array = self._arrays[table]
            self._graph.embedding(node.input[1], array.T if table != node.input[0] else array, node.output[0])
        else:
            for name in node.input:
                if name in self._arrays:
                    self._graph.constant(name, self._arrays[name])
            self._graph.nodes.append(node)

    def _fixed(self, value: Any) -> Any:
        # The builder leaves the width of a head open.
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == "kv_cache_dim":
                size.dim_value = self._settings["decoder"]["head_size"]
        return value
