"""A small model made of some layers of a large one."""

from __future__ import annotations

import itertools

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def evenly_spaced(count: int, total: int) -> list[int]:
    """`count` of `total` layers, spaced evenly, the first and the last among them (the first, where only one is kept)."""
    return [0] if count == 1 else [(2 * i * (total - 1) + count - 1) // (2 * (count - 1)) for i in range(count)]


def cut_layers(model: PreTrainedModel, layers: int | list[int], key: str) -> None:
    """Keeps only the chosen layers of `model`, in place, and makes its configuration say so.

    Args:
        model: a decoder-only model, or an encoder-decoder of the T5 family (both stacks are cut).
        layers: how many (spaced evenly), or which ones (0 is the first), in their order.
        key: the configuration key of the student's model, for messages.

    Raises:
        ValueError: if the model has fewer layers or no such layer, or its layers cannot be told from its configuration.
    """
    if not model.config.is_encoder_decoder:
        name, stack = _layer_list(model, key)
        chosen = _choice(layers, len(stack), key)
        _replace(model, name, stack, chosen)
        _shorten(model.config, chosen)
        return
    encoder, decoder = getattr(model.get_encoder(), "block", None), getattr(model.get_decoder(), "block", None)
    if not isinstance(encoder, nn.ModuleList) or not isinstance(decoder, nn.ModuleList):
        raise ValueError(f"{key} is cut from a teacher of type {model.config.model_type}, but of the encoder-decoders only a T5 can be cut")
    chosen_encoder, chosen_decoder = _choice(layers, len(encoder), key), _choice(layers, len(decoder), key)
    for stack, chosen in ((encoder, chosen_encoder), (decoder, chosen_decoder)):
        if _has_relative_bias(stack[0]) and chosen[0] != 0:
            raise ValueError(f"{key}.layers is {layers}, without layer 0: in a T5 it holds the relative position bias of all layers; add 0")
    _replace(model.get_encoder(), "block", encoder, chosen_encoder)
    _replace(model.get_decoder(), "block", decoder, chosen_decoder)
    # Each stack holds its own copy of the configuration, and the key-value cache of the decoder reads it.
    for config in (model.config, model.get_encoder().config):
        config.num_layers = len(chosen_encoder)
    model.get_decoder().config.num_layers = len(chosen_decoder)
    for config in (model.config, model.get_encoder().config, model.get_decoder().config):
        config.num_decoder_layers = len(chosen_decoder)


def _choice(layers: int | list[int], total: int, key: str) -> list[int]:
    if isinstance(layers, int):
        if not 1 <= layers <= total:
            raise ValueError(f"{key}.layers is {layers}, but the teacher has {total} layers: ask for 1 to {total}")
        return evenly_spaced(layers, total)
    if not layers or any(not 0 <= layer < total for layer in layers):
        raise ValueError(f"{key}.layers is {layers}, but the teacher has {total} layers: list some of 0 to {total - 1}")
    if any(later <= earlier for earlier, later in itertools.pairwise(layers)):
        raise ValueError(f"{key}.layers is {layers}: list each layer once, in the teacher's order")
    return layers


def _layer_list(model: PreTrainedModel, key: str) -> tuple[str, nn.ModuleList]:
    total = model.config.num_hidden_layers
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [(name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    found = [(name, module) for name, module in outer if len(module) == total]
    if len(found) != 1:
        raise ValueError(f"{key} is cut from a teacher of type {model.config.model_type}, whose layers are not one list: name a model")
    return found[0]


def _replace(model: nn.Module, name: str, stack: nn.ModuleList, chosen: list[int]) -> None:
    kept = nn.ModuleList(stack[layer] for layer in chosen)
    for index, layer in enumerate(kept):
        for module in layer.modules():
            # The key-value cache is addressed by this index.
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, kept)


def _shorten(config: PreTrainedConfig, chosen: list[int]) -> None:
    """Updates the depth, and the lists that say something about each layer (`layer_types` of Qwen and Gemma, and the like)."""
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list | tuple) and len(value) == config.num_hidden_layers:
            setattr(config, name, [value[layer] for layer in chosen])
    config.num_hidden_layers = len(chosen)


def _has_relative_bias(block: nn.Module) -> bool:
    return any(getattr(module, "has_relative_attention_bias", False) for module in block.modules())
