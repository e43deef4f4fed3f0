"""The only module that imports deepspeed: start-up, wrapping, stepping, gathering, saving and loading.

Every worker is started with torchrun, one process too (DeepSpeed looks for MPI otherwise).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from train.artifacts import write_json

_RESUME = "resume.json"


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

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            distributed.barrier()

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


def start(device: Literal["auto", "cpu", "cuda"] = "auto") -> World:
    """Joins the processes that torchrun started: NCCL on GPUs, gloo on a CPU.

    Raises:
        RuntimeError: where torchrun did not start this process, or a GPU is asked for and there is none.
    """
    if "LOCAL_RANK" not in os.environ:
        raise RuntimeError("this process was not started by torchrun: use `stepdown run`, or `torchrun -m launch.worker ...`")
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise RuntimeError("device is cuda, but torch sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES, or use cpu")
    target = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(target)
    deepspeed = _deepspeed()
    deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False)
    return World(distributed.get_rank(), distributed.get_world_size(), target)


def stop() -> None:
    """Leaves the processes that `start` joined."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _deepspeed() -> Any:
    # Without a GPU DeepSpeed prints the accelerator it fell back to on standard output, unless it is named.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # init_distributed compiles this op for two minutes on a CPU, and gloo does not need it.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """What a resumed training starts from."""

    step: int
    state: dict[str, Any]


class TrainEngine:
    """A model under DeepSpeed's ZeRO, with AdamW. Losses passed in are already divided by GLOBAL token counts."""

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        zero_stage: int,
        bf16: bool,
        num_micro_batches: int,
        weight_decay: float,
        clip_norm: float,
    ) -> None:
        """Wraps `model`; its parameters move to the world's device and, by stage, are sharded over the processes.

        Args:
            model: parameters in fp32.
            world: the processes.
            zero_stage: 0 to 3.
            bf16: forward and backward in bf16, master weights in fp32.
            num_micro_batches: forwards and backwards of each optimizer step.
            weight_decay: decoupled weight decay, of matrices only.
            clip_norm: largest norm of the whole gradient.
        """
        self.world = world
        self.zero_stage = zero_stage
        self._unsharded_norm = 0.0
        deepspeed = _deepspeed()
        model.to(world.device)
        matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
        vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, fused=world.device.type == "cuda" or None)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only multiplies it; batches here are counted in tokens
                "gradient_accumulation_steps": num_micro_batches,
                "gradient_clipping": clip_norm,
                "bf16": {"enabled": bf16},
                "zero_optimization": {"stage": zero_stage},
                "steps_per_print": 2**31,
            },
        )

    @property
    def module(self) -> nn.Module:
        """The wrapped model; call it through `forward` only."""
        module: nn.Module = self.engine.module
        return module

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits [N, L, V]."""
        logits: Tensor = self.engine(**inputs, use_cache=False).logits
        return logits

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this process's share of the global loss.

        DeepSpeed averages gradients over the processes and would divide by the micro-batches as well; the loss is already a share
        of a global mean, so the first is undone and the second switched off.
        """
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def micro_step(self, learning_rate: float) -> None:
        """Closes a micro-batch; the last of a step clips and updates."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.zero_stage == 0 and self.engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._unsharded_norm = float(torch.nn.utils.get_total_norm(gradients))
        self.engine.step()

    def gradient_norm(self) -> float:
        """Norm of the whole gradient of the last step, before clipping."""
        norm = self.engine.get_global_grad_norm()
        # In fp32 without ZeRO DeepSpeed clips and forgets the norm.
        return self._unsharded_norm if norm is None else float(norm)

    def gather_weights(self) -> dict[str, Tensor]:
        """All parameters and buffers whole, on the CPU, on rank 0; an empty mapping elsewhere. Every process must call it."""
        weights: dict[str, Tensor] = {}
        deepspeed = _deepspeed()
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]) if self.zero_stage == 3 else contextlib.nullcontext():
                if self.world.is_main:
                    weights[name] = parameter.detach().to("cpu", copy=True)
        if self.world.is_main:
            weights |= {name: buffer.detach().to("cpu", copy=True) for name, buffer in self.module.named_buffers()}
        return weights

    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """Writes a resumable checkpoint; the one before it is removed once the new one is whole. Every process must call it."""
        tag = f"step-{step}"
        self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        self.world.barrier()
        if self.world.is_main:
            write_json(
                folder / _RESUME, {"tag": tag, "step": step, "processes": self.world.size, "zero_stage": self.zero_stage, "state": state}
            )
            for old in folder.glob("step-*"):
                if old.name != tag:
                    shutil.rmtree(old)
        self.world.barrier()

    def resume(self, folder: Path) -> ResumePoint | None:
        """Loads the last checkpoint of `save`, or gives None where there is none.

        Raises:
            RuntimeError: if it was saved by another number of processes or under another ZeRO stage.
        """
        found = read_resume(folder)
        if found is None:
            return None
        for key, now in (("processes", self.world.size), ("zero_stage", self.zero_stage)):
            if found[key] != now:
                raise RuntimeError(
                    f"{folder} was saved with {key} = {found[key]}, and this run has {now}: run with {found[key]} again, "
                    f"or delete that folder to train this model from its start"
                )
        path, _ = self.engine.load_checkpoint(str(folder), tag=found["tag"])
        if path is None:
            raise RuntimeError(f"{folder / found['tag']} cannot be loaded: delete {folder} to train this model from its start")
        return ResumePoint(found["step"], found["state"])


def read_resume(folder: Path) -> dict[str, Any] | None:
    """What `TrainEngine.save` noted last, or None."""
    import json

    path = folder / _RESUME
    return json.loads(path.read_text()) if path.is_file() else None


@dataclass(frozen=True, slots=True)
class InferenceModel:
    """A model placed on the devices for forwards without gradients."""

    model: Any
    """Has `generate` and a forward, as a transformers model has."""
    sharding: Literal["replica", "tensor", "zero3"]
    group_rank: int
    """Which share of the work this process takes: processes of one tensor group share one number."""
    num_groups: int
    is_writer: bool
    """One process of each group writes its results."""

    @property
    def in_step(self) -> bool:
        """All processes must make the same number of forwards."""
        return self.sharding == "zero3"


def place_for_inference(model: nn.Module, world: World, sharding: Literal["replica", "tensor", "zero3"]) -> InferenceModel:
    """Lays a model out for inference: in eval mode, without gradients or optimizer states.

    replica: a copy on each device, no communication. tensor: DeepSpeed AutoTP splits every matrix over all processes. zero3: each
    process keeps a share of every parameter, gathered layer by layer.
    """
    model.eval().requires_grad_(False)
    if sharding == "replica" or world.size == 1:
        return InferenceModel(model.to(world.device), "replica", world.rank, world.size, True)
    deepspeed = _deepspeed()
    dtype = next(model.parameters()).dtype
    if sharding == "tensor":
        with contextlib.redirect_stdout(None):  # AutoTP prints the layers it found
            engine = deepspeed.init_inference(model, dtype=dtype, tensor_parallel={"tp_size": world.size}, replace_with_kernel_inject=False)
        # AutoTP leaves embeddings in fp32, T5's relative position bias among them, and attention refuses a bias of another type.
        return InferenceModel(engine.module.to(dtype), "tensor", 0, 1, world.is_main)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine = deepspeed.initialize(model=model, config=config)[0]
    return InferenceModel(engine.module, "zero3", world.rank, world.size, True)
