"""Rounding that loses little on data: matrices are put on their grids so that what the layers give on training rows changes least."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from train.grids import Leveled, matrices

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Token ids of a prompt and of what follows it."""
_HELD_BYTES = 4 * 2**30
"""Of second moments at a time; where a model has more, the rows are read again for the next matrices."""
_DAMPING = 0.01
"""Added to the second moments' diagonal, as a share of its mean: directions that few rows show must not decide."""


@torch.no_grad()
def put_on_grids_by(rows: Rows, model: PreTrainedModel, grids: Mapping[str, Leveled]) -> dict[str, Tensor]:
    """Rounds these matrices in place, by GPTQ; what was 0 stays as near to 0 as its levels are.

    Later matrices see what earlier ones have lost where the rows are read more than once.

    Args:
        rows: training rows; at least one.
        model: decoder-only or encoder-decoder, in fp32; computed with on the accelerator, where there is one, and given back on the CPU.
        grids: by the name of a layer; a `Grid` of kind signed.

    Returns:
        `NAME.header` of each whose levels do not follow from its rounded weights: [rows, bytes] uint8, on the CPU.
    """
    layers = matrices(model)
    headers: dict[str, Tensor] = {}
    model.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    for names in _parts(grids, layers):
        with _second_moments({name: layers[name] for name in names}) as moments:
            for prompt, target in rows:
                model(**inputs_of(prompt, target, model.config.is_encoder_decoder, model.device))
        for name in names:
            chosen, header = rounded_by(moments[name], layers[name].weight, grids[name])
            layers[name].weight.copy_(chosen)
            if header is not None:
                headers[f"{name}.header"] = header.cpu()
    model.to("cpu")
    return headers


def rounded_by(moments: Tensor, weight: Tensor, grid: Leveled) -> tuple[Tensor, Tensor | None]:
    """A matrix on its grid, column by column, each column's error made up for by those that come after it.

    A group's levels are found when its turn comes, for its weights with what they make up for. What was 0 is put on the level next to 0.

    Args:
        moments: [columns, columns] sum of x xᵀ over what the matrix is multiplied by.
        weight: [rows, columns] fp32.
        grid: a `Grid` of kind signed gives by `rounded` what is returned back.

    Returns:
        The matrix, and [rows, bytes] the headers of its levels, group after group, where they have any.

    Source: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1.
    """
    weight, chosen, is_zero = weight.clone(), torch.empty_like(weight), weight == 0
    upper, headers = _factor(moments), []
    for first in range(0, weight.shape[1], grid.group):
        columns = slice(first, first + grid.group)
        group = weight[:, columns].clone()
        levels = grid.levels(group.masked_fill(is_zero[:, columns], 0.0))
        headers += [] if levels.header is None else [levels.header]
        errors = torch.zeros_like(group)
        for at in range(group.shape[1]):
            column = group[:, at : at + 1]
            values = levels.nearest(column.masked_fill(is_zero[:, first + at : first + at + 1], 0.0), at)
            chosen[:, first + at : first + at + 1] = values
            errors[:, at : at + 1] = (column - values) / upper[first + at, first + at]
            group[:, at + 1 :] -= errors[:, at : at + 1] @ upper[first + at : first + at + 1, first + at + 1 : first + group.shape[1]]
        weight[:, columns.stop :] -= errors @ upper[columns, columns.stop :]
    return chosen, torch.cat(headers, dim=1) if headers else None


def _factor(moments: Tensor) -> Tensor:
    """Upper triangular Cholesky factor of the inverse, the diagonal damped; a column that is never fed says nothing."""
    moments = moments.clone()
    diagonal = moments.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += _DAMPING * diagonal.mean()
    inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def _parts(grids: Mapping[str, Leveled], layers: Mapping[str, nn.Linear]) -> Iterator[list[str]]:
    """Names in the order of the model, so many at a time that their second moments fit into memory."""
    part: list[str] = []
    held = 0
    for name in (name for name in layers if name in grids):
        size = 4 * layers[name].in_features ** 2
        if part and held + size > _HELD_BYTES:
            yield part
            part, held = [], 0
        part, held = [*part, name], held + size
    if part:
        yield part


@contextmanager
def _second_moments(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """Inside, each layer adds up x xᵀ of what it is fed."""
    found = {name: torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device) for name, layer in layers.items()}

    def add(name: str, inputs: tuple[Tensor, ...]) -> None:
        fed = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        found[name].addmm_(fed.T, fed)

    hooks = [layer.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def inputs_of(
    prompt: Sequence[int], target: Sequence[int], is_encoder_decoder: bool, device: torch.device | None = None
) -> dict[str, Tensor]:
    """One row, alone, as a model takes it: there is no padding that calibration would have to leave out."""
    if is_encoder_decoder:
        return {"input_ids": torch.tensor([[*prompt]], device=device), "labels": torch.tensor([[*target]], device=device)}
    return {"input_ids": torch.tensor([[*prompt, *target]], device=device)}
