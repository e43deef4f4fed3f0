"""What a model's config.json tells of its shape, as far as memory and arithmetic depend on it. Imports no torch, loads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launch.parameters import count_parameters, family_of_config, head_width
from train.artifacts import Family

_HEAD_WIDTH = 128
"""Of a model of which only the number of parameters is known."""
_GROUPS = 8
"""Of heads that share keys and values; likewise."""
_VOCABULARY = 128_256
"""Likewise: that of Llama 3, larger than most."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of a transformer."""

    parameters: int
    family: Family
    encoder_layers: int
    """0 of a decoder-only model."""
    layers: int
    """Of the decoder."""
    width: int
    """Of the residual stream."""
    neurons: int
    """Of a feed-forward layer, or of one expert."""
    gated: bool
    """The feed-forward layer has three matrices, not two."""
    heads: int
    key_value_heads: int
    head_width: int
    vocabulary: int
    """Rows of the embedding."""
    tied: bool
    """The head is the embedding."""
    norms: int = 2
    """Of the residual stream's width, in a layer."""
    experts: int = 1
    """Feed-forward layers beside each other."""
    experts_a_token: int = 1
    packs: bool = True
    """Its attention takes sequences joined in a row: causal, without windows or caps."""
    assumed: bool = False
    """Only the number of parameters is known; the rest is what a model of that size usually has."""

    @property
    def queries(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        """Width of all key heads, or value heads."""
        return self.key_value_heads * self.head_width

    @property
    def largest_matrix(self) -> int:
        """Parameters of the largest matrix of a layer."""
        return self.width * max(self.neurons, self.queries)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding; the head has as many."""
        return self.vocabulary * self.width

    @property
    def embeddings(self) -> int:
        """Parameters of embedding and head."""
        return self.embedding * (1 if self.tied else 2)

    @property
    def body(self) -> int:
        """Parameters of all layers."""
        return max(0, self.parameters - self.embeddings)

    @property
    def layer(self) -> int:
        """Parameters of a layer, on average."""
        return self.body // (self.layers + self.encoder_layers)

    @property
    def active(self) -> int:
        """Parameters that a token meets: of several experts only its own."""
        if self.experts == 1:
            return self.parameters
        idle = (self.experts - self.experts_a_token) * (3 if self.gated else 2) * self.width * self.neurons
        return self.parameters - self.layers * idle

    @property
    def linears(self) -> dict[str, tuple[int, int, int]]:
        """(inputs, outputs, how many) of the linear layers by their names, the head apart."""
        width, queries, keys = self.width, self.queries, self.keys
        if self.family == "encoder_decoder":
            attentions, stacks = self.encoder_layers + 2 * self.layers, self.encoder_layers + self.layers
            inner = ("wi_0", "wi_1") if self.gated else ("wi",)
            found = dict.fromkeys("qkv", (width, queries, attentions)) | {"o": (queries, width, attentions)}
            return found | dict.fromkeys(inner, (width, self.neurons, stacks)) | {"wo": (self.neurons, width, stacks)}
        inner = ("gate_proj", "up_proj") if self.gated else ("up_proj",)
        found = {"q_proj": (width, queries, self.layers)} | dict.fromkeys(("k_proj", "v_proj"), (width, keys, self.layers))
        found |= {"o_proj": (queries, width, self.layers)}
        return found | dict.fromkeys(inner, (width, self.neurons, self.layers)) | {"down_proj": (self.neurons, width, self.layers)}


def architecture_of(config_json: Mapping[str, Any]) -> Architecture:
    """The shape that a config.json describes.

    Raises:
        ValueError: as `launch.parameters.count_parameters`.
    """
    parameters, config, kind = count_parameters(config_json), config_json, str(config_json["model_type"])
    if kind in ("t5", "mt5"):
        layers = int(config["num_layers"])
        decoder = config.get("num_decoder_layers")
        return Architecture(
            parameters, family_of_config(config), layers, layers if decoder is None else int(decoder), config["d_model"], config["d_ff"],
            config.get("feed_forward_proj", "relu").startswith("gated-"), config["num_heads"], config["num_heads"], config["d_kv"],
            config["vocab_size"], bool(config.get("tie_word_embeddings", True)), packs=False,
        )  # fmt: skip
    heads, gemma = int(config["num_attention_heads"]), kind.startswith("gemma")
    groups = config.get("num_key_value_heads")
    return Architecture(
        parameters,
        family_of_config(config),
        0,
        config["num_hidden_layers"],
        config["hidden_size"],
        config["intermediate_size"],
        True,
        heads,
        heads if groups is None else int(groups),
        head_width(config),
        config["vocab_size"],
        bool(config.get("tie_word_embeddings", gemma)),
        norms=4 if gemma else 2,
        experts=int(config.get("num_local_experts", 1)) if kind == "mixtral" else 1,
        experts_a_token=int(config.get("num_experts_per_tok", 2)) if kind == "mixtral" else 1,
        packs=not gemma,
    )


def assumed_architecture(parameters: int) -> Architecture:
    """The shape that a model of so many parameters may have, where nothing else is known of it.

    As many layers as heads of 128: GPT-3's 96 at 175 billion, near Llama's 32 at 8 and 80 at 70. Heads share keys and values of eight
    groups, as most models since Llama 2 do; one whose every head has its own (GPT-3) takes more memory for them.

    Args:
        parameters: more than 0.
    """
    # 12 width^2 a layer, width 128 x layers.
    exact = (parameters / (12 * _HEAD_WIDTH**2)) ** (1 / 3)
    layers = max(1, round(exact / 8) * 8 if exact >= 4 else round(exact))
    width = layers * _HEAD_WIDTH
    vocabulary = min(_VOCABULARY, max(1, parameters // (4 * width)))
    return Architecture(
        parameters,
        "decoder_only",
        0,
        layers,
        width,
        4 * width,
        False,
        layers,
        min(layers, _GROUPS),
        _HEAD_WIDTH,
        vocabulary,
        True,
        assumed=True,
    )
