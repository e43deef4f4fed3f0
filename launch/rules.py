"""`stepdown plan --rule`: one model as public estimators count it. Imports no torch."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from launch.estimators import RULES, Rule, Size, estimates
from launch.hardware import GPUS
from launch.report_html import count
from train.gpus import gpu_named

_SHOWN = ("A100-40GB", "A100-80GB", "H200-141GB", "L4")
_COUNTED: dict[Rule, str] = {
    "simple": "Weights alone; gigabytes of 10^9 bytes. Activations, caches and the GPU's own overhead come on top.",
    "accelerate": "As `accelerate estimate-memory` counts: for training the largest of weights, gradients and an optimizer's step, which "
    "are not added up; the last line adds them up: DeepSpeed's 18 bytes a parameter. GiB over the GPU's nominal gigabytes. Activations "
    "come on top.",
    "deepspeed": "As DeepSpeed's estimators count, without offload: weights, gradients and AdamW's states; GiB over the GPU's nominal "
    "gigabytes. Activations and buffers come on top.",
}


def rule_of(name: str) -> Rule:
    """The rule of a name.

    Raises:
        ValueError: if there is none.
    """
    for rule in RULES:
        if rule == name:
            return rule
    raise ValueError(f"--rule is {name}: give {', '.join(RULES[:-1])} or {RULES[-1]}")


def render_estimates(name: str, size: Size, rule: Rule, console: Console, *, gpu: str | None, as_json: bool) -> None:
    """Prints what a public estimator says of a model, and how many GPUs of the table that is."""
    gpus = [gpu_named(gpu)] if gpu is not None else [gpu for gpu in GPUS if gpu.name in _SHOWN]
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
