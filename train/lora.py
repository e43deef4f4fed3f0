"""Low-rank adapters (LoRA) beside the frozen weights of a model, and the plain weights they come to.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from train.config import LoraConfig

_ADAPTER = "default"
"""The name that peft gives to the only adapter of a layer."""


def attach_lora(model: PreTrainedModel, config: LoraConfig, key: str, *, seed: int = 0) -> PreTrainedModel:
    """Puts adapters into a model and freezes everything else.

    The model stays the object and the type it was. Each adapted layer becomes one of peft's: its own weight goes by `base_layer.weight`,
    its adapter by `lora_A.default.weight` [rank, in] and `lora_B.default.weight` [out, rank], in the dtype of the layer. B starts at 0, so
    that the outputs are at first what they were.

    Args:
        model: changed in place; on whatever device.
        config: rank, alpha, dropout, and which layers.
        key: what `config` was written under, such as student.lora, for messages.
        seed: of A's random start, which must be the same on every process; the global generator is left as it was.

    Returns:
        The same object.

    Raises:
        ValueError: if `config.modules` names what is no linear layer of the model, or its head.
    """
    targets = _targets(model, config.modules, key)
    # Importing peft takes seconds, which a run without adapters is spared.
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    settings = PeftConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)
    assert adapted is model, "peft changes a model in place"
    # New modules start in training mode, where dropout acts.
    return model.train(model.training)


def _targets(model: PreTrainedModel, modules: Sequence[str] | None, key: str) -> list[str]:
    """Full names of the layers to adapt."""
    head = model.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = [name for name, module in linears.items() if module is not head]
    if modules is None:
        if not layers:
            raise ValueError(f"{key} has no linear layers to adapt in a model of type {model.config.model_type}: remove lora")
        return layers
    for module in modules:
        if any(linears[name] is head for name in _named(linears, module)):
            # Losses take the head's weight as it is, and merging would part it from the embeddings it may be tied to.
            raise ValueError(f"{key}.modules names {module!r}, the model's head, which cannot be adapted: remove it")
        if not _named(layers, module):
            raise ValueError(
                f"{key}.modules names {module!r}, which is no linear layer of a model of type {model.config.model_type}: "
                f"name some of {', '.join(sorted({name.rpartition('.')[2] for name in layers}))}"
            )
    return [name for name in layers if any(_named([name], module) for module in modules)]


def _named(layers: Mapping[str, nn.Module] | Sequence[str], module: str) -> list[str]:
    # As in peft: the whole name, or its end.
    return [name for name in layers if f".{name}".endswith(f".{module}")]


def plain_name(name: str) -> str | None:
    """What a tensor of an adapted model is called in the plain one; None for an adapter's, which the plain one lacks."""
    return None if {"lora_A", "lora_B"} & set(name.split(".")) else name.replace(".base_layer.", ".")


def merged_weights(state: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The plain model's weights: W + alpha / rank B A where there is an adapter (equation 3 of the paper), and the rest as it is.

    Args:
        state: the whole weights of a model that `attach_lora` changed, under its names; left alone.
        config: the one that the adapters were made with.

    Returns:
        Weights under the plain model's names, each in its own dtype; the sum is taken in float32. Those without an adapter are not copied.
    """
    merged = {}
    for name, value in state.items():
        plain = plain_name(name)
        if plain is not None:
            layer = name.removesuffix("base_layer.weight")
            merged[plain] = value if layer == name else _merged(value, *_factors(state, layer), config.alpha / config.rank)
    return merged


def _factors(state: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    return state[f"{layer}lora_A.{_ADAPTER}.weight"], state[f"{layer}lora_B.{_ADAPTER}.weight"]


def _merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)
