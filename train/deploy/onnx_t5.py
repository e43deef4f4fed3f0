"""The two ONNX graphs of a T5, written here: onnxruntime-genai's model builder does not know it, and torch's exporter fails on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.deploy.onnx_decoder import DECODER
from train.deploy.onnx_graph import FORBIDDEN, MICROSOFT, Array, Graph, Weights, value

ENCODER = "encoder.onnx"
_ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")


class T5Graphs:
    """Writes the two graphs of a T5."""

    def __init__(self, source: Path) -> None:
        import torch

        from train.models import load_folder

        self._model, _, _ = load_folder(source, dtype=torch.float32)
        self._config: Any = self._model.config
        if self._config.model_type not in ("t5", "mt5") or self._config.dense_act_fn not in _ACTIVATIONS:
            raise ValueError(
                f"deploy.targets: there is no ONNX graph for an encoder-decoder of type {self._config.model_type!r} with the activation "
                f"{getattr(self._config, 'dense_act_fn', None)!r}: choose a t5 or mt5 with {' or '.join(_ACTIVATIONS)}, or another target"
            )
        self._state: dict[str, Array] = {name: value.numpy() for name, value in self._model.state_dict().items()}

    def graphs(self, weights: Weights, bits: int) -> dict[str, Any]:
        """Both graphs, by their files' names."""
        self._graph = Graph(weights, bits)
        encoder = self._encoder()
        self._graph = Graph(weights, bits)
        return {ENCODER: encoder, DECODER: self._decoder()}

    def _encoder(self) -> Any:
        """Ids and mask to the keys and values of each layer of the decoder."""
        from onnx import TensorProto

        graph = self._graph
        hidden = graph.embedding("input_ids", self._state["encoder.embed_tokens.weight"], "embedded")
        graph.add("Cast", ["attention_mask"], "key_mask", to=TensorProto.INT32)
        length = self._length("input_ids", "length")
        self._bias("encoder", length, length, None)
        for i in range(self._config.num_layers):
            block = f"encoder.block.{i}"
            x = self._norm(hidden, f"{block}.layer.0.layer_norm.weight")
            own = [self._linear(x, f"{block}.layer.0.SelfAttention.{name}") for name in "qkv"]
            attended = self._attend([*own, "", "key_mask", "bias"], f"{block}.attended")
            hidden = self._sum(hidden, self._linear(attended, f"{block}.layer.0.SelfAttention.o"))
            hidden = self._feed_forward(hidden, f"{block}.layer.1")
        hidden = self._norm(hidden, "encoder.final_layer_norm.weight")
        outputs = [self._heads(hidden, i, kind) for i in range(self._config.num_decoder_layers) for kind in ("key", "value")]
        inputs = [value(name, "INT64", "batch", "source") for name in ("input_ids", "attention_mask")]
        return graph.model(inputs, [self._cache(name, "source") for name in outputs], width=self._config.d_model)

    def _decoder(self) -> Any:
        """Ids, the encoder's keys and values, and those of earlier ids, to logits."""
        from onnx import TensorProto

        graph = self._graph
        hidden = graph.embedding("input_ids", self._state["decoder.embed_tokens.weight"], "embedded")
        graph.add("Cast", ["attention_mask"], "key_mask", to=TensorProto.INT32)
        past = self._length("past.0.key", "past_length", axis=2)
        new = self._length("input_ids", "new_length")
        self._bias("decoder", new, graph.add("Add", [past, new], "total_length"), past)
        layers = range(self._config.num_decoder_layers)
        for i in layers:
            hidden = self._decoder_block(hidden, i)
        hidden = self._norm(hidden, "decoder.final_layer_norm.weight")
        if getattr(self._config, "scale_decoder_outputs", False):
            hidden = graph.add("Mul", [hidden, graph.constant("scale", np.array(self._config.d_model**-0.5, np.float32))], "scaled")
        graph.head(hidden, self._state["lm_head.weight"], "logits")
        names = [f"{i}.{kind}" for i in layers for kind in ("key", "value")]
        inputs = [value("input_ids", "INT64", "batch", "new"), value("attention_mask", "INT64", "batch", "source")]
        inputs += [self._cache(f"past.{name}", "past") for name in names] + [self._cache(f"cross.{name}", "source") for name in names]
        outputs = [value("logits", "FLOAT", "tokens", self._config.vocab_size)]
        outputs += [self._cache(f"present.{name}", "total") for name in names]
        return graph.model(inputs, outputs, start_id=self._config.decoder_start_token_id, width=self._config.d_model)

    def _decoder_block(self, hidden: str, i: int) -> str:
        block = f"decoder.block.{i}"
        x = self._norm(hidden, f"{block}.layer.0.layer_norm.weight")
        own = [self._linear(x, f"{block}.layer.0.SelfAttention.{name}") for name in "qkv"]
        before = [f"past.{i}.key", f"past.{i}.value"]
        attended = self._attend([*own, "", "", "bias", *before], f"{block}.attended", f"present.{i}.key", f"present.{i}.value")
        hidden = self._sum(hidden, self._linear(attended, f"{block}.layer.0.SelfAttention.o"))
        x = self._norm(hidden, f"{block}.layer.1.layer_norm.weight")
        query = self._linear(x, f"{block}.layer.1.EncDecAttention.q")
        attended = self._attend([query, f"cross.{i}.key", f"cross.{i}.value", "", "key_mask"], f"{block}.looked")
        hidden = self._sum(hidden, self._linear(attended, f"{block}.layer.1.EncDecAttention.o"))
        return self._feed_forward(hidden, f"{block}.layer.2")

    def _linear(self, x: str, name: str) -> str:
        return self._graph.linear(x, name, self._state[f"{name}.weight"], f"{name}.out")

    def _norm(self, x: str, name: str) -> str:
        inputs = [x, self._graph.constant(name, self._state[name])]
        # T5's norm has neither mean nor bias. ONNX Runtime's own operator, though it stands in the standard's domain.
        return self._graph.add("SimplifiedLayerNormalization", inputs, f"{name}.out", epsilon=self._config.layer_norm_epsilon, axis=-1)

    def _sum(self, hidden: str, x: str) -> str:
        return self._graph.add("Add", [hidden, x], f"{x}.sum")

    def _attend(self, inputs: Sequence[str], out: str, *present: str) -> str:
        # T5 does not divide its scores by the root of the width.
        return self._graph.add(
            "MultiHeadAttention", inputs, out, *present, domain=MICROSOFT, num_heads=self._config.num_heads, scale=1.0,
            mask_filter_value=float(FORBIDDEN),
        )  # fmt: skip

    def _feed_forward(self, hidden: str, layer: str) -> str:
        x = self._norm(hidden, f"{layer}.layer_norm.weight")
        dense = f"{layer}.DenseReluDense"
        if self._config.is_gated_act:
            gate = self._activated(self._linear(x, f"{dense}.wi_0"))
            x = self._graph.add("Mul", [gate, self._linear(x, f"{dense}.wi_1")], f"{dense}.gated")
        else:
            x = self._activated(self._linear(x, f"{dense}.wi"))
        return self._sum(hidden, self._linear(x, f"{dense}.wo"))

    def _activated(self, x: str) -> str:
        name, out = self._config.dense_act_fn, f"{x}.active"
        if name == "relu":
            return self._graph.add("Relu", [x], out)
        if name == "silu":
            return self._graph.add("Mul", [x, self._graph.add("Sigmoid", [x], f"{x}.sigmoid")], out)
        return self._graph.add("Gelu", [x], out, approximate="tanh" if name == "gelu_new" else "none")

    def _heads(self, hidden: str, i: int, kind: str) -> str:
        """The encoder's output as the keys or values that layer `i` of the decoder looks at, [batch, heads, length, width]."""
        x = self._linear(hidden, f"decoder.block.{i}.layer.1.EncDecAttention.{kind[0]}")
        shape = self._graph.constant("heads_shape", [0, 0, self._config.num_heads, self._config.d_kv])
        split = self._graph.add("Reshape", [x, shape], f"{x}.split")
        return self._graph.add("Transpose", [split], f"cross.{i}.{kind}", perm=[0, 2, 1, 3])

    def _cache(self, name: str, length: str) -> Any:
        return value(name, "FLOAT", "batch", self._config.num_heads, length, self._config.d_kv)

    def _length(self, x: str, out: str, axis: int = 1) -> str:
        shape = self._graph.add("Shape", [x], f"{out}.shape")
        return self._graph.add("Gather", [shape, self._graph.constant(f"{out}.axis", axis)], out, axis=0)

    def _bias(self, side: str, queries: str, keys: str, first: str | None) -> str:
        """What the distance from query to key adds to their score, [1, heads, queries, keys]; `first` is the first query's place."""
        graph = self._graph
        farthest = self._config.relative_attention_max_distance
        graph.constant("zero", 0)
        graph.constant("one", 1)
        query = graph.add("Range", ["zero", queries, "one"], "query_places")
        if first is not None:
            query = graph.add("Add", [query, first], "moved_places")
        column = graph.add("Unsqueeze", [query, graph.constant("axis_one", [1])], "query_column")
        key = graph.add("Range", ["zero", keys, "one"], "key_places")
        distance = graph.add("Sub", [key, column], "distance")
        near = graph.add("Clip", [distance, graph.constant("nearest", -farthest), graph.constant("farthest", farthest)], "clipped")
        row = graph.add("Add", [near, "farthest"], "bias_row")
        looked = graph.add("Gather", [graph.constant(f"{side}.bias", self._bias_table(side)), row], "bias_by_place", axis=1)
        return graph.add("Unsqueeze", [looked, graph.constant("axis_zero", [0])], "bias")

    def _bias_table(self, side: str) -> Array:
        """Of each head, at each distance of a key from its query that has a bias of its own: [heads, 2 x farthest + 1]."""
        import torch

        attention = self._model.get_submodule(f"{side}.block.0.layer.0.SelfAttention")
        farthest = self._config.relative_attention_max_distance
        distances = torch.arange(-farthest, farthest + 1)
        buckets = attention._relative_position_bucket(
            distances,
            bidirectional=side == "encoder",
            num_buckets=self._config.relative_attention_num_buckets,
            max_distance=farthest,
        )
        table = self._state[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"][buckets.numpy()].T
        return np.where(distances.numpy() > 0, FORBIDDEN, table) if side == "decoder" else table
