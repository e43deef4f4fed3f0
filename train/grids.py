"""The values that weights of few bits may take, as functions of the weights: what `recover` trains through, and its files then hold.

A row of a matrix is cut in groups, and each group has a scale (and a zero point) that follows from its own weights, in the precision
that the file stores it in. A model folder whose matrices stand on a grid has the scales in a file beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

Kind = Literal["signed", "symmetric", "asymmetric", "ternary", "binary"]
_SCALES = "scales.safetensors"
_TERNARY_THRESHOLD = 0.7
"""Of the mean size of a group's weights that are not 0: below it a weight becomes 0. Source: Li and Liu, arXiv 1605.04711."""
_RANGES = {2: 0.75, 3: 0.9, 4: 0.95}
"""Share of a group's range that codes of so many bits reach over: least squared error for groups of 32 normal numbers, of 64 at 4 bits."""


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix as a file stores it: value = (code - zero) x scale, group by group."""

    codes: Tensor
    """[rows, groups, group] fp32, whole numbers."""
    scale: Tensor
    """[rows, groups, 1] fp32, exact in the type that is stored; 0 of a group of zeros alone."""
    zero: Tensor
    """[rows, groups, 1] fp32, a whole number; 0 where a grid has none."""


@dataclass(frozen=True, slots=True)
class Levels:
    """What the weights of a group of columns may become: offset + scale x code."""

    scale: Tensor
    """[rows, columns] fp32; 0 where all codes mean the same."""
    offset: Tensor
    """[rows, columns] fp32."""
    ends: tuple[int, int]
    """The lowest and the highest code."""
    pinned: Tensor | None = None
    """[rows, 1] the column whose code is the lowest, whatever its weight: the scale follows from it."""
    header: Tensor | None = None
    """[rows, bytes] uint8, what a file stores of scale and offset, where they do not follow from the rounded weights."""

    def nearest(self, weight: Tensor, at: int) -> Tensor:
        """Weights of column `at`, [rows, 1], on the nearest of their levels."""
        scale, offset = self.scale[:, at : at + 1], self.offset[:, at : at + 1]
        codes = torch.round((weight - offset) / torch.where(scale == 0, 1.0, scale)).clamp(*self.ends)
        if self.pinned is not None:
            codes.masked_fill_(self.pinned == at, self.ends[0])
        return codes * scale + offset


class Leveled(Protocol):
    """How a matrix is stored, group by group of its columns."""

    @property
    def group(self) -> int:
        """Columns whose levels are found together."""

    def levels(self, weight: Tensor) -> Levels:
        """Of the columns of one group: [rows, columns] fp32; where a weight is to stay 0 it is 0."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How a matrix is stored."""

    kind: Kind
    """signed: the scale has the sign that puts the largest weight at the lowest code (Q4_0, ONNX); symmetric: codes on both sides of 0;
    asymmetric: from the least weight to the largest, 0 among them; ternary: -1, 0 and 1; binary: -1 and 1, also of a weight that is 0."""
    bits: int
    group: int
    """Weights of a row that share a scale; the last group of a row is filled up with zeros."""
    scale_type: torch.dtype = torch.float16

    def codes(self, weight: Tensor) -> Codes:
        """What is stored of a matrix.

        Args:
            weight: [rows, columns].
        """
        rows, columns = weight.shape
        grouped = F.pad(weight.float(), (0, -columns % self.group)).view(rows, -1, self.group)
        scale, zero = self._scales(grouped)
        scale = scale.to(self.scale_type).float()
        low, high = self.ends
        if self.kind == "binary":
            return Codes(torch.where(grouped < 0, -1.0, 1.0), scale, zero)
        steps = torch.where(scale == 0, torch.ones_like(scale), scale)
        return Codes((torch.round(grouped / steps) + zero).clamp(low, high), scale, zero)

    def rounded(self, weight: Tensor) -> Tensor:
        """The matrix as a reader of the file sees it: [rows, columns], in the weight's own type."""
        found = self.codes(weight)
        values = (found.codes - found.zero) * found.scale
        return values.flatten(1)[:, : weight.shape[1]].to(weight.dtype)

    def levels(self, weight: Tensor) -> Levels:
        """What a group of columns may become, its largest weight staying where it is: `rounded` gives what is chosen back.

        Args:
            weight: [rows, columns], no more columns than a group has.
        """
        assert self.kind == "signed", self
        largest = weight.abs().argmax(1, keepdim=True)
        scale = (weight.gather(1, largest) / self.ends[0]).to(self.scale_type).float().expand_as(weight)
        return Levels(scale, torch.zeros_like(weight), self.ends, pinned=largest)

    @property
    def ends(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        if self.kind == "ternary":
            return -1, 1
        half = 2 ** (self.bits - 1)
        return -half, half - 1

    def _scales(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        sizes = grouped.abs()
        low, high = self.ends
        # Weights that pruning took out, and what fills up a group, say nothing of how large the others are.
        mean = sizes.sum(-1, keepdim=True) / (sizes > 0).sum(-1, keepdim=True).clamp(min=1)
        if self.kind == "binary":
            scale = mean
        elif self.kind == "ternary":
            large = sizes > _TERNARY_THRESHOLD * mean
            scale = (sizes * large).sum(-1, keepdim=True) / large.sum(-1, keepdim=True).clamp(min=1)
        elif self.kind == "signed":
            scale = grouped.gather(-1, sizes.argmax(-1, keepdim=True)) / low
        elif self.kind == "symmetric":
            scale = _RANGES[self.bits] * 2 * sizes.amax(-1, keepdim=True) / (high - low)
        else:
            least = (_RANGES[self.bits] * grouped.amin(-1, keepdim=True)).clamp(max=0.0)
            most = (_RANGES[self.bits] * grouped.amax(-1, keepdim=True)).clamp(min=0.0)
            scale = (most - least) / (high - low)
            # The zero point is chosen for the scale that is stored.
            stored = scale.to(self.scale_type).float()
            steps = torch.where(stored == 0, torch.ones_like(stored), stored)
            return scale, (low - torch.round(least / steps)).clamp(low, high)
        return scale, torch.zeros_like(scale)


# An operator of its own: a compiler that fused the rounding with what is around it would compute scales in other precisions than the
# files hold, and other codes with them.
@torch.library.custom_op("stepdown::rounded", mutates_args=())
def _rounded(weight: Tensor, kind: str, bits: int, group: int, scale_type: torch.dtype) -> Tensor:
    return Grid(cast(Kind, kind), bits, group, scale_type).rounded(weight).contiguous()  # of a row that was filled up it is a view


@_rounded.register_fake
def _(weight: Tensor, kind: str, bits: int, group: int, scale_type: torch.dtype) -> Tensor:
    return torch.empty_like(weight)


def _straight(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    """Lets the gradient through as if nothing were rounded (the straight-through estimator).

    Source: Bengio et al., arXiv 1308.3432.
    """
    del ctx
    return gradient, None, None, None, None


_rounded.register_autograd(_straight)


class RoundedLinear(nn.Linear):
    """A linear layer that computes with its weights rounded, and learns them unrounded."""

    grid: Grid

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        grid = self.grid
        return F.linear(input, _rounded(self.weight, grid.kind, grid.bits, grid.group, grid.scale_type), self.bias)


def matrices(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers that a target quantizes, by name: all but the output matrix."""
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}


@contextmanager
def rounding(model: PreTrainedModel, grids: Mapping[str, Grid]) -> Iterator[None]:
    """Inside, the model computes with these matrices rounded; its parameters, and their names, are the same.

    Args:
        model: its plain linear layers are changed in place, and changed back.
        grids: by the name of a layer.
    """
    layers = matrices(model)
    try:
        for name, grid in grids.items():
            layers[name].__class__ = RoundedLinear
            cast(RoundedLinear, layers[name]).grid = grid
        yield
    finally:
        for name in grids:
            if isinstance(layers[name], RoundedLinear):
                layers[name].__class__ = nn.Linear
                del layers[name].grid


def put_on_grids(model: PreTrainedModel, grids: Mapping[str, Grid]) -> dict[str, Tensor]:
    """Rounds these matrices in place.

    Returns:
        `NAME.scale` and `NAME.zero` of each, [rows, groups].
    """
    scales: dict[str, Tensor] = {}
    layers = matrices(model)
    with torch.no_grad():
        for name, grid in grids.items():
            found = grid.codes(layers[name].weight)
            scales |= {f"{name}.scale": found.scale[..., 0].to(grid.scale_type), f"{name}.zero": found.zero[..., 0].to(torch.int8)}
            layers[name].weight.copy_(grid.rounded(layers[name].weight))
    return scales


def write_scales(scales: Mapping[str, Tensor], folder: Path) -> None:
    """Writes them beside the model folder `folder / "model"`."""
    save_file({name: scale.contiguous() for name, scale in scales.items()}, folder / _SCALES)


def read_scales(model_folder: Path) -> dict[str, Tensor]:
    """What `write_scales` wrote; empty of a model whose weights stand on no grid."""
    path = model_folder.parent / _SCALES
    return load_file(path) if path.is_file() else {}
