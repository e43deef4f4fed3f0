"""Weights that were pruned stay exactly zero while the others go on learning, under every ZeRO stage.

Once a weight and AdamW's two moments of it are zero, and its gradient is made zero before anything is done with it, all later updates of
it are zero too: the moments stay zero, weight decay takes a share of nothing, and rounding to bf16 has nothing to round. Masking weights
and gradients alone would not do: momentum from before gives a weight back (Adam without its moments zeroed leaves no sparsity at all).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from train.shards import PARTS, Shard

_FILE = "masks.pt"


class HeldMasks:
    """Masks of some parameters of an engine, the same on every process."""

    def __init__(self, trained: Mapping[str, nn.Parameter], device: torch.device) -> None:
        """Holds nothing yet.

        Args:
            trained: the parameters that may be pruned, by name.
            device: where their gradients are made.
        """
        self._trained, self._device = trained, device
        self._masks: dict[str, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.holding: object | None = None
        """What tells backward passes apart: another object whenever a parameter gets its first mask, None without masks."""

    def hold(self, masks: Mapping[str, Tensor], shard: Shard) -> None:
        """Sets what the masks leave out to zero in a process's share, and its gradients from now on.

        Args:
            masks: bool, by parameter, of its shape or one that broadcasts to it ([out, 1] or [1, in]); True stays. A parameter keeps
                the shape of its first mask. Those that are not named keep the mask they have.
            shard: weights and moments that the process trains with.
        """
        self._set(masks)
        with torch.no_grad():
            for piece in shard.pieces:
                if piece.name in masks:
                    # Whole on the CPU, and only for as long as this takes.
                    whole = masks[piece.name].cpu().expand(self._shape(piece.name)).reshape(-1)
                    run = whole[piece.first : piece.first + piece.count]
                    for part in PARTS:
                        held = shard.flats[piece.flat][part].detach()[piece.offset : piece.offset + piece.count]
                        held.masked_fill_(~run.to(held.device), 0.0)

    def write(self, folder: Path) -> None:
        """Adds the masks to a saved state."""
        if self._masks:
            packed = {name: (list(mask.shape), _packed(mask)) for name, mask in self._masks.items()}
            torch.save(packed, folder / _FILE)

    def read(self, folder: Path) -> None:
        """Takes up the masks of a saved state, whose weights and moments hold them already."""
        path = folder / _FILE
        if path.is_file():
            packed = torch.load(path, map_location="cpu", weights_only=True)
            self._set({name: _unpacked(bits, shape) for name, (shape, bits) in packed.items()})

    def release(self) -> None:
        """Leaves the parameters alone from now on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._masks, self.holding = [], {}, None

    def _set(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            assert mask.dtype == torch.bool, (name, mask.dtype)
            if name in self._masks:
                # In place: a recorded backward pass reads it from where it lies.
                self._masks[name].copy_(mask)
            else:
                self._masks[name] = mask.to(self._device, copy=True)
                hook = self._trained[name].register_hook(_masked_by(self._masks[name]))  # type: ignore[no-untyped-call]
                self._hooks.append(hook)
                self.holding = object()

    def _shape(self, name: str) -> torch.Size:
        parameter = self._trained[name]
        shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 keeps the parameter itself elsewhere
        return shape


def _masked_by(mask: Tensor) -> Callable[[Tensor], Tensor]:
    # A gradient that is not finite stays so, and stops the update.
    return lambda gradient: gradient * mask


def _packed(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().flatten().numpy()))


def _unpacked(bits: Tensor, shape: list[int]) -> Tensor:
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(np.bool_)).view(shape)
