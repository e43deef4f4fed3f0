"""Blocks of llama.cpp's types as levels that weights can be rounded to on training rows (train/calibration.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train.deploy.ggml import block_of, highest_code, levels_of, quantize
from train.grids import Levels


@dataclass(frozen=True, slots=True)
class Blocks:
    """A type whose blocks have scales, and offsets, that llama.cpp's own search finds."""

    type: str
    """By gguf's name; one that ggml.py knows the codes of."""

    @property
    def group(self) -> int:
        """Weights of a block."""
        return block_of(self.type)

    def levels(self, weight: Tensor) -> Levels:
        """Of one block of each row: [rows, group] fp32."""
        header = quantize(weight.cpu().numpy(), self.type)
        scale, offset = (torch.from_numpy(values).to(weight.device) for values in levels_of(header, self.type))
        return Levels(scale, offset, (0, highest_code(self.type)), header=torch.from_numpy(header))
