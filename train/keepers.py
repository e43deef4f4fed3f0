"""What becomes of the best weights of a training: a folder that plain transformers loads, or a copy in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from train.world import World

Gather = Callable[[], dict[str, Tensor]]
"""Gives the whole weights under the model's own names, in fp32 on the CPU, on rank 0; every process must call it."""
Export = Callable[[dict[str, Tensor], Path], None]
"""Writes whole weights as a model folder."""


class Keeper(Protocol):
    """Gets the weights whenever validation finds better ones; every process calls it."""

    def keep(self, step: int, gather: Gather) -> None:
        """Takes the weights of a step."""

    def settle(self, step: int) -> None:
        """The state that says that `step` is the best has been saved: those before it will not be asked for again."""


class ModelFolders:
    """Keeps them as `model-STEP` in a folder, and the last as `model` in the end."""

    def __init__(self, folder: Path, world: World, export: Export) -> None:
        """Writes by `export`, on rank 0."""
        self.folder, self.world, self._export = folder, world, export

    def keep(self, step: int, gather: Gather) -> None:
        """Writes the weights of a step.

        Raises:
            RuntimeError: on every process, if they could not be written.
        """
        weights, folder = gather(), self.folder / f"model-{step}"
        error: Exception | None = None
        if self.world.is_main:
            try:
                shutil.rmtree(folder, ignore_errors=True)
                self._export(weights, folder)
            except (OSError, RuntimeError) as caught:
                error = caught
        self.world.agree(error)

    def settle(self, step: int) -> None:
        """Removes all but the best."""
        if self.world.is_main:
            for old in self.folder.glob("model-*"):
                if old.name != f"model-{step}":
                    shutil.rmtree(old)

    def finish(self, step: int) -> None:
        """Makes the best one `model`, and removes the state to resume from."""
        if self.world.is_main:
            best = self.folder / f"model-{step}"
            if best.is_dir():
                # A process killed while it removed the state trains again from the start, and finds its earlier result here.
                shutil.rmtree(self.folder / "model", ignore_errors=True)
                best.replace(self.folder / "model")
            shutil.rmtree(self.folder / "state", ignore_errors=True)
        self.world.barrier()


class InMemory:
    """Keeps a copy, for who uses the model at once and writes nothing."""

    def __init__(self) -> None:
        """Holds nothing yet."""
        self.best: dict[str, Tensor] = {}
        """The best weights, on rank 0."""

    def keep(self, step: int, gather: Gather) -> None:
        """Takes the weights of a step."""
        self.best = gather()

    def settle(self, step: int) -> None:
        """There is only one copy."""
