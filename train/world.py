"""The processes that work together. Imports no deepspeed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True, slots=True)
class World:
    """The processes that work together, and this one's place among them."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 writes the files that all share."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` added up over all processes, as a new tensor on the same device as given."""
        total = values.to(self.device).clone()
        if self.size > 1:
            distributed.all_reduce(total)
        return total.to(values.device)

    def sees(self, what: bool) -> bool:
        """What the main process sees, on every process: the nodes' views of a shared folder may be seconds apart."""
        return bool(self.sum(torch.tensor(int(what and self.is_main))))

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            distributed.barrier()

    def counter(self) -> Callable[[int], int]:
        """A number that all processes share, 0 at first: adds what it is given and returns the sum, without waiting for anybody.

        Every process must open its counters in the same order.
        """
        if self.size == 1:
            return _Sum()
        # The store through which torchrun's processes found one another.
        shared, key = distributed.distributed_c10d._get_default_store(), f"stepdown-counter-{next(_COUNTERS)}"
        return lambda amount: int(shared.add(key, amount))

    def agree(self, error: Exception | None) -> None:
        """Raises on every process if any has an error, so that none is left waiting.

        Raises:
            ValueError, RuntimeError: the error itself where it happened, a RuntimeError elsewhere.
        """
        failed = int(self.sum(torch.tensor(int(error is not None))))
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(f"stopped because {failed} other process(es) failed; their message stands above")


class _Sum:
    """A counter of one process."""

    def __init__(self) -> None:
        self.total = 0

    def __call__(self, amount: int) -> int:
        self.total += amount
        return self.total


_COUNTERS = itertools.count()
"""Numbers the counters of this process: the same order of opening gives the same names everywhere."""
