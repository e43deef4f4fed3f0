"""How a teacher and a student are laid over GPUs, and how few of them do. Arithmetic only: imports no torch, loads no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from launch.architecture import Architecture
from launch.inference_memory import (
    FEWEST_SLOTS,
    Inference,
    Precision,
    most_slots,
    teacher_memory,
    teacher_weights,
    weight_bytes,
    with_slots,
)
from launch.memory import Memory, usable_bytes
from launch.training_memory import Step, host_bytes, training_memory

GPUS_A_NODE = 8
"""Of the nodes that fewest GPUs are counted in."""
_MOST_NODES = 512
_HOST_SHARE = 0.8
"""Of a node's memory that an offloaded teacher may take."""
_HOST_BYTES = 800_000_000_000
"""Of a node's memory that an offloaded optimizer may take, where offloading is proposed: four fifths of a terabyte."""


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """How a teacher that only generates and scores lies on the devices."""

    sharding: Literal["replica", "tensor", "zero3"]
    tensor_degree: int
    """Processes that hold one copy between them, each a slice of every matrix but the embedding; 1 unless `sharding` is tensor."""
    replicas: int
    """Whole copies that work side by side."""
    weight_bytes_per_gpu: int
    """On a CPU: per process."""
    fits: bool
    why: str
    memory: Memory = field(default_factory=Memory)
    """Of a GPU at its fullest, with `slots` requests at once."""
    slots: int = 0
    """Requests that a copy writes at once, at their longest; 0 on a CPU."""


def teacher_plan(
    model: Architecture,
    gpu_memory_bytes: int,
    gpus_per_node: int,
    nodes: int,
    how: Inference | None = None,
    sharding: Literal["auto", "replica", "tensor", "zero3"] = "auto",
) -> TeacherPlan:
    """The cheapest way to hold a teacher: a replica on each GPU, else tensor parallel inside a node, else ZeRO-3 over all.

    A way is taken where a GPU holds its share of the weights, one forward that scores, and keys and values of `FEWEST_SLOTS` requests at
    their longest; where none has room for so many, the first with room for the most.
    Measured on two H200 with an 8B teacher: a replica a GPU writes 10,907 tokens/s (64 prompts each), two-way tensor parallel 7,523
    (64 prompts in all), ZeRO-3 651 (64 each). So a step down this list is taken only where memory forces it.

    Args:
        model: the teacher.
        gpu_memory_bytes: of one GPU, all of it.
        gpus_per_node: GPUs of one node; tensor parallel stays inside a node, in a power of two that divides this and the heads.
        nodes: nodes of the job.
        how: precision and lengths; a layout in it is not looked at.
        sharding: look at this way alone.
    """
    how = how or Inference()
    gpus = gpus_per_node * nodes
    usable = usable_bytes(gpu_memory_bytes, gpus)
    ways = [way for way in _ways(model, gpus_per_node, gpus, how) if sharding in ("auto", way.sharding)]
    slots = [most_slots(model, way, usable) for way in ways]
    best = next((n for n, count in enumerate(slots) if count >= FEWEST_SLOTS), slots.index(max(slots))) if slots else 0
    if slots and slots[best]:
        return _plan(model, with_slots(ways[best], slots[best]), gpus, usable)
    needed = teacher_memory(model, with_slots(ways[-1] if ways else how, 1))
    least = fewest_teacher_gpus(model, gpu_memory_bytes, how)
    way_out = "larger GPUs" if least is None else f"at least {least} such GPUs, larger ones,"
    place = f"each of {gpus} GPUs, which have" if gpus > 1 else "one GPU, which has"
    why = (
        f"{model.parameters:,} parameters in {how.precision} take {gigabytes(needed.total)} on {place} {gigabytes(usable)} usable: "
        f"use {way_out} or a smaller teacher"
    )
    return TeacherPlan(ways[-1].sharding if ways else "replica", 1, 1, needed.weights, False, why, needed, 0)


def hosts_hold(num_parameters: int, nodes: int, memory_bytes: int | None) -> bool:
    """Whether a teacher that the GPUs do not hold between them may lie in the hosts' memory, each node's share in its own.

    Args:
        num_parameters: of the teacher.
        nodes: that share it.
        memory_bytes: of one node; None where it is not known.
    """
    return weight_bytes(num_parameters, "bf16") // nodes < _HOST_SHARE * (memory_bytes or 0)


def _plan(model: Architecture, way: Inference, gpus: int, usable: int) -> TeacherPlan:
    memory = teacher_memory(model, way)
    place = {"replica": "a whole copy", "tensor": f"one copy over {way.degree} GPUs of a node", "zero3": f"one copy over all {gpus} GPUs"}
    others = {"replica": "", "tensor": "; fewer hold less", "zero3": "; no tensor degree that divides node and heads holds more"}
    requests = f"{way.slots} request{'s' if way.slots > 1 else ''} at once"
    room = f"{gigabytes(memory.total)} of {gigabytes(usable)} usable on a GPU"
    why = f"{place[way.sharding]} takes {room} with {requests}{others[way.sharding]}"
    degree = way.degree if way.sharding == "tensor" else 1
    return TeacherPlan(way.sharding, degree, gpus // way.degree, teacher_weights(model, way), True, why, memory, way.slots)


def _ways(model: Architecture, gpus_per_node: int, gpus: int, how: Inference) -> Iterator[Inference]:
    yield replace(how, sharding="replica", degree=1)
    for degree in tensor_degrees(model, gpus_per_node):
        yield replace(how, sharding="tensor", degree=degree)
    if gpus > 1:
        yield replace(how, sharding="zero3", degree=gpus)


def tensor_degrees(model: Architecture, gpus_per_node: int) -> list[int]:
    """Powers of two from 2 that divide a node's GPUs, the model's attention heads, and its key-value heads."""
    powers = (2**n for n in range(1, gpus_per_node.bit_length()))
    return [d for d in powers if gpus_per_node % d == 0 and model.heads % d == 0 and model.key_value_heads % d == 0]


def fewest_teacher_gpus(model: Architecture, gpu_memory_bytes: int, how: Inference | None = None) -> int | None:
    """GPUs, in nodes of `GPUS_A_NODE`, that hold one copy with a request; None where no number does."""

    def fits(node: int, gpus: int) -> bool:
        usable = usable_bytes(gpu_memory_bytes, gpus)
        return any(most_slots(model, way, usable) for way in _ways(model, node, gpus, how or Inference()))

    return _fewest(fits)


def _fewest(fits: Callable[[int, int], bool]) -> int | None:
    """The least number of GPUs that fits: of one node, then of whole nodes.

    Args:
        fits: of (GPUs of a node, GPUs in all).
    """
    inside = next((gpus for gpus in range(1, GPUS_A_NODE + 1) if fits(gpus, gpus)), None)
    if inside is not None or not fits(GPUS_A_NODE, _MOST_NODES * GPUS_A_NODE):
        return inside
    low, high = 2, _MOST_NODES
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(GPUS_A_NODE, middle * GPUS_A_NODE) else (middle + 1, high)
    return low * GPUS_A_NODE


def cpu_teacher_plan(
    num_parameters: int,
    memory_bytes: int | None,
    processes: int = 1,
    *,
    precision: Precision = "fp32",
    reserve: float = 0.1,
    margin: float = 0.2,
) -> TeacherPlan:
    """A teacher without a GPU: a replica in each process, in the machine's memory.

    Args:
        num_parameters: of the teacher.
        memory_bytes: of the machine; None where it is not known.
        processes: that share the machine, each with its copy.
        precision: of the weights.
        reserve: share of the memory kept for everything else.
        margin: room for activations and the key-value cache, as a share of the weights.
    """
    weights = weight_bytes(num_parameters, precision)
    if memory_bytes is None:
        return TeacherPlan("replica", 1, processes, weights, True, "the memory of this machine is not known; nothing was compared with it")
    needed, usable = int(processes * weights * (1 + margin)), int(memory_bytes * (1 - reserve))
    copies = f"{processes} copies" if processes > 1 else "a copy"
    if needed <= usable:
        why = f"{copies} with working memory: {gigabytes(needed)} of {gigabytes(usable)} usable on this machine"
        return TeacherPlan("replica", 1, processes, weights, True, why)
    why = (
        f"{num_parameters:,} parameters in {precision}, {copies} with working memory, take {gigabytes(needed)}, but this machine has "
        f"{gigabytes(usable)} usable: use fewer processes, a smaller teacher, or GPUs"
    )
    return TeacherPlan("replica", 1, processes, weights, False, why)


@dataclass(frozen=True, slots=True)
class StudentPlan:
    """How a student is trained on GPUs."""

    step: Step
    """As it was asked for, or, where that does not fit, with the first changes that make it fit."""
    memory: Memory
    """Of a process."""
    host_bytes: int
    """Of the host's memory, by process, where the optimizer is offloaded."""
    fits: bool
    changes: tuple[str, ...]
    """Overrides that make it fit; empty where it does as it is, or nothing helps."""


def student_plan(model: Architecture, step: Step, usable: int) -> StudentPlan:
    """The step as it is, else the cheapest changes that make it fit, in the order of what they cost.

    Passes that are not recorded first, and smaller forwards, which only cost launches; then activation checkpointing, a third more
    arithmetic; then ZeRO 2 and 3, more communication; then an optimizer in the host's memory.

    Args:
        model: the student.
        step: as the configuration has it.
        usable: bytes of a GPU.
    """
    for changes, changed in _changes(step):
        memory = training_memory(model, changed)
        on_host = host_bytes(model, changed) * min(changed.processes, GPUS_A_NODE)
        if memory.total <= usable and (not changes or on_host <= _HOST_BYTES):
            return StudentPlan(changed, memory, host_bytes(model, changed), True, changes)
    return StudentPlan(step, training_memory(model, step), host_bytes(model, step), False, ())


_Change = tuple[tuple[str, ...], Step]
"""Overrides, and the step that they make."""


def _changes(step: Step) -> list[_Change]:
    """Steps that need less and less, the one that is asked for first."""
    plain: list[_Change] = [((), step)]
    if step.graphs:
        plain.append((("student.compile=layers",), replace(step, graphs=False)))
    made, least = plain[-1]
    sized = [plain[-1], *(((*made, override), smaller) for override, smaller in _smaller(least))]
    changes = plain[:-1] + sized
    if not step.checkpointing:
        sized = [((*made, "student.activation_checkpointing=true"), replace(least, checkpointing=True)) for made, least in sized]
        changes += sized
    made, least = sized[-1]
    sharded: tuple[Literal[2, 3], ...] = (2, 3)
    stages = [stage for stage in sharded if stage > step.zero_stage and step.processes > 1]
    changes += [((*made, f"student.zero_stage={stage}"), least.under(stage)) for stage in stages]
    if not step.offload and step.adapters is None:
        highest: Literal[0, 1, 2, 3] = stages[-1] if stages else step.zero_stage or 2
        made = made if highest == step.zero_stage else (*made, f"student.zero_stage={highest}")
        changes.append(((*made, "student.offload_optimizer=true"), least.under(highest, offload=True)))
    return changes


def _smaller(step: Step) -> Iterator[tuple[str, Step]]:
    """Forwards of 8192, 4096 ... tokens, down to one sequence."""
    tokens = 1 << (step.tokens - 1).bit_length() - 1
    while tokens >= step.longest:
        parts = -(-step.tokens // tokens)
        targets = max(1, -(-step.targets // parts))
        smaller = replace(step, tokens=-(-step.tokens // parts), targets=targets, forwards=step.forwards * parts)
        yield f"student.micro_batch_tokens={tokens}", smaller
        tokens //= 2


def fewest_student_gpus(model: Architecture, step_on: Callable[[int], Step], gpu_memory_bytes: int) -> tuple[int, StudentPlan] | None:
    """The least number of GPUs, in nodes of `GPUS_A_NODE`, on which the student trains, with what has to be changed; None where none do.

    Args:
        model: the student.
        step_on: the step as the configuration has it on so many GPUs.
        gpu_memory_bytes: of one GPU, all of it.
    """

    def plan(gpus: int) -> StudentPlan:
        return student_plan(model, step_on(gpus), usable_bytes(gpu_memory_bytes, gpus))

    found = _fewest(lambda _, gpus: plan(gpus).fits)
    return None if found is None else (found, plan(found))


def gigabytes(num_bytes: int) -> str:
    """With one decimal, or none from a thousand on; megabytes below a tenth of a gigabyte."""
    if num_bytes < 1e8:
        return f"{num_bytes / 1e6:,.1f} MB"
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes < 1e12 else f"{num_bytes / 1e9:,.0f} GB"
