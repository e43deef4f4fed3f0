"""What pruning left of a model: zeros by kind of matrix, bytes of its files, and what these compress to."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

_CHUNK = 2**24


@dataclass(frozen=True, slots=True)
class Sparsity:
    """Weights of one kind of matrix, or of one layer, and how many of them are 0."""

    kind: str
    """The last part of the module's name: q_proj, down_proj, wi_0...; of a layer its number, behind its stack's name if there are two."""
    weights: int
    zeros: int

    @property
    def share(self) -> float:
        """Of zeros."""
        return self.zeros / self.weights


def sparsities(folder: Path) -> list[Sparsity]:
    """Of every kind of matrix in a folder's safetensors files, tied ones once: counted there, not what was asked for."""
    return _added_up(folder, lambda name: name.rpartition(".")[2])


def layer_sparsities(folder: Path) -> list[Sparsity]:
    """The same of every layer, in their order; what lies in none is left out."""
    return [found for found in _added_up(folder, _layer) if found.kind]


def _added_up(folder: Path, kind_of: Callable[[str], str]) -> list[Sparsity]:
    weights: dict[str, int] = defaultdict(int)
    zeros: dict[str, int] = defaultdict(int)
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_tensor(name)
                if tensor.dim() > 1:
                    kind = kind_of(name.removesuffix(".weight"))
                    weights[kind] += tensor.numel()
                    zeros[kind] += tensor.numel() - int(tensor.count_nonzero())
    return [Sparsity(kind, weights[kind], zeros[kind]) for kind in sorted(weights, key=_in_order)]


def _layer(name: str) -> str:
    """`encoder 3` of `encoder.block.3.layer.0...`, `3` of `model.layers.3...`; nothing of what lies in no layer."""
    found = re.match(r"(?:.*?\b(encoder|decoder)\.)?[a-z_.]*?\.?(\d+)\.", name)
    return " ".join(part for part in found.groups() if part) if found else ""


def _in_order(kind: str) -> tuple[bool, str, int]:
    """Layers by number, an encoder's before its decoder's."""
    stack, _, number = kind.rpartition(" ")
    return (stack == "decoder", stack, int(number)) if number.isdigit() else (False, kind, 0)


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
