"""The engine of ZeRO stage 0: every process holds the whole model, and its numbers lie in flat buffers.

All trainable weights are views of one tensor, and so are their gradients: a step is a handful of kernels whatever the number of layers,
one all-reduce where there are several processes, and it asks nothing of the device that the host would have to wait for.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.weak import WeakTensorKeyDictionary

from train.checkpoints import ResumePoint, read_resume, replace_state
from train.pruning.holding import HeldMasks
from train.shards import Piece, Shard, moments, read_shards, set_updates, updates_of, write_shard

if TYPE_CHECKING:
    from train.world import World

_ALIGNMENT = 64
"""Elements: every weight begins where kernels can load 16 bytes at a time, in bf16 too."""


@dataclass(frozen=True, slots=True)
class Buffers:
    """A model's numbers, each kind in one tensor."""

    masters: Tensor
    """fp32."""
    weights: Tensor
    """In the precision of the forward pass; in fp32 the masters themselves."""
    gradients: Tensor
    """In that precision."""

    @classmethod
    def of(cls, size: int, device: torch.device, bf16: bool) -> Buffers:
        """Zeros."""
        masters = torch.zeros(size, device=device)
        weights = torch.zeros(size, device=device, dtype=torch.bfloat16) if bf16 else masters
        return cls(masters, weights, torch.zeros_like(weights))

    def fit(self, size: int, device: torch.device, bf16: bool) -> bool:
        """Whether they are what `of` would make."""
        return len(self.masters) == size and self.masters.device == device and (self.weights is not self.masters) == bf16


_BUFFERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Buffers of models that were trained before, by their first parameter."""


class FlatEngine:
    """A model trained with AdamW, whole in every process; in bf16 with fp32 masters, or in fp32."""

    zero_stage = 0

    def __init__(self, module: nn.Module, world: World, *, bf16: bool, weight_decay: float, clip_norm: float) -> None:
        """Moves `module` to the world's device and its trainable weights into flat buffers.

        Args:
            module: parameters in fp32; frozen ones are kept in bf16 where `bf16`.
            world: the processes; their weights must be the same.
            bf16: forward and backward in bf16, master weights and moments in fp32.
            weight_decay: decoupled weight decay, of matrices only.
            clip_norm: largest norm of the whole gradient.
        """
        self.module, self.world, self.bf16, self._clip_norm = module.to(world.device), world, bf16, clip_norm
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        # Matrices first: they are one slice of the buffer, which decays, and vectors the other.
        self._trained = sorted(trained, key=lambda pair: pair[1].dim() <= 1)
        offsets, matrices, end = [], 0, 0
        for _, parameter in self._trained:
            offsets.append(end)
            end += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
            matrices = end if parameter.dim() > 1 else matrices
        self._offsets = offsets
        buffers = _BUFFERS.get(self._trained[0][1])  # type: ignore[no-untyped-call]
        self.reused = buffers is not None and buffers.fit(end, world.device, bf16)
        """The weights lie where they lay in the model's last training: what was recorded on these addresses holds."""
        self._buffers = buffers if buffers is not None and self.reused else Buffers.of(end, world.device, bf16)
        _BUFFERS[self._trained[0][1]] = self._buffers
        self._masters, self._weights, self._gradients = (getattr(self._buffers, f) for f in Buffers.__slots__)
        self._sum: Tensor | None = None
        """fp32, of the gradients of several micro-batches or processes; made when there are such."""
        self._lay_out()
        self.is_first = True
        """The next backward pass is the first of its step."""
        self._alone = False
        groups = []
        for where, decay in ((slice(0, matrices), weight_decay), (slice(matrices, end), 0.0)):
            if self._masters[where].numel():
                groups.append({"params": [nn.Parameter(self._masters[where])], "weight_decay": decay})
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
        self._halted = torch.zeros((), device=world.device)
        self._masks = HeldMasks(dict(self._trained), world.device)

    def _lay_out(self) -> None:
        for (_, parameter), offset in zip(self._trained, self._offsets, strict=True):
            where = slice(offset, offset + parameter.numel())
            self._masters[where].copy_(parameter.detach().flatten())
            parameter.data = self._weights[where].view_as(parameter)
            parameter.grad = self._gradients[where].view_as(parameter)
        if self.world.size > 1:
            distributed.broadcast(self._masters, 0)
        self._gradients.zero_()
        if self.bf16:
            self._weights.copy_(self._masters)
            for parameter in self.module.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of this process's share of the global loss; in fp32 over the micro-batches of a step."""
        loss.backward()  # type: ignore[no-untyped-call]
        if self.bf16 and not self._is_alone(last):
            if self._sum is None:
                self._sum = torch.zeros_like(self._masters)
            if self.is_first:
                self._sum.copy_(self._gradients)
            else:
                self._sum.add_(self._gradients)
            self._gradients.zero_()
        self.replayed(last=last)

    def replayed(self, *, last: bool) -> None:
        """A backward pass has run: also one that was recorded, and ran again without this object."""
        self._alone, self.is_first = self._is_alone(last), last

    def _is_alone(self, last: bool) -> bool:
        return self.is_first and last and self.world.size == 1

    @torch.no_grad()
    def step(self, learning_rate: float) -> Tensor:
        """Clips and updates; gives the norm of the whole gradient before clipping, a scalar on the device.

        Where the norm is not finite nothing is updated, then and ever after: the host learns of it when it next looks.
        """
        gradient = self._gradients if self._sum is None or self._alone else self._sum
        if self.world.size > 1:
            distributed.all_reduce(gradient)
        norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self._halted = torch.maximum(self._halted, (~norm.isfinite()).float())
        factor = (self._clip_norm / norm).clamp(max=1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if self._masters.is_cuda:
            self._update(gradient, factor)
        else:
            self._update_by_torch(gradient, factor)
        if gradient is self._gradients:
            self._gradients.zero_()
        return norm

    def _update(self, gradient: Tensor, factor: Tensor) -> None:
        """One pass over everything, in a kernel of our own."""
        from train.adamw_kernel import update  # Triton is there where CUDA is

        for group in self._optimizer.param_groups:
            (leaf,) = group["params"]
            state, where = self._optimizer.state[leaf], slice(leaf.storage_offset(), leaf.storage_offset() + leaf.numel())
            if not state:
                state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(leaf), exp_avg_sq=torch.zeros_like(leaf))
            # Counted on the host: once a step has been left out, all later ones are.
            state["step"] += 1
            update(
                leaf.data,
                state["exp_avg"],
                state["exp_avg_sq"],
                gradient[where],
                self._weights[where] if self.bf16 else None,
                factor=factor,
                halted=self._halted,
                step=int(state["step"]),
                rate=group["lr"],
                decay=group["weight_decay"],
                betas=group["betas"],
                epsilon=group["eps"],
            )

    def _update_by_torch(self, gradient: Tensor, factor: Tensor) -> None:
        optimizer: Any = self._optimizer
        # torch's fused kernel divides gradients by the first, and does nothing where the second is 1.
        optimizer.grad_scale, optimizer.found_inf = 1.0 / factor, self._halted
        for group in optimizer.param_groups:
            (leaf,) = group["params"]
            leaf.grad = gradient[leaf.storage_offset() : leaf.storage_offset() + leaf.numel()].float()
        optimizer.step()
        if self.bf16:
            self._weights.copy_(self._masters)

    def hold(self, masks: Mapping[str, Tensor]) -> None:
        """Prunes: what the masks leave out becomes zero, weights and moments, and stays so (`HeldMasks.hold`)."""
        self._masks.hold(masks, self._shard())
        if self.bf16:
            self._weights.copy_(self._masters)

    @property
    def holding(self) -> object | None:
        """Tells backward passes under other masks apart (`HeldMasks.holding`): a recorded one masks as it did then."""
        return self._masks.holding

    def gather_weights(self) -> dict[str, Tensor]:
        """All parameters (the masters of those trained) and buffers in fp32 on the CPU, on rank 0; an empty mapping elsewhere."""
        if not self.world.is_main:
            return {}
        masters = self._masters.to("cpu", copy=True)
        weights = {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in self._frozen()}
        for (name, parameter), offset in zip(self._trained, self._offsets, strict=True):
            weights[name] = masters[offset : offset + parameter.numel()].view(parameter.shape)
        return weights | {name: buffer.detach().to("cpu", copy=True) for name, buffer in self.module.named_buffers()}

    def _frozen(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p) for name, p in self.module.named_parameters() if not p.requires_grad)

    def release(self) -> None:
        """Gives the module its fp32 weights back, so that it can be used, or wrapped again, without this engine."""
        self._masks.release()
        for (_, parameter), offset in zip(self._trained, self._offsets, strict=True):
            parameter.data = self._masters[offset : offset + parameter.numel()].view_as(parameter)
            parameter.grad = None

    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """Writes a resumable checkpoint; the one before it is removed once the new one is whole. Every process must call it."""
        replace_state(folder, step, state, self.world, self.zero_stage, lambda tag: self._write(folder / tag))

    def resume(self, folder: Path) -> ResumePoint | None:
        """Loads the last checkpoint of `save`, of any number of processes and any ZeRO stage, or gives None where there is none.

        Raises:
            RuntimeError: if it is damaged, or of another model.
        """
        found = read_resume(folder)
        if found is not None:
            set_updates(self._optimizer, read_shards(folder / found.tag, self._shard()))
            self._masks.read(folder / found.tag)
            if self.bf16:
                self._weights.copy_(self._masters)
        return found

    def _write(self, folder: Path) -> None:
        # Masters and moments are whole on every process.
        if self.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            write_shard(folder, self._shard(), updates_of(self._optimizer), number=0, of=1)
            self._masks.write(folder)

    def _shard(self) -> Shard:
        leaves = [group["params"][0] for group in self._optimizer.param_groups]
        flats = [{"weight": leaf, **moments(self._optimizer, leaf)} for leaf in leaves]
        starts = [leaf.storage_offset() for leaf in leaves]
        pieces = []
        for (name, parameter), offset in zip(self._trained, self._offsets, strict=True):
            number = max(n for n, start in enumerate(starts) if start <= offset)
            pieces.append(Piece(name, 0, parameter.numel(), number, offset - starts[number]))
        return Shard(flats, pieces, {name: parameter.numel() for name, parameter in self._trained})
