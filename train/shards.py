"""What each process keeps of the trained weights and of AdamW's moments, in files that any number of processes can read.

Every process writes the flat tensors it has, and says which run of which parameter lies where; one that reads takes from every file what
overlaps with its own. So a training goes on bit for bit where the processes are the same, and from the same numbers where they are not.
"""

from __future__ import annotations

import os
import pickle
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PARTS = ("weight", "exp_avg", "exp_avg_sq")
Flat = Mapping[str, Tensor]
"""Of each of `PARTS` a tensor of one dimension and one length, fp32."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a run of a parameter's elements lies."""

    name: str
    """Of the parameter."""
    first: int
    """Of its elements, in the order of its flattened tensor."""
    count: int
    flat: int
    """Number of the flat tensors that hold them."""
    offset: int
    """Of the first of them there."""


@dataclass(frozen=True, slots=True)
class Shard:
    """What one process keeps; the tensors are those it trains with."""

    flats: Sequence[Flat]
    pieces: Sequence[Piece]
    sizes: Mapping[str, int]
    """Elements of every trained parameter, those of other processes too."""


@dataclass(frozen=True, slots=True)
class _Overlap:
    """A run of elements that two pieces share."""

    count: int
    in_mine: int
    in_theirs: int


def write_shard(folder: Path, shard: Shard, updates: int, *, number: int, of: int) -> None:
    """Writes one process's share, and has it on the disk when it returns.

    Args:
        folder: made where it is missing.
        shard: what the process keeps.
        updates: that AdamW has made.
        number: of this share, from 0.
        of: how many shares there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = {
        "flats": [{part: flat[part].detach() for part in PARTS} for flat in shard.flats],
        "pieces": [astuple(piece) for piece in shard.pieces],
        "sizes": dict(shard.sizes),
        "updates": updates,
        "shares": of,
    }
    with _path(folder, number).open("wb") as file:
        torch.save(saved, file)
        file.flush()
        os.fsync(file.fileno())


def read_shards(folder: Path, shard: Shard) -> int:
    """Fills a process's tensors from all shares there are, and gives the number of AdamW's updates.

    Raises:
        RuntimeError: if the files are of another model, damaged or missing.
    """
    mine = defaultdict(list)
    for piece in shard.pieces:
        mine[piece.name].append(piece)
    filled, updates, number, shares = 0, 0, 0, 1
    while number < shares:
        saved = _load(_path(folder, number))
        if saved["sizes"] != dict(shard.sizes):
            raise RuntimeError(f"{folder} holds the weights of another model: delete {folder.parent} to train this model from its start")
        updates, shares, number = saved["updates"], saved["shares"], number + 1
        for theirs in (Piece(*fields) for fields in saved["pieces"]):
            for piece in mine[theirs.name]:
                if overlap := _overlap(piece, theirs):
                    _copy(overlap, shard.flats[piece.flat], saved["flats"][theirs.flat])
                    filled += overlap.count
    if filled != sum(piece.count for piece in shard.pieces):
        raise RuntimeError(f"{folder} lacks some of the weights: delete {folder.parent} to train this model from its start")
    return updates


def fill(shard: Shard, weights: Mapping[str, Tensor]) -> None:
    """Sets a process's share of the weights from whole tensors, by name."""
    for piece in shard.pieces:
        run = weights[piece.name].flatten()[piece.first : piece.first + piece.count]
        shard.flats[piece.flat]["weight"].detach()[piece.offset : piece.offset + piece.count].copy_(run)


def moments(adam: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """AdamW's moments of one of its tensors; zeros, and its count of updates with them, where it has made none yet."""
    state = adam.state[flat]
    if not state:
        # DeepSpeed's own AdamW counts in integers.
        step = torch.zeros((), device=flat.device) if isinstance(adam, torch.optim.AdamW) else 0
        state.update(step=step, exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat))
    return {part: state[part] for part in ("exp_avg", "exp_avg_sq")}


def updates_of(adam: torch.optim.Optimizer) -> int:
    """Updates that AdamW has made."""
    return max((int(state["step"]) for state in adam.state.values()), default=0)


def set_updates(adam: torch.optim.Optimizer, updates: int) -> None:
    """Has AdamW count on from `updates`."""
    for state in adam.state.values():
        state["step"] = torch.full_like(state["step"], updates) if isinstance(state["step"], Tensor) else updates


def _path(folder: Path, number: int) -> Path:
    return folder / f"share-{number}.pt"


def _load(path: Path) -> dict[str, Any]:
    try:
        # Mapped, so that only what overlaps is read.
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        why = str(error).splitlines()[0].split(". ")[0]
        raise RuntimeError(f"{path} cannot be read ({why}): delete {path.parents[1]} to train this model from its start") from error
    return saved


def _overlap(mine: Piece, theirs: Piece) -> _Overlap | None:
    first, last = max(mine.first, theirs.first), min(mine.first + mine.count, theirs.first + theirs.count)
    if first >= last:
        return None
    return _Overlap(last - first, mine.offset + first - mine.first, theirs.offset + first - theirs.first)


def _copy(overlap: _Overlap, mine: Flat, theirs: Flat) -> None:
    for part in PARTS:
        run = theirs[part][overlap.in_theirs : overlap.in_theirs + overlap.count]
        mine[part].detach()[overlap.in_mine : overlap.in_mine + overlap.count].copy_(run)
