"""`stepdown plan`: the memory of a configuration's teacher and student on this machine, or on GPUs named. Imports no torch.

`--rule` has one model counted as public estimators count it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.config import Config
from launch.estimators import RULES, Rule, Size, estimates
from launch.hardware import GPUS, DetectedGpu, Gpu, detect, memory_bytes
from launch.parameters import buffer_bytes, count_parameters, largest_module, parameters_of, parse_parameters
from launch.plan import (
    StudentPlan,
    TeacherPlan,
    cpu_teacher_plan,
    student_plan,
    teacher_plan,
    weight_bytes,
)
from launch.report_html import MISSING, count
from train.config import CutModel, ModelSource, ScratchModel

CONFIG = "config.json"
_VOCABULARY = 512
_SHOWN = ("A100-40GB", "A100-80GB", "H200-141GB", "L4")
_COUNTED: dict[Rule, str] = {
    "simple": "Weights alone; gigabytes of 10^9 bytes. Activations, caches and the GPU's own overhead come on top.",
    "accelerate": "As `accelerate estimate-memory` counts: for training the largest of weights, gradients and an optimizer's step, which "
    "are not added up; GiB over the GPU's nominal gigabytes. Activations come on top.",
    "deepspeed": "As DeepSpeed's estimators count, without offload: weights, gradients and AdamW's states; GiB over the GPU's nominal "
    "gigabytes. Activations and buffers come on top.",
}


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What fits where; None where the configuration does not tell the size without a download."""

    device: str
    processes: int
    device_memory_bytes: int | None
    teacher_parameters: int | None
    teacher: TeacherPlan | None
    student_parameters: int | None
    student: StudentPlan | None
    zero_stage: int
    sentence: str


def plan_run(config: Config, *, gpu: str | None = None, gpus: int | None = None, params: str | None = None) -> RunPlan:
    """Plans a configuration.

    Args:
        config: of the run.
        gpu: a GPU of the table in place of what is here.
        gpus: how many on a node; what is here, or 1, where left out.
        params: the teacher's size, such as 70B, where the configuration does not tell.

    Raises:
        ValueError: for a GPU that the table does not have, or a size that is not one.
    """
    devices = _devices(config, gpu, gpus)
    processes = len(devices) or config.launch.cpu_processes
    memory = min(d.memory_bytes for d in devices) if devices else memory_bytes()
    source = config.teacher.model
    size = parse_parameters(params) if params is not None else _size(source, None) if source is not None else None
    teacher = None
    if size is not None:
        teacher = teacher_plan(size, devices[0].memory_bytes, len(devices), 1) if devices else cpu_teacher_plan(size, memory, processes)
    student_size = _size(config.student.model, source)
    precision = config.student.precision if config.student.precision != "auto" else "bf16" if devices else "fp32"
    zero_stage = config.student.zero_stage if config.student.zero_stage != "auto" else 0 if processes == 1 else 1
    offload = config.student.offload_optimizer
    student = None
    if student_size is not None:
        student = student_plan(student_size, zero_stage, processes, precision, offload_optimizer=offload)
    name = devices[0].name if devices else "CPU"
    sentence = _sentence(config, teacher, student_size, f"{processes} x {name}" if devices else name)
    sentence += _remarks(config, size, student, bool(devices))
    return RunPlan(name, processes, memory, size, teacher, student_size, student, zero_stage, sentence)


def rule_of(name: str) -> Rule:
    """The rule of a name.

    Raises:
        ValueError: if there is none.
    """
    for rule in RULES:
        if rule == name:
            return rule
    raise ValueError(f"--rule is {name}: give {', '.join(RULES[:-1])} or {RULES[-1]}")


def size_of(model: str | None, params: str | None) -> tuple[str, Size]:
    """A model by itself, and what it is called.

    Args:
        model: a model folder, its config.json, or a hub id, whose config.json alone is fetched.
        params: a number of parameters in place of a model.

    Raises:
        ValueError: if neither or both are given, or the model's parameters cannot be counted.
        RuntimeError: if the hub does not give its config.json.
    """
    if (model is None) == (params is None):
        raise ValueError("give a configuration, a model (its folder, config.json or hub id), or --params, such as --params 70B")
    if params is not None:
        return f"{params} parameters", Size(parse_parameters(params), 0, 0)
    assert model is not None
    path = Path(model)
    path = path / CONFIG if path.is_dir() else path
    if not path.is_file():
        path = _fetched(model)
    config = json.loads(path.read_text())
    return model, Size(count_parameters(config), largest_module(config), buffer_bytes(config))


def _fetched(model: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell each of its retries
    try:
        return Path(hf_hub_download(model, CONFIG))
    except HFValidationError:
        raise ValueError(f"{model} is no YAML file, no folder with a {CONFIG}, and no hub id") from None
    except Exception as error:  # of the network, in whatever form
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(f"the hub does not give {CONFIG} of {model}: {told[0]}; give its folder, or --params") from error


def render_estimates(name: str, size: Size, rule: Rule, console: Console, *, gpu: str | None, as_json: bool) -> None:
    """Prints what a public estimator says of a model, and how many GPUs of the table that is."""
    gpus = [_known(gpu)] if gpu is not None else [gpu for gpu in GPUS if gpu.name in _SHOWN]
    found = estimates(rule, size)
    counts = {e.what: {g.name: e.fewest_gpus(g.memory_bytes / 1e9) for g in gpus} for e in found}
    if as_json:
        rows = [{"what": e.what, "bytes": e.total_bytes, "gpus": counts[e.what]} for e in found]
        print(json.dumps({"model": name, "parameters": size.parameters, "rule": rule, "estimates": rows}, indent=2))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in ("", "In all", *(g.name for g in gpus)):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for e in found:
        in_all = f"{e.total_bytes / e.unit:,.1f} {'GB' if e.unit == 10**9 else 'GiB'}"
        table.add_row(e.what, in_all, *("-" if count is None else f"{count:,}" for count in counts[e.what].values()))
    console.print(f"{name}: {count(size.parameters)}; fewest GPUs by the rule `{rule}`", highlight=False, soft_wrap=True)
    console.print(table)
    missing = " The largest module is not known by a number of parameters alone, and counts as 0." if not size.largest_module else ""
    console.print(_COUNTED[rule] + (missing if rule == "deepspeed" else ""), highlight=False, soft_wrap=not console.is_terminal)


def render(plan: RunPlan, console: Console, *, as_json: bool) -> None:
    """Prints a plan as a table and a sentence, or as JSON."""
    if as_json:
        print(json.dumps(asdict(plan), indent=2))
        return
    memory = _gigabytes(plan.device_memory_bytes) if plan.device_memory_bytes else "unknown"
    here = f"{plan.processes} x {plan.device}, {memory} each" if plan.device != "CPU" else f"CPU, {memory}, processes: {plan.processes}"
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in ("", "Params", "Weights", "Gradients", "Optimizer", "Total", "Sharding"):
        table.add_column(column, justify="left" if column in ("", "Sharding") else "right", no_wrap=True)
    if plan.teacher is not None:
        weights = _gigabytes(plan.teacher.weight_bytes_per_gpu)
        table.add_row("teacher", count(plan.teacher_parameters), weights, MISSING, MISSING, weights, plan.teacher.sharding)
    if plan.student is not None:
        parts = (plan.student.weight_bytes, plan.student.gradient_bytes, plan.student.optimizer_bytes, plan.student.total_bytes)
        table.add_row("student", count(plan.student_parameters), *map(_gigabytes, parts), f"ZeRO-{plan.zero_stage}")
    console.print(f"{here}; bytes a process, without activations", highlight=False, soft_wrap=True)
    if table.row_count:
        console.print(table)
    console.print(plan.sentence, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def _devices(config: Config, gpu: str | None, gpus: int | None) -> list[DetectedGpu]:
    wanted = config.launch.gpus_per_node if isinstance(config.launch.gpus_per_node, int) else None
    if gpu is not None:
        known = _known(gpu)
        return [DetectedGpu(known.name, known.memory_bytes)] * (gpus or wanted or 1)
    found = detect() if config.launch.device != "cpu" else []
    if gpus is not None and gpus > len(found):
        raise ValueError(f"--gpus is {gpus}, but this machine has {len(found)}: name the GPU to plan for with --gpu")
    return found[: gpus or wanted or len(found)]


def _known(gpu: str) -> Gpu:
    name = gpu.lower().removesuffix("gb")
    known = [g for g in GPUS if name in (g.name.lower().removesuffix("gb"), g.name.lower().partition("-")[0])]
    if not known:
        raise ValueError(f"--gpu is {gpu}, which the table does not have; it has: {', '.join(g.name for g in GPUS)}")
    return known[-1]


def _size(model: ModelSource, teacher: ModelSource | None) -> int | None:
    """Parameters of a model; None where only its files would tell."""
    scratch = teacher if isinstance(model, CutModel) else model
    if isinstance(scratch, ScratchModel) and scratch.tokenizer is not None:
        return None
    vocabulary = scratch.vocabulary if isinstance(scratch, ScratchModel) else None
    return parameters_of(model, vocabulary=vocabulary or _VOCABULARY, teacher=teacher)


def _sentence(config: Config, plan: TeacherPlan | None, student_size: int | None, place: str) -> str:
    unknown = "the size of {} is not known before its files are read"
    student = "" if student_size is not None else f" {unknown.format('student.model').capitalize()}."
    if plan is None:
        if config.teacher.source == "recorded":
            return f"The teacher is recorded: it needs no device.{student}"
        return f"{unknown.format('teacher.model').capitalize()}: give it with --params, such as --params 70B.{student}"
    if not plan.fits:
        return f"The teacher does not fit: {plan.why}.{student}"
    if place == "CPU":
        return f"The teacher fits this machine: {plan.why}.{student}"
    how = {"replica": "a copy on each", "tensor": f"split over {plan.tensor_degree}", "zero3": "sharded by ZeRO-3 over all"}[plan.sharding]
    return f"The teacher fits {place}, {how}: {plan.why}.{student}"


def _remarks(config: Config, teacher_size: int | None, student: StudentPlan | None, on_gpu: bool) -> str:
    """What the student's row of the table does not show."""
    text = ""
    if student is not None and student.host_bytes:
        text += f" The student's optimizer takes {_gigabytes(student.host_bytes)} of the host's memory a process."
    if student is not None and config.student.lora is not None:
        text += " The student is counted as if all its weights were trained: student.lora takes less."
    if teacher_size is not None and config.student.loss.soft and config.student.loss.teacher == "live":
        size = _gigabytes(weight_bytes(teacher_size, "bf16" if on_gpu else "fp32"))
        text += f" In training the live teacher takes another {size} in each process."
    return text


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.2f} MB"
