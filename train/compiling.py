"""torch.compile of a model's layers, one graph for all of a stack."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def compile_layers(model: PreTrainedModel) -> None:
    """Has each layer of the model's stacks compiled when it runs first; the layers of a stack share what the first one made.

    A batch has another number of tokens each time, so the graphs are made for any. Does nothing to a model that has been here before.
    """
    for stack in _stacks(model):
        for layer in stack:
            if layer._compiled_call_impl is None:
                layer.compile(dynamic=True)


def _stacks(model: PreTrainedModel) -> list[nn.ModuleList]:
    """The outermost lists of layers of one kind."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    outer = [(name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    return [module for _, module in outer if len({type(layer) for layer in module}) == 1]
