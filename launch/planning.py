"""`stepdown plan`: what a configuration, or one model, needs of memory, GPUs, hours and disk. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from data.config import RationalesConfig
from launch.architecture import Architecture, assumed_architecture
from launch.config import Config
from launch.forecast import SAMPLED_BYTES, TOP_K_BYTES, Speed, record_bytes, training_hours, writing_hours
from launch.hardware import GPUS, Gpu, detect, known_gpu, memory_bytes
from launch.inference_memory import FEWEST_SLOTS, Inference, Precision, teacher_memory, with_slots
from launch.memory import Memory, usable_bytes
from launch.parameters import parse_parameters
from launch.plan import (
    StudentPlan,
    TeacherPlan,
    cpu_teacher_plan,
    fewest_student_gpus,
    fewest_teacher_gpus,
    student_plan,
    teacher_plan,
)
from launch.sizes import Sized, sized
from launch.training_memory import Step, training_memory
from launch.workload import ROWS, inference_of, row_of, rows_of, step_of
from train.config import LossConfig, TrainingConfig
from train.gpus import gpu_named

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8", "int4")
_CPU_SHARE = 0.9
"""Of a machine's memory that training on its CPU may take."""

StepOn = Callable[[int], Step]
"""A training's step on so many processes."""


@dataclass(frozen=True, slots=True)
class Devices:
    """What is planned for."""

    name: str
    per_node: int
    """GPUs of a node; processes on a CPU."""
    nodes: int
    memory_bytes: int | None
    """Of one GPU, or of the machine."""
    gpu: Gpu | None
    """Its row of the table, where it has one."""
    on_gpu: bool

    @property
    def processes(self) -> int:
        """In all."""
        return self.per_node * self.nodes

    @property
    def usable_bytes(self) -> int | None:
        """By process, for what is counted."""
        if self.memory_bytes is None:
            return None
        return usable_bytes(self.memory_bytes, self.processes) if self.on_gpu else int(self.memory_bytes * _CPU_SHARE / self.per_node)


@dataclass(frozen=True, slots=True)
class TeacherPart:
    """A teacher's plan."""

    parameters: int
    assumed: bool
    """Its shape is not known, only its size."""
    plan: TeacherPlan
    whole_bytes: dict[Precision, int]
    """A whole copy at its fullest by precision, with the fewest requests that are planned for."""
    gpus: dict[Precision, int | None] = field(default_factory=dict)
    """By precision, the fewest of the planned GPUs that hold it; empty on a CPU."""


@dataclass(frozen=True, slots=True)
class TrainingPart:
    """A training's plan: the student's, or the tuning of the teacher."""

    parameters: int
    assumed: bool
    plan: StudentPlan
    layout_bytes: dict[str, int]
    """A process at its fullest, by ZeRO stage, otherwise as configured."""


@dataclass(frozen=True, slots=True)
class GpuRow:
    """How few of one model of GPU do; None where no number does, or there is nothing to plan."""

    name: str
    memory_bytes: int
    has_bf16: bool
    teacher: int | None
    student: int | None
    changes: tuple[str, ...]
    """Overrides with which the student trains there."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """Hours and disk, with what they were reckoned from."""

    rows: int
    assumed_rows: bool
    writing_hours: float | None
    training_hours: float | None
    record_bytes: int | None


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What fits where; a part is None where there is nothing to plan, or its size is not known."""

    devices: Devices
    teacher: TeacherPart | None
    tuning: TrainingPart | None
    student: TrainingPart | None
    gpus: list[GpuRow]
    outlook: Outlook | None
    remarks: list[str]


def plan_run(
    config: Config,
    *,
    gpu: str | None = None,
    gpus: int | None = None,
    nodes: int | None = None,
    params: str | None = None,
    rows: int | None = None,
) -> RunPlan:
    """Plans a configuration.

    Args:
        config: of the run.
        gpu: a GPU of the table, or the memory of another, in place of what is here.
        gpus: how many on a node; what is here, or 1, where left out.
        nodes: of the job.
        params: the teacher's size, such as 70B, where the configuration does not tell.
        rows: of the training split, where only reading it would tell.

    Raises:
        ValueError: for a GPU that the table does not have, or a size that is not one.
    """
    devices = _devices(config, gpu, gpus, nodes)
    teacher, student = _models(config, params)
    counted = rows if rows is not None else rows_of(config.task)
    num_rows, shape = counted or ROWS, teacher.model
    how = inference_of(config.teacher)
    live = shape if config.student.loss.soft and config.student.loss.teacher == "live" else None
    row = row_of(config.student, config.student.loss, joint=config.student.single_task)

    def student_on(processes: int, on_gpu: bool = True) -> Step:
        assert student.model is not None
        return step_of(config.student, student.model, row, processes, on_gpu=on_gpu, rows=num_rows, live=live)

    runs_here = config.teacher.source in ("deepspeed", "vllm")
    teacher_part = None
    if shape is not None and runs_here:
        teacher_part = _teacher_part(shape, how, devices, config.teacher.sharding)
    student_part = None if student.model is None else _training_part(student.model, student_on(devices.processes, devices.on_gpu), devices)
    tuning, tune = None, config.teacher.tune
    if tune is not None and shape is not None:
        tuned_row = row_of(tune, LossConfig(label=1.0, rationale=0.0), joint=True)
        step = step_of(tune, shape, tuned_row, devices.processes, on_gpu=devices.on_gpu, rows=num_rows)
        tuning = _training_part(shape, step, devices)
    outlook = Outlook(
        num_rows,
        counted is None,
        _writing(config.teacher.rationales, shape, teacher_part, how, num_rows, devices),
        _training(config.student, student.model, student_part, num_rows * row.tokens, devices),
        _stored(config, num_rows) if runs_here else None,
    )
    table = [_gpu_row(g, shape if runs_here else None, how, student.model, student_on) for g in GPUS]
    unknown = [s.unknown for s in (teacher, student) if s.unknown and (s is student or runs_here)]
    return RunPlan(devices, teacher_part, tuning, student_part, table, outlook, unknown + _remarks(devices, teacher_part, student_part))


def plan_model(model: Architecture, *, gpu: str | None = None, gpus: int | None = None, nodes: int | None = None) -> RunPlan:
    """Plans one model by itself, as a teacher and in training, with the configuration's defaults.

    Args:
        model: its shape.
        gpu: as in `plan_run`; an A100-80GB where left out.
        gpus: how many on a node; 8 where left out.
        nodes: of the job.
    """
    known = gpu_named(gpu or "A100-80")
    devices = Devices(known.name, gpus or 8, nodes or 1, known.memory_bytes, known, True)
    config, how = TrainingConfig.model_validate({}), Inference(scored=0)
    row = row_of(config, LossConfig.model_validate({}))

    def step_on(processes: int) -> Step:
        return step_of(config, model, row, processes, on_gpu=True, rows=ROWS)

    teacher, training = _teacher_part(model, how, devices, "auto"), _training_part(model, step_on(devices.processes), devices)
    table = [_gpu_row(g, model, how, model, step_on) for g in GPUS]
    return RunPlan(devices, teacher, None, training, table, None, _remarks(devices, teacher, training))


def _models(config: Config, params: str | None) -> tuple[Sized, Sized]:
    source = config.teacher.model
    if params is not None:
        teacher = Sized(assumed_architecture(parse_parameters(params)))
    elif source is None or config.teacher.source == "endpoint":
        teacher = Sized(None)
    else:
        teacher = sized(source, None, "teacher.model")
    return teacher, sized(config.student.model, source, "student.model")


def _devices(config: Config, gpu: str | None, gpus: int | None, nodes: int | None) -> Devices:
    wanted = config.launch.gpus_per_node if isinstance(config.launch.gpus_per_node, int) else None
    num_nodes = nodes or config.launch.nodes
    if gpu is not None:
        known = gpu_named(gpu)
        return Devices(known.name, gpus or wanted or 1, num_nodes, known.memory_bytes, known, True)
    found = detect() if config.launch.device != "cpu" else []
    if gpus is not None and gpus > len(found):
        raise ValueError(f"--gpus is {gpus}, but this machine has {len(found)}: name the GPU to plan for with --gpu")
    found = found[: gpus or wanted or len(found)]
    if not found:
        return Devices("CPU", config.launch.cpu_processes, num_nodes, memory_bytes(), None, False)
    return Devices(found[0].name, len(found), num_nodes, min(d.memory_bytes for d in found), known_gpu(found[0].name), True)


def _teacher_part(
    model: Architecture, how: Inference, devices: Devices, sharding: Literal["auto", "replica", "tensor", "zero3"]
) -> TeacherPart:
    few = with_slots(how, FEWEST_SLOTS)
    whole = {precision: teacher_memory(model, replace(few, precision=precision)).total for precision in PRECISIONS}
    if not devices.on_gpu or devices.memory_bytes is None:
        plan = cpu_teacher_plan(model.parameters, devices.memory_bytes, devices.per_node)
        return TeacherPart(model.parameters, model.assumed, replace(plan, memory=Memory(weights=plan.weight_bytes_per_gpu)), whole)
    memory = devices.memory_bytes
    plan = teacher_plan(model, memory, devices.per_node, devices.nodes, how, sharding)
    gpus = {precision: fewest_teacher_gpus(model, memory, replace(how, precision=precision)) for precision in PRECISIONS}
    return TeacherPart(model.parameters, model.assumed, plan, whole, gpus)


def _training_part(model: Architecture, step: Step, devices: Devices) -> TrainingPart:
    usable = devices.usable_bytes
    plan = student_plan(model, step, 2**63 if usable is None else usable)
    stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    layouts = {f"ZeRO-{n}": training_memory(model, step.under(n)).total for n in stages}
    layouts["offloaded"] = training_memory(model, step.under(3, offload=True)).total
    return TrainingPart(model.parameters, model.assumed, plan, layouts)


def _gpu_row(gpu: Gpu, teacher: Architecture | None, how: Inference, student: Architecture | None, step_on: StepOn) -> GpuRow:
    found = fewest_student_gpus(student, step_on, gpu.memory_bytes) if student is not None else None
    return GpuRow(
        gpu.name,
        gpu.memory_bytes,
        gpu.bf16_flops is not None,
        None if teacher is None else fewest_teacher_gpus(teacher, gpu.memory_bytes, how),
        None if found is None else found[0],
        () if found is None else found[1].changes,
    )


def _speed(devices: Devices) -> Speed | None:
    gpu = devices.gpu
    return Speed(gpu.bf16_flops, gpu.bandwidth) if gpu is not None and gpu.bf16_flops else None


def _writing(
    asked: RationalesConfig, model: Architecture | None, part: TeacherPart | None, how: Inference, rows: int, devices: Devices
) -> float | None:
    speed = _speed(devices)
    if model is None or part is None or speed is None or not part.plan.fits:
        return None
    return writing_hours(model, part.plan, how, rows * asked.samples, speed)


def _training(config: TrainingConfig, model: Architecture | None, part: TrainingPart | None, tokens: int, devices: Devices) -> float | None:
    speed = _speed(devices)
    if model is None or part is None or speed is None or not part.plan.fits:
        return None
    return training_hours(model, part.plan.step, int(tokens * config.epochs), devices.processes, speed)


def _stored(config: Config, rows: int) -> int:
    soft, written = config.teacher.soft_labels, config.teacher.rationales.max_new_tokens
    label, rationale = config.student.max_label_tokens, config.student.max_rationale_tokens
    if soft is None or not soft.on_tokens:
        return record_bytes(rows, written, 0, 0.0)
    scored = {"label": label, "rationale": rationale, "both": label + rationale}[soft.on]
    return record_bytes(rows, written, scored, soft.k * TOP_K_BYTES if soft.format == "top_k" else soft.draws * SAMPLED_BYTES)


def _remarks(devices: Devices, teacher: TeacherPart | None, training: TrainingPart | None) -> list[str]:
    """What the tables do not show."""
    found = []
    if any(part is not None and part.assumed for part in (teacher, training)):
        found.append("of a number of parameters the shape is assumed: as many layers as heads, keys and values in eight groups")
    if devices.gpu is not None and devices.gpu.bf16_flops is None:
        found.append(f"{devices.name} has no bf16 arithmetic, which is slow there: set student.precision to fp32")
    if training is not None and training.plan.host_bytes:
        found.append(f"the optimizer takes {training.plan.host_bytes / 1e9:,.1f} GB of the host's memory a process")
    return found
