"""The model card of a file to ship: what it is, how it was made, what it is worth, and how to run it. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from data.prompts import TextFormat
from launch import report_html as words
from launch.ladder import Report, Rung
from launch.report_html import Table, markdown_table
from train.artifacts import DeployedModel
from train.deploy.targets import RECOVERED, TARGETS

CARD = "README.md"
_UNSTATED = "other"
_OURS = """```python
from pathlib import Path
from train.runtimes import answers, open_runtime

runtime = open_runtime("{runtime}", Path("."))
print(answers(runtime, ["..."], runtime.format.part, batch_size=1, max_new_tokens=runtime.format.max_answer_tokens))
```"""


def write_card(report: Report, rung: Rung, folder: Path) -> Path:
    """Writes the card into a deployed model's folder, and gives its place.

    Args:
        report: of the run.
        rung: the file's own.
        folder: holds the model's files.
    """
    path = folder / CARD
    path.write_text(card(report, rung, TextFormat.load(folder)), encoding="utf-8")
    return path


def card(report: Report, rung: Rung, form: TextFormat) -> str:
    """The card in Markdown, behind the front matter that model hubs read."""
    made, config = report.deployed[rung.name], report.config
    licence = config.get("deploy", {}).get("license") or _UNSTATED
    front = {"license": licence, "base_model": _named(config["student"]["model"]), "tags": ["stepdown", "distillation", made.runtime]}
    return "\n\n".join(
        [
            f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}\n---",
            f"# {report.name}: {rung.name}",
            f"Made by Stepdown on {report.provenance.get('started', 'an unknown day')}: {_made_of(config)}",
            "## What it is worth",
            _worth(report, rung),
            "## The file",
            _file(made, is_recovered=rung.name.endswith(RECOVERED)),
            "## How to run it",
            f"It is asked `{form.prompt(form.part, 'INPUT')!r}`, greedily, for at most {form.max_answer_tokens} tokens.",
            _RUN[TARGETS[made.target].format](made),
            "## Licence",
            _licence(licence, config),
            "",
        ]
    )


def _made_of(config: dict[str, Any]) -> str:
    teacher, student = config["teacher"], config["student"]
    who = _named(teacher["model"]) if teacher.get("model") else "records that a teacher had written"
    pruned = student.get("prune")
    lost = f", pruned ({pruned.get('method', 'neuron')} {pruned.get('pattern') or pruned.get('fraction')})" if pruned else ""
    return (
        f"a student ({_named(student['model'])}) that learnt the task {config['name']} (rows: {config['task'].get('train', 'given')}) from "
        f"{who}{lost}."
    )


def _worth(report: Report, rung: Rung) -> str:
    shown = [other for other in report.rungs if other.name == rung.name or other.name not in report.deployed]
    rows = [[other.name, words.percent(other.accuracy), words.percent_range(other.interval)] for other in shown]
    tests = [f"Against {test.against}: {test.verdict}." for test in (rung.student, rung.same_engine) if test]
    table = "\n".join(markdown_table(Table(["Rung", "Accuracy", "95 % interval"], rows)))
    items = f"{rung.measured.num_items:,} test items, scored once by metric {report.config['task'].get('metric', 'text')}."
    return "\n\n".join([items, table, *tests])


def _file(made: DeployedModel, *, is_recovered: bool) -> str:
    lines = [
        f"{words.num_bytes(made.weight_bytes)} of weights, {words.percent(made.weight_bytes / made.source_weight_bytes)} of the fp32 file; "
        f"{made.num_parameters:,} parameters{f', {made.num_tokens:,} tokens' if made.num_tokens else ''}."
    ]
    if made.bits_a_parameter is not None and made.bits_a_weight is not None:
        types = ", ".join(f"{count} tensors {kind}" for kind, count in made.types.items())
        bits = f"{made.bits_a_parameter:.2f} bits a parameter, {made.bits_a_weight:.2f} a weight of the layers' matrices"
        lines.append(f"Read from the file: {bits} ({types}).")
    if made.fallbacks:
        lines.append(f"Stored as another type than the name says: {', '.join(made.fallbacks)}.")
    compared = "the model that was trained through the rounding" if is_recovered else "the fp32 model"
    if is_recovered:
        lines.append("Its weights were trained through the rounding of this file (`deploy.recover`).")
    if made.error_nats is not None:
        lines.append(f"Log-probabilities are {made.error_nats:.3f} nats a token from those of {compared}, on average, on training rows.")
    return "\n\n".join(lines)


def _licence(licence: str, config: dict[str, Any]) -> str:
    said = f"`{licence}`, as the configuration says." if licence != _UNSTATED else "Not stated: set `deploy.license` to an SPDX id."
    teacher = config["teacher"].get("model")
    others = [f"the student's base model, {_named(config['student']['model'])}"]
    others += [f"the teacher, {_named(teacher)}, whose texts it learnt"] if teacher else ["whoever wrote the teacher's records"]
    return f"{said} The licences of {' and of '.join(others)}, may bind it, too."


def _named(source: Any) -> str:
    if isinstance(source, str):
        return source
    if "cut_from" in source:
        return "a part of its teacher"
    return f"{source.get('from_scratch', 'a model')} from scratch"


def _ours(made: DeployedModel) -> str:
    return f"With Stepdown, which needs neither torch nor transformers for it:\n\n{_OURS.format(runtime=made.runtime)}"


def _gguf(made: DeployedModel) -> str:
    other = "" if made.cuts_as_trained else "Their own tokenizer cuts texts otherwise than the student learnt: give token ids.\n\n"
    return (
        f'{other}```\nollama create my-model -f Modelfile && ollama run my-model "INPUT"\nllama-server -m model.gguf\n```\n\n{_ours(made)}'
    )


def _compressed(made: DeployedModel) -> str:
    low = TARGETS[made.target].bits < 4
    served = "vLLM has no kernels for so few bits: transformers only." if low else "```\nvllm serve .\n```"
    if made.family == "encoder_decoder":
        served = "vLLM serves decoder-only models: transformers only."
    kind = "AutoModelForCausalLM" if made.family == "decoder_only" else "AutoModelForSeq2SeqLM"
    loaded = f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained(".")  # needs compressed-tensors; weights become floats'
    return f"{served}\n\n```python\n{loaded}\n```"


_RUN: dict[str, Callable[[DeployedModel], str]] = {"ctranslate2": _ours, "gguf": _gguf, "onnx": _ours, "compressed_tensors": _compressed}
