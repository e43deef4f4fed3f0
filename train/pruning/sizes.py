"""What pruning left of a model: zeros by kind of matrix, bytes of its files, and what these compress to."""

from __future__ import annotations

import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

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


def sparsities(folder: Path) -> list[Sparsity]:
    """Of every kind of matrix in a folder's safetensors files, tied ones once: counted there, not what was asked for."""
    weights: dict[str, int] = defaultdict(int)
    zeros: dict[str, int] = defaultdict(int)
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_tensor(name)
                if tensor.dim() > 1:
                    kind = name.removesuffix(".weight").rpartition(".")[2]
                    weights[kind] += tensor.numel()
                    zeros[kind] += tensor.numel() - int(tensor.count_nonzero())
    return [Sparsity(kind, weights[kind], zeros[kind]) for kind in sorted(weights)]


@dataclass(frozen=True, slots=True)
class FileSizes:
    """Of a model's weights on the disk."""

    file_bytes: int
    compressed_bytes: int
    """By zlib at level 6, as a download or an archive would be."""


def file_sizes(folder: Path) -> FileSizes:
    """Of the safetensors files in a folder."""
    files = _files(folder)
    return FileSizes(sum(path.stat().st_size for path in files), sum(map(_compressed, files)))


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    assert files, folder
    return files


def _compressed(path: Path) -> int:
    packer, total = zlib.compressobj(6), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            total += len(packer.compress(chunk))
    return total + len(packer.flush())
