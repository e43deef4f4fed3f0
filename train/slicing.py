"""Rows and columns of a model's matrices kept or dropped, and what must be told of it: the configuration and the modules."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from train.sources import quiet


def largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, in their own order; of equal ones the first."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def keep_rows(linear: nn.Linear, kept: Tensor) -> None:
    """Drops all outputs of a linear layer but these, in place."""
    linear.weight = part(linear.weight, 0, kept)
    if linear.bias is not None:
        linear.bias = part(linear.bias, 0, kept)


def keep_columns(linear: nn.Linear, kept: Tensor) -> None:
    """Drops all inputs of a linear layer but these, in place."""
    linear.weight = part(linear.weight, 1, kept)


def part(weight: Tensor, dim: int, kept: Tensor) -> nn.Parameter:
    """A parameter of its own that holds these rows (`dim` 0) or columns (1)."""
    return nn.Parameter(weight.detach().index_select(dim, kept), requires_grad=weight.requires_grad)


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configuration, and the copies that the stacks of a T5 hold."""
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())


def make_modules_agree(model: PreTrainedModel, key: str) -> None:
    """Gives each module the sizes it would have if made from the configuration, and checks that all weights have the shapes it says.

    Args:
        model: changed in place.
        key: the configuration key of the student's model, for messages.

    Raises:
        ValueError: if a weight has another shape, so that no transformers could load the model.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), quiet():
        plain = type(model)(copy.deepcopy(model.config)).eval()
    shapes = {name: value.shape for name, value in plain.state_dict().items()}
    held = {name: value.shape for name, value in model.state_dict().items()}
    differing = sorted(name for name in shapes.keys() | held.keys() if shapes.get(name) != held.get(name))
    if differing:
        raise ValueError(
            f"{key} cannot have fewer neurons or heads than its teacher: in a model of type {model.config.model_type} the size of "
            f"{differing[0]} depends on them in a way that is not known here: cut layers only"
        )
    for name, module in plain.named_modules():
        live = model.get_submodule(name)
        for attribute, number in vars(module).items():
            if type(number) in (int, float) and type(getattr(live, attribute, None)) is type(number):
                setattr(live, attribute, number)
