"""Rounding that loses little on data: matrices are put on their grids so that what the layers give on training rows changes least."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from train.grids import Grid, matrices

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Token ids of a prompt and of what follows it."""
_HELD_BYTES = 4 * 2**30
"""Of second moments at a time; where a model has more, the rows are read again for the next matrices."""
_DAMPING = 0.01
"""Added to the second moments' diagonal, as a share of its mean: directions that few rows show must not decide."""


@torch.no_grad()
def put_on_grids_by(rows: Rows, model: PreTrainedModel, grids: Mapping[str, Grid]) -> None:
    """Rounds these matrices in place, by GPTQ; what was 0 stays 0.

    Later matrices see what earlier ones have lost where the rows are read more than once.

    Args:
        rows: training rows; at least one.
        model: decoder-only or encoder-decoder, in fp32; computed with on the accelerator, where there is one, and given back on the CPU.
        grids: by the name of a layer; of kind signed.
    """
    layers = matrices(model)
    model.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    for names in _parts(grids, layers):
        with _second_moments({name: layers[name] for name in names}) as moments:
            for prompt, target in rows:
                model(**inputs_of(prompt, target, model.config.is_encoder_decoder, model.device))
        for name in names:
            layers[name].weight.copy_(rounded_by(moments[name], layers[name].weight, grids[name]))
    model.to("cpu")


def rounded_by(moments: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """A matrix on its grid, column by column, each column's error made up for by those that come after it.

    The largest weight of each group stays where its scale puts it, so that the scale follows from the rounded weights, too, and what was 0
    stays 0.

    Args:
        moments: [columns, columns] sum of x xᵀ over what the matrix is multiplied by.
        weight: [rows, columns] fp32.
        grid: of kind signed; `grid.rounded` gives what is returned back.

    Source: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1.
    """
    assert grid.kind == "signed", grid
    weight, chosen, is_zero = weight.clone(), torch.empty_like(weight), weight == 0
    upper = _factor(moments)
    low, high = grid.ends
    for first in range(0, weight.shape[1], grid.group):
        columns = slice(first, first + grid.group)
        group = weight[:, columns].clone()
        largest = group.abs().masked_fill(is_zero[:, columns], 0.0).argmax(1, keepdim=True)
        scale = (group.gather(1, largest) / low).to(grid.scale_type).float()
        steps = torch.where(scale == 0, torch.ones_like(scale), scale)
        errors = torch.zeros_like(group)
        for at in range(group.shape[1]):
            column = group[:, at : at + 1]
            codes = torch.round(column / steps).clamp(low, high)
            codes = torch.where(largest == at, torch.full_like(codes, low), codes)
            codes.masked_fill_(is_zero[:, first + at : first + at + 1], 0.0)
            chosen[:, first + at : first + at + 1] = codes * scale
            errors[:, at : at + 1] = (column - codes * scale) / upper[first + at, first + at]
            group[:, at + 1 :] -= errors[:, at : at + 1] @ upper[first + at : first + at + 1, first + at + 1 : first + group.shape[1]]
        weight[:, columns.stop :] -= errors @ upper[columns, columns.stop :]
    return chosen


def _factor(moments: Tensor) -> Tensor:
    """Upper triangular Cholesky factor of the inverse, the diagonal damped; a column that is never fed says nothing."""
    moments = moments.clone()
    diagonal = moments.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += _DAMPING * diagonal.mean()
    inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def _parts(grids: Mapping[str, Grid], layers: Mapping[str, nn.Linear]) -> Iterator[list[str]]:
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
