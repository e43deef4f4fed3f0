"""Where DeepSpeed's ZeRO optimizers keep a process's share of the masters and moments. Imports no deepspeed.

What is read here of their insides is what their own universal checkpoints are written from (0.19.8): each parameter's fragment mapping
under ZeRO 1 and 2, and under ZeRO 3 the place of its partition in the flat tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from train.shards import Piece, Shard, moments


def shard_of(optimizer: Any, adam: torch.optim.Optimizer, trained: Mapping[str, Any], stage: int, rank: int) -> Shard:
    """What this process keeps, in the tensors that it trains with.

    Args:
        optimizer: DeepSpeed's, around `adam`.
        adam: with or without moments; they become zeros where it has made no update yet.
        trained: the parameters of the optimizer, by name.
        stage: 1 to 3.
        rank: of this process.
    """
    if stage == 3:
        pieces, sizes = list(_partitions(optimizer, trained, rank)), {name: p.ds_numel for name, p in trained.items()}
    else:
        pieces, sizes = list(_fragments(trained)), {name: p.numel() for name, p in trained.items()}
    flats = [{"weight": flat, **moments(adam, flat)} for flat in flat_weights(optimizer, adam, stage)]
    return Shard(flats, pieces, sizes)


def flat_weights(optimizer: Any, adam: torch.optim.Optimizer, stage: int) -> list[Tensor]:
    """The fp32 masters of this process, as AdamW knows them."""
    return list(optimizer.fp32_partitioned_groups_flat) if stage == 3 else [group["params"][0] for group in adam.param_groups]


def refresh(optimizer: Any, stage: int) -> None:
    """Makes the parameters of the model from the masters; every process must call it."""
    if stage != 3:
        optimizer.update_lp_params()
        return
    # What its step does after the update.
    optimizer._partition_all_parameters()
    for number in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _fragments(trained: Mapping[str, Any]) -> Iterator[Piece]:
    for name, parameter in trained.items():
        if (mapping := parameter._hp_mapping) is not None:
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Piece(name, here.start, here.numel, mapping.param_group_index, there.start)


def _partitions(optimizer: Any, trained: Mapping[str, Any], rank: int) -> Iterator[Piece]:
    for name, parameter in trained.items():
        flat, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        # The last partitions are filled up.
        count = min(length, parameter.ds_numel - rank * length)
        if count > 0:
            yield Piece(name, rank * length, count, flat, offset)
