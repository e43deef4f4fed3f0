"""The only module that imports deepspeed: start-up, wrapping, stepping, gathering, saving and loading.

Every worker is started with torchrun, one process too (DeepSpeed looks for MPI otherwise).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
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
    # Processes wait for one that asks a server, or converts a model, for as long as that takes; torchrun sees to those that die.
    deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False, timeout=timedelta(days=7))
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
    # torch 2.13 has another name for what DeepSpeed 0.19.8 gathers with; delete when DeepSpeed uses it.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*all_gather_into_tensor.*")
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
    world: World
    degree: int = 1
    """Processes that hold one copy between them, each a slice of every matrix."""
    group: distributed.ProcessGroup | None = None
    """Those processes; None where `degree` is 1."""

    @property
    def in_step(self) -> bool:
        """All processes must make the same number of forwards."""
        return self.sharding == "zero3"

    def most(self, forwards: int) -> int:
        """`forwards`, or where all must step together the most that any process has to make."""
        if not self.in_step:
            return forwards
        counts = torch.zeros(self.world.size, dtype=torch.int64)
        counts[self.world.rank] = forwards
        return int(self.world.sum(counts).max())


def place_for_inference(
    model: nn.Module,
    world: World,
    sharding: Literal["replica", "tensor", "zero3"],
    *,
    degree: int | None = None,
    offload: bool = False,
) -> InferenceModel:
    """Lays a model out for inference: in eval mode, without gradients or optimizer states. Every process must call it.

    replica: a copy on each device, no communication. tensor: DeepSpeed AutoTP splits every matrix over the processes of a node, and each
    such group is a copy. zero3: each process keeps a share of every parameter, gathered layer by layer.

    Args:
        model: on the CPU.
        world: the processes.
        sharding: how.
        degree: tensor only: processes that hold one copy between them; all those of a node where None.
        offload: zero3 only: the shares stay in the host's memory.

    Raises:
        ValueError: if the model's attention heads, or the processes, cannot be shared out evenly.
    """
    assert degree in (None, 1) or sharding == "tensor", "a degree belongs to tensor"
    assert not offload or sharding == "zero3", "offloading belongs to zero3"
    model.eval().requires_grad_(False)
    if sharding == "tensor":
        degree = degree or int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        if degree > 1:
            return _tensor_parallel(model, world, degree)
    # ZeRO-3 over one process shards nothing, but it offloads.
    if sharding != "zero3" or (world.size == 1 and not offload):
        return InferenceModel(model.to(world.device), "replica", world.rank, world.size, True, world)
    return InferenceModel(_zero3(model, world, offload), "zero3", world.rank, world.size, True, world)


def _tensor_parallel(model: nn.Module, world: World, degree: int) -> InferenceModel:
    _check_degree(model, world, degree)
    # Every process must make every group, in the same order.
    groups = [distributed.new_group(list(range(first, first + degree))) for first in range(0, world.size, degree)]
    number = world.rank // degree
    deepspeed = _deepspeed()
    dtype = next(model.parameters()).dtype
    with contextlib.redirect_stdout(None):  # AutoTP prints the layers it found
        # `tp_group` alone would be replaced by a group of the first processes (0.19.8): an `mpu` is asked for its group.
        parallel = {"tp_size": degree, "tp_group": groups[number], "mpu": _Unit(groups[number])}
        engine = deepspeed.init_inference(model, dtype=dtype, tensor_parallel=parallel, replace_with_kernel_inject=False)
    # AutoTP leaves embeddings in fp32, T5's relative position bias among them, and attention refuses a bias of another type.
    placed = engine.module.to(dtype)
    return InferenceModel(placed, "tensor", number, len(groups), world.rank % degree == 0, world, degree=degree, group=groups[number])


@dataclass(frozen=True, slots=True)
class _Unit:
    """What DeepSpeed calls a model parallel unit: it tells the group of this process."""

    group: Any

    def get_model_parallel_group(self) -> Any:
        return self.group


def _check_degree(model: nn.Module, world: World, degree: int) -> None:
    way_out = "choose replica or zero3, or a number of processes a node that divides it"
    if world.size % degree:
        raise ValueError(f"teacher.sharding is tensor over {degree} processes, which do not divide the {world.size} there are: {way_out}")
    for name in ("num_attention_heads", "num_key_value_heads", "num_heads"):
        heads = getattr(model.config, name, None)
        if isinstance(heads, int) and heads % degree:
            raise ValueError(
                f"teacher.sharding is tensor over {degree} processes, but the teacher's {name} is {heads}, which {degree} does not divide: "
                f"{way_out}"
            )


def _zero3(model: nn.Module, world: World, offload: bool) -> Any:
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": next(model.parameters()).dtype == torch.bfloat16},
        "zero_optimization": zero,
    }
    deepspeed = _deepspeed()
    _gather_by_layer(deepspeed, model)
    return deepspeed.initialize(model=model, config=config)[0].module


def _gather_by_layer(deepspeed: Any, model: nn.Module) -> None:
    """Makes each layer of a stack one unit of gathering: a decoding step waits for every gather, and a layer has nine matrices or more."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    layers = {type(layer) for stack in stacks for layer in stack if sum(1 for _ in layer.parameters(recurse=True)) > 1}
    if layers:
        deepspeed.utils.set_z3_leaf_modules(model, list(layers))
