"""What pruning left of a model: zeros by kind of matrix, bytes of its files, and what these compress to."""

from __future__ import annotations

import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

_CHUNK = 2**24


@dataclass(frozen=True, slots=True)
class Sparsity:
    """Weights of one kind of matrix, and how many of them are 0."""

    kind: str
    """The last part of the module's name: q_proj, down_proj, wi_0..."""
    weights: int
    zeros: int

    @property
    def share(self) -> float:
        """Of zeros."""
        return self.zeros / self.weights


def sparsities(model: PreTrainedModel) -> list[Sparsity]:
    """Of every kind of matrix, tied ones once, in the model's order; counted, not what was asked for."""
    weights: dict[str, int] = defaultdict(int)
    zeros: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            kind = name.removesuffix(".weight").rpartition(".")[2]
            weights[kind] += parameter.numel()
            zeros[kind] += parameter.numel() - int(parameter.detach().count_nonzero())
    return [Sparsity(kind, weights[kind], zeros[kind]) for kind in weights]


@dataclass(frozen=True, slots=True)
class FileSizes:
    """Of a model's weights on the disk."""

    file_bytes: int
    compressed_bytes: int
    """By zlib at level 6, as a download or an archive would be."""


def file_sizes(folder: Path) -> FileSizes:
    """Of the safetensors files in a folder."""
    files = sorted(folder.glob("*.safetensors"))
    assert files, folder
    return FileSizes(sum(path.stat().st_size for path in files), sum(map(_compressed, files)))


def _compressed(path: Path) -> int:
    packer, total = zlib.compressobj(6), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            total += len(packer.compress(chunk))
    return total + len(packer.flush())
