"""The only module that imports deepspeed: start-up, wrapping, stepping, gathering, saving and loading.

Every worker is started with torchrun, one process too (DeepSpeed looks for MPI otherwise).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, distributed, nn

from train import zero_layout
from train.checkpoints import ResumePoint, read_resume, replace_state
from train.config import TrainingConfig
from train.flat import FlatEngine
from train.pruning.holding import HeldMasks
from train.shards import Shard, fill, read_shards, set_updates, updates_of, write_shard
from train.world import World

_LOG = logging.getLogger(__name__)


def uses_cuda(device: Literal["auto", "cpu", "cuda"], driver_gpus: int = 0) -> bool:
    """Whether work goes on GPUs.

    Args:
        device: as configured.
        driver_gpus: GPUs that the driver lists for this process. Where torch cannot use them, `auto` is no reason to leave them idle
            without a word.

    Raises:
        RuntimeError: if a GPU is asked for, or is there, and torch cannot use it.
    """
    if device == "cpu":
        return False
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if found or (device == "auto" and not driver_gpus):
        return found
    if not driver_gpus:
        raise RuntimeError("launch.device is cuda, but torch sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES, or set it to cpu")
    built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}," if torch.version.cuda else f"torch {torch.__version__}"
    why = next((_first_sentence(str(said.message)) for said in heard if "CUDA" in str(said.message)), "no CUDA device can be opened")
    why = why if torch.version.cuda else "it is built without CUDA"
    raise RuntimeError(
        f"{built} cannot use the {driver_gpus} GPU(s) that nvidia-smi lists: {why}. Update the driver, or install a torch built for it "
        "(https://pytorch.org/get-started/locally), or set launch.device to cpu"
    )


def _first_sentence(text: str) -> str:
    return " ".join(text.removeprefix("CUDA initialization:").split()).partition(". ")[0].rstrip(".")


def start(device: Literal["auto", "cpu", "cuda"] = "auto") -> World:
    """Joins the processes that torchrun started: NCCL on GPUs, gloo on a CPU.

    Raises:
        RuntimeError: where torchrun did not start this process, or a GPU is asked for and there is none.
    """
    if "LOCAL_RANK" not in os.environ:
        raise RuntimeError("this process was not started by torchrun: use `stepdown run`, or `torchrun -m launch.worker ...`")
    cuda = uses_cuda(device)
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
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(all_gather_into_tensor|reduce_scatter_tensor).*")
    # init_distributed compiles this op for two minutes on a CPU, and gloo does not need it.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class TrainEngine(Protocol):
    """A module in training with AdamW, by itself or spread over processes."""

    module: nn.Module
    """Call it through `forward` only."""
    zero_stage: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's forward gives."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of a micro-batch.

        Args:
            loss: this process's share of the global loss: the sum over processes and micro-batches is what is learnt from.
            last: of the micro-batches of this step; every process must make the same number of calls.
        """

    def step(self, learning_rate: float) -> Tensor:
        """Clips, updates and forgets the gradient, after the last backward of a step.

        Where the gradient is not finite on any process, none updates anything.

        Returns:
            Norm of the whole gradient before clipping, a scalar in fp32 on the device; not finite where nothing was updated.
        """

    def hold(self, masks: Mapping[str, Tensor]) -> None:
        """Prunes: what the masks leave out becomes zero, weights and moments, and stays so; `save` and `resume` keep the masks.

        Args:
            masks: bool, by name of a trained parameter, of its shape or one that broadcasts to it; True stays. The same on every process,
                and every process must call it.
        """

    def gather_weights(self) -> dict[str, Tensor]:
        """All parameters (the fp32 masters of those trained) and buffers, whole, on the CPU of rank 0; an empty mapping elsewhere.

        Every process must call it.
        """

    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """Writes a resumable checkpoint; the one before it is removed once the new one is whole. Every process must call it."""

    def resume(self, folder: Path) -> ResumePoint | None:
        """Loads the last checkpoint of `save`, or gives None where there is none. Every process must call it.

        Raises:
            RuntimeError: if it is damaged, or of another model.
        """

    def release(self) -> None:
        """Takes this engine's hands off the module, so that it can be wrapped again; a process may call it alone."""


def open_engine(module: nn.Module, world: World, config: TrainingConfig) -> TrainEngine:
    """The engine that the configuration asks for; `auto` is ZeRO 0 in one process and 1 in several, and bf16 on a GPU.

    Args:
        module: parameters in fp32, the same on every process; those that require no gradient stay as they are.
        world: the processes.
        config: of the training.
    """
    stage = (0 if world.size == 1 else 1) if config.zero_stage == "auto" else config.zero_stage
    bf16 = config.computes_in_bf16(world.device.type)
    if stage == 0:
        return FlatEngine(module, world, bf16=bf16, weight_decay=config.weight_decay, clip_norm=config.clip_norm)
    return ShardedEngine(
        module,
        world,
        zero_stage=stage,
        bf16=bf16,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        offload_optimizer=config.offload_optimizer,
    )


_KEPT_WHOLE = 10_000
"""Elements up to which ZeRO 3 keeps a parameter whole on every process: biases and norms."""
_LARGEST_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once unless told otherwise, and reserves memory for; a smaller model needs no more than its size."""


class ShardedEngine:
    """A module under DeepSpeed's ZeRO 1 to 3, with AdamW."""

    def __init__(
        self,
        module: nn.Module,
        world: World,
        *,
        zero_stage: int,
        bf16: bool,
        weight_decay: float,
        clip_norm: float,
        offload_optimizer: bool = False,
    ) -> None:
        """Wraps `module`; its parameters move to the world's device and, by stage, are sharded over the processes.

        Args:
            module: parameters in fp32, the same on every process; those that require no gradient are not updated, nor saved.
            world: the processes.
            zero_stage: 1 to 3.
            bf16: forward and backward in bf16; master weights, moments and the sum over micro-batches in fp32.
            weight_decay: decoupled weight decay, of matrices only.
            clip_norm: largest norm of the whole gradient.
            offload_optimizer: masters and moments stay in the host's memory, and are updated there.
        """
        assert zero_stage in (1, 2, 3), zero_stage
        self.module, self.world, self.zero_stage = module, world, zero_stage
        self._deepspeed = _deepspeed()
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._attributes: dict[Any, set[str]] = {p: set(vars(p)) for p in module.parameters()}
        self._adam = _adamw(self._deepspeed, self._trained.values(), weight_decay, world, offload=offload_optimizer)
        originals = {name: p.data for name, p in self._trained.items()} if bf16 else {}
        zero = _zero_config(sum(p.numel() for p in self._trained.values()), zero_stage, world, offload_optimizer)
        config = {
            # DeepSpeed only multiplies these two; batches here are counted in tokens, and `backward` says which is the last.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip_norm,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
            **(_bf16_config(zero_stage) if bf16 else {}),
        }
        with contextlib.redirect_stdout(None):  # what ZeRO 1 takes for bf16 prints the memory in use
            self._engine, self._optimizer, _, _ = self._deepspeed.initialize(model=module, optimizer=self._adam, config=config)
        self._masks = HeldMasks(self._trained, world.device)
        if bf16:
            # DeepSpeed makes its fp32 masters from the weights it has rounded to bf16.
            fill(self._shard(), originals)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's forward gives."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of this process's share of the global loss; DeepSpeed's average over the processes is undone."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> Tensor:
        """Clips and updates; gives the norm of the whole gradient before clipping, infinite where nothing was updated."""
        assert self._engine.is_gradient_accumulation_boundary(), "a step follows the last backward"
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        # Its optimizers compute the norm over all processes first, and give up the update where that is not finite.
        self._engine.step()
        if self._optimizer.overflow and self.zero_stage != 3:
            # Offloading in bf16 it would keep the sum of this step for the next (0.19.8); delete when `step` there clears it.
            for sums in (getattr(self._optimizer, name, {}) for name in ("averaged_gradients", "all_grad_tensors")):
                sums.update(dict.fromkeys(sums))
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self.world.device)

    def hold(self, masks: Mapping[str, Tensor]) -> None:
        """Prunes: what the masks leave out becomes zero, weights and moments, and stays so (`HeldMasks.hold`)."""
        self._masks.hold(masks, self._shard())
        zero_layout.refresh(self._optimizer, self.zero_stage)

    def gather_weights(self) -> dict[str, Tensor]:
        """All parameters (the fp32 masters of those trained) and buffers, whole, on the CPU of rank 0; an empty mapping elsewhere."""
        weights: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            with self._whole(parameter) as whole:
                if self.world.is_main:
                    weights[name] = whole.to("cpu", torch.float32, copy=True)
        if self.world.is_main:
            weights |= {name: buffer.detach().to("cpu", copy=True) for name, buffer in self.module.named_buffers()}
        return weights

    @contextlib.contextmanager
    def _whole(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        if parameter.requires_grad:
            yield self._deepspeed.utils.safe_get_full_fp32_param(parameter)
        else:
            with self._deepspeed.zero.GatheredParameters([parameter]) if self.zero_stage == 3 else contextlib.nullcontext():
                yield parameter.detach()

    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """Writes a resumable checkpoint, every process its own share."""
        replace_state(folder, step, state, self.world, self.zero_stage, lambda tag: self._write(folder / tag))

    def resume(self, folder: Path) -> ResumePoint | None:
        """Loads the last checkpoint of `save`, of any number of processes and any ZeRO stage.

        Raises:
            RuntimeError: if it is damaged, or of another model.
        """
        found = read_resume(folder)
        if found is not None:
            error, updates = None, 0
            try:
                updates = read_shards(folder / found.tag, self._shard())
            except RuntimeError as caught:
                error = caught
            self.world.agree(error)
            set_updates(self._adam, updates)
            self._masks.read(folder / found.tag)
            zero_layout.refresh(self._optimizer, self.zero_stage)
        return found

    def _write(self, folder: Path) -> None:
        error: Exception | None = None
        if self.world.is_main:
            # A state that was being written when the processes died may be of more of them.
            shutil.rmtree(folder, ignore_errors=True)
        self.world.barrier()
        try:
            write_shard(folder, self._shard(), updates_of(self._adam), number=self.world.rank, of=self.world.size)
            if self.world.is_main:
                self._masks.write(folder)
        except (OSError, RuntimeError) as caught:
            error = caught
        self.world.agree(error)

    def _shard(self) -> Shard:
        return zero_layout.shard_of(self._optimizer, self._adam, self._trained, self.zero_stage, self.world.rank)

    def release(self) -> None:
        """Takes DeepSpeed off the module, whose parameters are in fp32 again: under ZeRO 3 not a number until weights are loaded."""
        shapes = {p: p.ds_shape for p in self._attributes} if self.zero_stage == 3 else {}
        self._masks.release()
        self._engine.destroy()
        _forget_modules(self._deepspeed)
        for module in self.module.modules():
            module._parameters = module.__dict__.pop("_original_parameters", module._parameters)
        for parameter, before in self._attributes.items():
            for name in vars(parameter).keys() - before:
                delattr(parameter, name)
            parameter.grad = None
            parameter.data = torch.full(shapes[parameter], torch.nan) if shapes else parameter.data.to(torch.float32, copy=True)


def _forget_modules(deepspeed: Any) -> None:
    """Empties what ZeRO 3 keeps of modules that it is done with, and with them of all their tensors: a list, and the cache of a method.

    Needed with DeepSpeed 0.19.8, where a model, its gradients and its optimizer stay on the GPU; delete when `destroy` does it.
    """
    zero = deepspeed.runtime.zero
    zero.parameter_offload.FWD_MODULE_STACK.clear()
    coordinator = zero.partitioned_param_coordinator.PartitionedParameterCoordinator
    for cell in coordinator._PartitionedParameterCoordinator__params_to_release.__closure__:
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def _zero_config(num_trained: int, stage: int, world: World, offload: bool) -> dict[str, Any]:
    bucket = min(_LARGEST_BUCKET, num_trained)
    # Gathered pieces begin at even elements.
    config: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket + bucket % 2}
    if stage == 3:
        config["stage3_param_persistence_threshold"] = _KEPT_WHOLE
    if offload:
        config["offload_optimizer"] = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    return config


def _bf16_config(stage: int) -> dict[str, Any]:
    # Micro-batches are added up in fp32. ZeRO 1 reduces their sum once a step, which bf16 would round; 2 and 3 reduce each of them.
    once = {"communication_data_type": "fp32"} if stage == 1 else {}
    return {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, **once}


def _adamw(deepspeed: Any, trained: Iterable[nn.Parameter], weight_decay: float, world: World, *, offload: bool) -> torch.optim.Optimizer:
    """AdamW with decay of matrices: torch's, fused; for masters in the host's memory DeepSpeed's, where it can be compiled."""
    parameters = list(trained)
    sorts = [([p for p in parameters if p.dim() > 1], weight_decay), ([p for p in parameters if p.dim() <= 1], 0.0)]
    if offload and world.device.type == "cuda":
        groups = [{"params": list(params), "weight_decay": decay} for params, decay in sorts if params]
        built: torch.optim.Optimizer | None = None
        with contextlib.suppress(RuntimeError, ImportError, OSError):
            built = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, lr=0.0)
        # Every process must have the same: a state saved by one is read by another.
        if int(world.sum(torch.tensor(int(built is not None)))) == world.size:
            assert built is not None
            return built
        if world.is_main:
            _LOG.warning(
                "DeepSpeed's optimizer for the CPU cannot be compiled (it needs a C++ compiler and ninja): torch's takes its place"
            )
    groups = [{"params": list(params), "weight_decay": decay} for params, decay in sorts if params]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


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
    """Processes that hold one copy between them, each a slice of every matrix but the embedding."""
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

    replica: a copy on each device, no communication. tensor: DeepSpeed AutoTP splits all matrices but the embedding over the processes of a
    node, and each such group is a copy. zero3: each process keeps a share of every parameter, gathered layer by layer.

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
