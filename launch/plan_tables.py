"""A plan as tables that fit 80 columns, as JSON, and in one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields

from rich.console import Console
from rich.table import Table

from launch.inference_memory import FEWEST_SLOTS
from launch.memory import Memory, outside_bytes
from launch.plan import GPUS_A_NODE, gigabytes
from launch.planning import RunPlan, TrainingPart
from launch.report_html import MISSING, count

_NAMES = {
    "weights": "Weights",
    "gradients": "Gradients",
    "optimizer": "Optimizer states",
    "masks": "Masks",
    "activations": "Activations",
    "head": "Logits, head's gradients",
    "cache": "Keys and values",
    "buffers": "Communication",
    "teacher": "Live teacher",
    "recorded": "Recorded passes",
}


def render(plan: RunPlan, console: Console, *, as_json: bool) -> None:
    """Prints a plan."""
    if as_json:
        print(json.dumps(as_document(plan), indent=2))
        return
    console.print(_heading(plan), highlight=False, soft_wrap=True)
    for table in (_components(plan), _choices(plan), _gpus(plan)):
        if table is not None:
            console.print()
            console.print(table)
    console.print()
    for line in (*_estimates(plan), f"{sentence(plan)}{_remarks(plan)}"):
        console.print(line, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def as_document(plan: RunPlan) -> dict[str, object]:
    """A plan as JSON holds it."""
    return {**asdict(plan), "usable_bytes": plan.devices.usable_bytes, "sentence": sentence(plan)}


def _heading(plan: RunPlan) -> str:
    devices = plan.devices
    memory = gigabytes(devices.memory_bytes) if devices.memory_bytes else "unknown"
    if not devices.on_gpu:
        return f"CPU, {memory}, processes: {devices.per_node}"
    nodes = f"{devices.nodes} nodes of " if devices.nodes > 1 else ""
    return f"{nodes}{devices.per_node} x {devices.name}, {memory} each, {gigabytes(devices.usable_bytes or 0)} of them usable"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for n, column in enumerate(columns):
        table.add_column(column, justify="right" if n else "left", no_wrap=True)
    return table


def _parts(plan: RunPlan) -> dict[str, tuple[int, Memory]]:
    """Parameters and memory by process of each part that is planned."""
    found: dict[str, tuple[int, Memory]] = {}
    if plan.teacher is not None:
        found["Teacher"] = plan.teacher.parameters, plan.teacher.plan.memory
    for name, part in (("Tuning", plan.tuning), ("Student", plan.student)):
        if part is not None:
            found[name] = part.parameters, part.plan.memory
    return found


def _components(plan: RunPlan) -> Table | None:
    parts = _parts(plan)
    if not parts:
        return None
    table = _table("Bytes a process", *parts)
    table.add_row("Parameters", *(count(parameters) for parameters, _ in parts.values()))
    for each in fields(Memory):
        sizes = [getattr(memory, each.name) for _, memory in parts.values()]
        if any(sizes):
            table.add_row(_NAMES[each.name], *(gigabytes(size) if size else MISSING for size in sizes))
    if plan.devices.on_gpu and plan.devices.memory_bytes and plan.devices.usable_bytes:
        outside = outside_bytes(plan.devices.processes)
        margin = plan.devices.memory_bytes - plan.devices.usable_bytes - outside
        table.add_row("CUDA context, NCCL", *[gigabytes(outside)] * len(parts))
        table.add_row("Fragmentation margin", *[gigabytes(margin)] * len(parts))
    table.add_row(
        "In all, at the fullest", *(gigabytes(memory.total + _outside(plan)) if memory.total else MISSING for _, memory in parts.values())
    )
    return table


def _outside(plan: RunPlan) -> int:
    devices = plan.devices
    return devices.memory_bytes - devices.usable_bytes if devices.on_gpu and devices.memory_bytes and devices.usable_bytes else 0


def _choices(plan: RunPlan) -> Table | None:
    """The teacher at every precision, and trainings under every ZeRO stage."""
    table = _table("Otherwise", "", "", "", "", "")
    if plan.teacher is not None:
        table.add_row(f"Teacher, {FEWEST_SLOTS} requests", *plan.teacher.whole_bytes)
        table.add_row("  a whole copy", *map(gigabytes, plan.teacher.whole_bytes.values()))
        if plan.teacher.gpus:
            table.add_row("  fewest of these GPUs", *map(_number, plan.teacher.gpus.values()))
    for name, part in (("Tuning", plan.tuning), ("Student", plan.student)):
        if part is not None:
            table.add_row(f"{name}, {part.plan.step.processes} process{'es' if part.plan.step.processes > 1 else ''}", *part.layout_bytes)
            table.add_row("  a process", *map(gigabytes, part.layout_bytes.values()))
    return table if table.row_count else None


def _number(value: int | None, *, nodes: bool = False) -> str:
    if value is None:
        return MISSING
    return f"{value:,} ({value // GPUS_A_NODE} nodes)" if nodes and value > GPUS_A_NODE else f"{value:,}"


def _gpus(plan: RunPlan) -> Table | None:
    if not any(row.teacher or row.student for row in plan.gpus):
        return None
    table = _table("Fewest GPUs", "Teacher", "Student", "with")
    table.columns[-1].justify = "left"
    table.columns[-1].no_wrap = False
    for row in plan.gpus:
        changes = " ".join(change.removeprefix("student.") for change in row.changes)
        table.add_row(
            row.name + ("" if row.has_bf16 else " (no bf16)"), _number(row.teacher, nodes=True), _number(row.student, nodes=True), changes
        )
    return table


# ----- in words -----


def _estimates(plan: RunPlan) -> list[str]:
    outlook = plan.outlook
    if outlook is None:
        return []
    assumed = ", assumed (--rows)" if outlook.assumed_rows else ""
    parts = [_time("writing", outlook.writing_hours), _time("training", outlook.training_hours)]
    if outlook.record_bytes is not None:
        parts.append(f"records {gigabytes(outlook.record_bytes)}")
    told = ", ".join(part for part in parts if part)
    return [f"At most, {outlook.rows:,} rows{assumed}, each as long as the configuration allows: {told}."] if told else []


def _time(what: str, hours: float | None) -> str:
    if hours is None:
        return ""
    return f"{what} {hours:,.1f} h" if hours >= 1 else f"{what} {max(1.0, hours * 60):,.0f} min"


def sentence(plan: RunPlan) -> str:
    """The answer."""
    parts = [*_teacher_words(plan), *_training_words("tuning", plan.tuning, plan), *_training_words("student", plan.student, plan)]
    if not parts:
        return "Nothing here needs a device of its own." if not plan.remarks else ""
    place = plan.devices.name if not plan.devices.on_gpu else f"{plan.devices.processes} x {plan.devices.name}"
    return f"On {place} {'; '.join(parts)}."


def _remarks(plan: RunPlan) -> str:
    return "".join(f" {remark[0].upper()}{remark[1:]}." for remark in plan.remarks)


def _teacher_words(plan: RunPlan) -> Iterable[str]:
    part = plan.teacher
    if part is None:
        return
    if not part.plan.fits:
        yield f"the teacher does not fit: {part.plan.why}"
        return
    if not plan.devices.on_gpu:
        yield f"the teacher fits: {part.plan.why}"
        return
    how = {"replica": "as a copy on each", "tensor": f"split over {part.plan.tensor_degree}", "zero3": "sharded by ZeRO-3 over all"}
    yield f"the teacher fits {how[part.plan.sharding]} and writes {part.plan.slots} answers at once ({part.plan.why})"


def _training_words(name: str, part: TrainingPart | None, plan: RunPlan) -> Iterable[str]:
    if part is None:
        return
    step, usable = part.plan.step, plan.devices.usable_bytes
    room = f" of {gigabytes(usable)}" if usable is not None else ""
    if not part.plan.fits:
        yield f"the {name} does not fit: {gigabytes(part.plan.memory.total)}{room} with nothing left to change"
        return
    forwards = f"{step.forwards} forward{'s' if step.forwards > 1 else ''} of {step.tokens:,} tokens a step"
    change = f" with {' '.join(part.plan.changes)}" if part.plan.changes else ""
    if name == "tuning":
        change = change.replace("student.", "teacher.tune.")
    yield f"the {name} trains under ZeRO-{step.zero_stage}{change}, {forwards}, in {gigabytes(part.plan.memory.total)}{room}"
