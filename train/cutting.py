"""A small model made of some layers, neurons and heads of a large one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from train.activity import Sample, column_scores, influences, measure, random_samples
from train.config import CutModel
from train.heads import keep_heads
from train.neurons import feed_forwards, keep_neurons
from train.slicing import make_modules_agree


def cut(model: PreTrainedModel, source: CutModel, key: str, samples: Sequence[Sample] | None = None) -> None:
    """Keeps the layers, and of those the neurons and heads, that `source` asks for, in place; the configuration then says so.

    The result is a plain model of its type: saved and loaded by transformers it gives the same logits. Layers that turn the residual stream
    most stay, and neurons and heads that add most to it, as the whole teacher has them on the samples. Norms of weights tell less than
    chance there:
    SmolLM2-135M-Instruct has a loss of 2.8 on CQA's texts, and with half its neurons 4.1 by this on 1,024 other tokens of CQA, 8.1 by this
    on random tokens, 10.7 to 14.5 by chance and 15.9 by the product of each neuron's norms.

    Args:
        model: the teacher; it is of no use where this raises.
        source: what to keep.
        key: the configuration key of the student's model, for messages.
        samples: texts like those that the student will meet, some thousand tokens; random tokens where None. Not read where the layers are
            listed and nothing else is cut.

    Raises:
        ValueError: if the model has fewer of them than asked for, or they cannot be told apart in a model of its type.
    """
    narrower = source.neurons is not None or source.heads is not None
    samples = samples or random_samples(model)
    activity = measure(model, samples) if narrower else {}
    if source.layers is not None:
        cut_layers(model, source.layers, key, samples)
    stacks = layers_of(model, key)
    if source.neurons is not None:
        parts = feed_forwards(model, [layer for stack in stacks for layer in stack], f"{key}.neurons is {source.neurons}")
        total = parts[0].outer.in_features
        if not 1 <= source.neurons <= total:
            raise ValueError(
                f"{key}.neurons is {source.neurons}, but the teacher's feed-forward layers have {total} neurons: ask for 1 to {total}"
            )
        keep_neurons(model, parts, [column_scores(part.outer, activity) for part in parts], source.neurons)
    if source.heads is not None:
        keep_heads(model, stacks, activity, source.heads, f"{key}.heads is {source.heads}")
    if narrower:
        make_modules_agree(model, key)


def cut_layers(model: PreTrainedModel, layers: int | list[int], key: str, samples: Sequence[Sample]) -> None:
    """Keeps only the chosen layers of `model`, in place, and makes its configuration say so.

    Args:
        model: a decoder-only model, or an encoder-decoder of the T5 family (both stacks are cut).
        layers: how many (the first of each stack, and those of the most influence on the samples), or which ones (0 is the first), in
            their order.
        key: the configuration key of the student's model, for messages.
        samples: read where `layers` is a number.

    Raises:
        ValueError: if the model has fewer layers or no such layer, or its layers cannot be told from its configuration.
    """
    stacks = _layer_stacks(model, key)
    for _, _, stack in stacks:
        _check(layers, len(stack), key)
    choices = [_strongest(model, stack, layers, samples) if isinstance(layers, int) else layers for _, _, stack in stacks]
    for (_, _, stack), chosen in zip(stacks, choices, strict=True):
        if _has_relative_bias(stack[0]) and chosen[0] != 0:
            raise ValueError(f"{key}.layers is {layers}, without layer 0: in a T5 it holds the relative position bias of all layers; add 0")
    for (parent, attribute, stack), chosen in zip(stacks, choices, strict=True):
        _replace(parent, attribute, stack, chosen)
    if model.config.is_encoder_decoder:
        _shorten_both(model, *(len(chosen) for chosen in choices))
    else:
        _shorten(model.config, choices[0])


def layers_of(model: PreTrainedModel, key: str) -> list[list[nn.Module]]:
    """The layers of a decoder-only model; or those of a T5's encoder and of its decoder.

    Raises:
        ValueError: if they cannot be told from its configuration.
    """
    return [list(stack) for _, _, stack in _layer_stacks(model, key)]


def _check(layers: int | list[int], total: int, key: str) -> None:
    if isinstance(layers, int):
        if not 1 <= layers <= total:
            raise ValueError(f"{key}.layers is {layers}, but the teacher has {total} layers: ask for 1 to {total}")
        return
    if not layers or any(not 0 <= layer < total for layer in layers):
        raise ValueError(f"{key}.layers is {layers}, but the teacher has {total} layers: list some of 0 to {total - 1}")
    if any(later <= earlier for earlier, later in itertools.pairwise(layers)):
        raise ValueError(f"{key}.layers is {layers}: list each layer once, in the teacher's order")


def _strongest(model: PreTrainedModel, stack: nn.ModuleList, count: int, samples: Sequence[Sample]) -> list[int]:
    """The first layer of a stack, which in a T5 holds the relative bias of all, and those others that have the most influence."""
    if count == len(stack):
        return list(range(count))
    found = influences(model, list(stack), samples)
    return [0, *sorted(sorted(range(1, len(stack)), key=lambda layer: -found[layer])[: count - 1])]


_Stack = tuple[nn.Module, str, nn.ModuleList]
"""The module that holds the layers, under which name, and the layers."""


def _layer_stacks(model: PreTrainedModel, key: str) -> list[_Stack]:
    """The layers of a decoder-only model; or those of a T5's encoder and of its decoder."""
    if not model.config.is_encoder_decoder:
        return [_layer_list(model, key)]
    found: list[_Stack] = []
    for parent in (model.get_encoder(), model.get_decoder()):
        stack = getattr(parent, "block", None)
        if not isinstance(stack, nn.ModuleList):
            raise ValueError(
                f"{key} needs the layers of a model of type {model.config.model_type}, but of the encoder-decoders only a T5's are known"
            )
        found.append((parent, "block", stack))
    return found


def _layer_list(model: PreTrainedModel, key: str) -> _Stack:
    total = getattr(model.config, "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [(name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    found = [(name, module) for name, module in outer if len(module) == total]
    if len(found) != 1:
        raise ValueError(f"{key} needs the layers of a model of type {model.config.model_type}, which are not one list: take another model")
    name, stack = found[0]
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute, stack


def _replace(parent: nn.Module, attribute: str, stack: nn.ModuleList, chosen: list[int]) -> None:
    kept = nn.ModuleList(stack[layer] for layer in chosen)
    for index, layer in enumerate(kept):
        for module in layer.modules():
            # The key-value cache is addressed by this index.
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]
    setattr(parent, attribute, kept)


def _shorten(config: PreTrainedConfig, chosen: list[int]) -> None:
    """Updates the depth, and the lists that say something about each layer (`layer_types` of Qwen and Gemma, and the like)."""
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list | tuple) and len(value) == config.num_hidden_layers:
            setattr(config, name, [value[layer] for layer in chosen])
    config.num_hidden_layers = len(chosen)


def _shorten_both(model: PreTrainedModel, encoder_layers: int, decoder_layers: int) -> None:
    # Each stack holds its own copy of the configuration, and the key-value cache of the decoder reads it.
    encoder, decoder = model.get_encoder().config, model.get_decoder().config
    for config in (model.config, encoder):
        config.num_layers = encoder_layers
    decoder.num_layers = decoder_layers
    for config in (model.config, encoder, decoder):
        config.num_decoder_layers = decoder_layers


def _has_relative_bias(block: nn.Module) -> bool:
    return any(getattr(module, "has_relative_attention_bias", False) for module in block.modules())
