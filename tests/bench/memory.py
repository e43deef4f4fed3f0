"""How much memory each process takes of its GPU: training under every layout, and a teacher that decodes and scores.

torchrun --nproc-per-node 2 tests/bench/memory.py OUT.json                       all cases of two GPUs
torchrun --nproc-per-node 1 tests/bench/memory.py OUT.json                       all cases of one GPU
torchrun --nproc-per-node 2 tests/bench/memory.py OUT.json --cases 'zero1; zero3'   some of them
torchrun --nproc-per-node 2 tests/bench/memory.py OUT.json --tiny                a few seconds on a CPU: does it run
python tests/bench/memory.py tests/bench/memory.json --merge OUT.json ...        what the tests and the README hold predictions against

The product's own code trains (`train.trainer.train`), decodes (`LoopWriter`) and scores (`Scorer`) models of random weights: a student of
Llama-3.2-1B's shape, a teacher of Llama-3.1-8B's. All sequences of a case have one length, so that every forward takes as many tokens as
it says. Bytes are torch's: `peak` the most allocated in any phase, `reserved` the most that it took from the driver, `outside` what the
driver counts besides: CUDA context, libraries, NCCL. A phase is the time since the one before it; its figure is the most allocated in it.
`stepdown plan` is held against these figures.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed
from transformers import LlamaConfig, LlamaForCausalLM

from data.config import SoftLabelsConfig
from data.examples import TaskExample
from data.prompts import TextFormat
from data.rows import TrainRow, TrainSequence
from data.soft_labels import TopK
from train import trainer
from train.config import LossConfig, TrackingConfig, TrainingConfig
from train.engine import InferenceModel, TrainEngine, place_for_inference, start, stop
from train.keepers import InMemory
from train.learner import LiveTeacher
from train.lora import attach_lora
from train.pruning.gradual import MaskSchedule
from train.teacher.decode import LoopWriter
from train.teacher.fusing import fuse
from train.teacher.generate import Decoding, PlainWriter, open_writer
from train.teacher.score import Scorer, Solution, auto_batch_tokens
from train.teacher.slots import Slots
from train.teacher.target_logits import TargetLogits
from train.teacher.writing import Request, Sampling, Writer
from train.tokenization import text_format, train_tokenizer
from train.tracking import Tracker
from train.world import World


@dataclass(frozen=True)
class Shape:
    """Of a Llama."""

    width: int
    layers: int
    heads: int
    key_value_heads: int
    neurons: int
    vocabulary: int
    tied: bool


STUDENT = Shape(2048, 16, 32, 8, 8192, 128256, True)
TEACHER = Shape(4096, 32, 32, 8, 14336, 128256, False)
TINY = Shape(64, 2, 4, 2, 128, 512, True)
FORM = TextFormat("decoder_only", eos_id=1, pad_id=0, max_input_tokens=256, max_label_tokens=16, max_rationale_tokens=128)
STEPS = 4
LORA = {"rank": 16, "alpha": 32.0}


@dataclass(frozen=True)
class Training:
    """A training as it is configured; each row is a label and a rationale of the longest that FORM allows."""

    config: dict[str, Any]
    forwards: int = 2
    """Micro-batches of a step."""
    soft: str = ""
    """top_k: 32 ids at every target token; live: a teacher of the student's shape."""
    masked: bool = False
    """Half of each layer's matrices is pruned before the first step."""


@dataclass(frozen=True)
class Decode:
    """A chunk of prompts, decoded together."""

    sharding: str
    batch: int
    prompt: int = 512
    new: int = 64


@dataclass(frozen=True)
class Score:
    """Sequences scored at half of their tokens."""

    sharding: str
    format: str = "top_k"
    sequences: int = 64
    length: int = 512


def training(**settings: Any) -> dict[str, Any]:
    return {"zero_stage": 0, "micro_batch_tokens": 16384, "compile": "off", "precision": "bf16", **settings}


Work = Training | Decode | Score
TWO: dict[str, Work] = {
    "zero0": Training(training()),
    "zero1": Training(training(zero_stage=1)),
    "zero2": Training(training(zero_stage=2)),
    "zero3": Training(training(zero_stage=3)),
    "zero1, 4096 tokens": Training(training(zero_stage=1, micro_batch_tokens=4096)),
    "zero0, LoRA": Training(training(lora=LORA)),
    "zero1, checkpointing": Training(training(zero_stage=1, activation_checkpointing=True)),
    "zero3, checkpointing": Training(training(zero_stage=3, activation_checkpointing=True)),
    "zero2, offloaded": Training(training(zero_stage=2, offload_optimizer=True, activation_checkpointing=True)),
    "zero1, masked": Training(training(zero_stage=1, micro_batch_tokens=4096), masked=True),
    "zero0, graphs": Training(training(compile="graphs")),
    "zero1, layers": Training(training(zero_stage=1, compile="layers")),
    "decode tensor, 64": Decode("tensor", 64),
    "decode tensor, 256": Decode("tensor", 256),
    "score tensor": Score("tensor"),
    "decode zero3, 64": Decode("zero3", 64, new=8),
    "score zero3": Score("zero3"),
}
ONE: dict[str, Work] = {
    "alone": Training(training(), forwards=1),
    "alone, 2 forwards": Training(training()),
    "alone, 4096 tokens": Training(training(micro_batch_tokens=4096), forwards=1),
    "alone, fp32, 4096 tokens": Training(training(micro_batch_tokens=4096, precision="fp32"), forwards=1),
    "alone, checkpointing": Training(training(activation_checkpointing=True), forwards=1),
    "alone, LoRA, checkpointing": Training(training(activation_checkpointing=True, lora=LORA), forwards=1),
    "alone, top_k": Training(training(micro_batch_tokens=4096), forwards=1, soft="top_k"),
    "alone, live": Training(training(micro_batch_tokens=4096), forwards=1, soft="live"),
    "alone, masked": Training(training(micro_batch_tokens=4096), forwards=1, masked=True),
    "alone, layers": Training(training(compile="layers"), forwards=1),
    "alone, graphs": Training(training(compile="graphs"), forwards=1),
    "alone, graphs, 2 forwards": Training(training(compile="graphs")),
    "decode, 64": Decode("replica", 64),
    "decode, 256": Decode("replica", 256),
    "score": Score("replica"),
    "score, sampled": Score("replica", "sampled"),
}


@dataclass
class Memory:
    """What a case takes on this process's device."""

    before_bytes: int = 0
    """Allocated before the case; what is left of the one before it."""
    peak_bytes: int = 0
    reserved_bytes: int = 0
    outside_bytes: int = 0
    """Of the device's memory in use, what torch did not reserve; right where no other process uses the device."""
    phases: dict[str, int] = field(default_factory=dict)
    """The most allocated in each kind of phase."""
    now: dict[str, int] = field(default_factory=dict)
    """What was allocated at the last end of each."""
    seen: dict[str, int] = field(default_factory=dict)
    """Sizes of what was computed: tokens, target tokens and soft labels of the largest forward."""

    def begin(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before_bytes = torch.cuda.memory_allocated()

    def note(self, phase: str) -> None:
        """A phase ends."""
        if not torch.cuda.is_available():
            self.phases[phase] = self.now[phase] = 0
            return
        peak = torch.cuda.max_memory_allocated()
        self.phases[phase] = max(self.phases.get(phase, 0), peak)
        self.now[phase] = torch.cuda.memory_allocated()
        self.peak_bytes = max(self.peak_bytes, peak)
        self.reserved_bytes = max(self.reserved_bytes, torch.cuda.max_memory_reserved())
        if not torch.cuda.is_current_stream_capturing():
            free, total = torch.cuda.mem_get_info()
            self.outside_bytes = max(self.outside_bytes, total - free - torch.cuda.memory_reserved())
        torch.cuda.reset_peak_memory_stats()

    def count(self, **sizes: int) -> None:
        for name, size in sizes.items():
            self.seen[name] = max(self.seen.get(name, 0), size)

    def noting(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """The function, each call a phase; what came before it is the phase `rest`."""

        def noted(*arguments: Any, **named: Any) -> Any:
            self.note("rest")
            found = function(*arguments, **named)
            self.note(phase)
            return found

        return noted


@contextlib.contextmanager
def replaced(owner: Any, name: str, by: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, before)


def built(shape: Shape, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.neurons,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.tied,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


@dataclass
class Bench:
    world: World
    folder: Path
    tiny: bool
    student: LlamaForCausalLM
    """In fp32 on the CPU; each training takes a copy."""
    left_groups: bool = False
    """A teacher's tensor group has been made, whose buffers NCCL keeps: what is outside of torch's memory is no longer one case's."""

    @property
    def teacher_shape(self) -> Shape:
        return TINY if self.tiny else TEACHER

    @property
    def vocabulary(self) -> int:
        return int(self.student.config.vocab_size)

    def run(self, work: Work, memory: Memory) -> None:
        if isinstance(work, Training):
            train_case(self, work, memory)
        elif isinstance(work, Decode):
            decode_case(self, work, memory)
        else:
            score_case(self, work, memory)


# ----- training -----


def train_case(bench: Bench, case: Training, memory: Memory) -> None:
    """A few steps of the one training loop."""
    world, tokens = bench.world, 800 if bench.tiny else case.config["micro_batch_tokens"]
    batch_size = rows_a_forward(tokens) * case.forwards * world.size
    settings = {**case.config, "micro_batch_tokens": tokens, "batch_size": batch_size, "epochs": 1, "learning_rate": 1e-5}
    if bench.world.device.type == "cpu":
        settings["compile"] = "off"
    config = TrainingConfig.model_validate(settings)
    student = copy.deepcopy(bench.student)
    if config.lora is not None:
        attach_lora(student, config.lora, "student.lora")
    rows = made_rows(batch_size * STEPS, bench.vocabulary, top_k=case.soft == "top_k")
    loss = LossConfig.model_validate({"soft": 0.5, "teacher": "live" if case.soft == "live" else "records"} if case.soft else {})
    masks = None
    if case.masked:
        matrices = [name for name, p in student.named_parameters() if p.dim() == 2 and ".layers." in name]
        masks = MaskSchedule(lambda weights, *_: {n: w > 0 for n, w in weights.items()}, matrices, 0.5, 0, 1)
    run = trainer.TrainingRun(rows, rows[:2], FORM, config, loss, 0, bench.folder, "student", resumable=False, masks=masks)
    live = None
    if case.soft == "live":
        live = LiveTeacher(built(bench_shape(bench), world.device, torch.bfloat16).eval().requires_grad_(False))
    memory.note("loaded")

    def watched(engine: Any) -> None:
        memory.note("wrapped")
        watch(engine, memory)

    train(student, run, world, watched, live)
    memory.note("released")


def rows_a_forward(tokens: int) -> int:
    """Rows of `made_rows` that a forward of so many tokens takes."""
    label, rationale = (FORM.max_input_tokens + n - 1 for n in (FORM.max_label_tokens, FORM.max_rationale_tokens))
    return max(1, tokens // (label + rationale))


def train(
    student: LlamaForCausalLM, run: trainer.TrainingRun, world: World, watched: Callable[[Any], None], live: LiveTeacher | None = None
) -> None:
    """The one training loop, tracked by nobody; its engine is shown to `watched` first."""

    def open_engine(*arguments: Any) -> TrainEngine:
        engine = opened(*arguments)
        watched(engine)
        return engine

    def tracker(step: int) -> Tracker:
        off = TrackingConfig(wandb="disabled")
        return Tracker(run.folder, off, group="bench", job_type="train", settings={}, enabled=False, from_step=step)

    opened = trainer.open_engine  # type: ignore[attr-defined]
    with replaced(trainer, "open_engine", open_engine):
        trainer.train(student, run, world, tracker, InMemory(), live=live)


def bench_shape(bench: Bench) -> Shape:
    return TINY if bench.tiny else STUDENT


def watch(engine: Any, memory: Memory) -> None:
    """Makes each pass of an engine a phase."""
    forward = engine.forward

    def seen(*arguments: Any, matching: bool = False, **batch: Any) -> Any:
        if matching:
            return memory.noting(forward, "validate")(*arguments, matching=True, **batch)
        sizes = {"tokens": batch["input_ids"].numel(), "targets": len(batch["at"]), "soft": len(batch["soft_rows"])}
        memory.count(**sizes, longest=batch["longest"])
        return memory.noting(forward, "forward")(*arguments, **batch)

    engine.forward = seen
    for name in ("backward", "step", "hold", "gather_weights"):
        setattr(engine, name, memory.noting(getattr(engine, name), name))


def made_rows(count: int, vocabulary: int, *, top_k: bool) -> list[TrainRow]:
    draw = random.Random(0)

    def sequence(length: int, *, is_label: bool) -> TrainSequence:
        ids = [draw.randrange(3, vocabulary) for _ in range(FORM.max_input_tokens + length)]
        soft = None
        if top_k:
            flat = np.full((length, 32), -4.0, dtype=np.float32)
            soft = TopK(np.tile(np.arange(32, dtype=np.int32), (length, 1)), flat, flat[:, 0])
        return TrainSequence(ids[: FORM.max_input_tokens], ids[FORM.max_input_tokens :], is_label, soft)

    return [
        TrainRow(f"row-{n}", (sequence(FORM.max_label_tokens, is_label=True), sequence(FORM.max_rationale_tokens, is_label=False)))
        for n in range(count)
    ]


# ----- the teacher -----


@dataclass(frozen=True)
class NoPrompts:
    """The bench makes its requests itself."""

    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def request(self, example: TaskExample, hint: str | None, key: int) -> Request:
        raise AssertionError("not used")


def placed(bench: Bench, sharding: Any, memory: Memory) -> InferenceModel:
    """As the teacher's stage does, but for a model that is built on the device."""
    dtype = torch.bfloat16 if bench.world.device.type == "cuda" else torch.float32
    teacher = place_for_inference(built(bench.teacher_shape, bench.world.device, dtype), bench.world, sharding)
    bench.left_groups |= teacher.group is not None
    if bench.world.device.type == "cuda":
        fuse(teacher.model)
        torch.cuda.empty_cache()
    memory.note("placed")
    memory.peak_bytes = memory.reserved_bytes = 0  # a model comes from the CPU, where it is not whole on the device first
    return teacher


def decode_case(bench: Bench, case: Decode, memory: Memory) -> None:
    teacher = placed(bench, case.sharding, memory)
    prompt, new = (16, 8) if bench.tiny else (case.prompt, case.new)
    tokenizer = train_tokenizer(["one two three"], 300)
    form = text_format(tokenizer, "decoder_only", max_input_tokens=prompt, max_label_tokens=8, max_rationale_tokens=8)
    writer: Writer = open_writer(teacher, tokenizer, form, NoPrompts(), max_new_tokens=new, sampling=Sampling(0.0), batch_size=case.batch)
    # Random weights write any of their ids: the tokenizer's few would be another last step than a real vocabulary's.
    decoding = Decoding(form, tokenizer, (), bench.vocabulary, new, Sampling(0.0), ())
    assert isinstance(writer, LoopWriter | PlainWriter)
    writer.decoding = decoding
    memory.note("tried")
    memory.seen["loop"] = int(isinstance(writer, LoopWriter))
    draw = torch.Generator().manual_seed(teacher.group_rank)
    ids = torch.randint(5, bench.vocabulary, (case.batch, prompt), generator=draw).tolist()
    requests = [Request(key=n, ids=tuple(row)) for n, row in enumerate(ids)]
    with (
        replaced(Slots, "fill", memory.noting(Slots.fill, "prefill")),
        replaced(Slots, "decode", memory.noting(Slots.decode, "decode")),
        torch.no_grad(),
    ):
        list(writer.write([(0, requests)]))
        memory.note("written")


def score_case(bench: Bench, case: Score, memory: Memory) -> None:
    teacher = placed(bench, case.sharding, memory)
    length = 64 if bench.tiny else case.length
    form = TextFormat("decoder_only", eos_id=1, pad_id=0, max_input_tokens=length, max_label_tokens=length, max_rationale_tokens=length)
    soft = SoftLabelsConfig.model_validate({"on": "both", "format": case.format})
    budget = auto_batch_tokens(teacher)
    scorer = Scorer(teacher, form, soft, vocabulary=bench.vocabulary, batch_tokens=budget)
    draw = torch.Generator().manual_seed(teacher.group_rank)
    ids = torch.randint(5, bench.vocabulary, (case.sequences, length), generator=draw).tolist()
    solutions = [Solution(row[: length // 2], row[length // 2 : -1], [], row[-1:]) for row in ids]
    memory.note("tried")
    memory.seen["batch_tokens"] = budget
    forward = TargetLogits.__call__

    def seen(self: TargetLogits, units: Any) -> tuple[Tensor, Tensor]:
        tokens, rows = self.cost(units)
        memory.count(tokens=tokens, rows=rows)
        found: tuple[Tensor, Tensor] = memory.noting(forward, "forward")(self, units)
        return found

    with replaced(TargetLogits, "__call__", seen):
        scorer.tokens(solutions, list(range(case.sequences)))
        memory.note("scored")


# ----- all of them -----


def attempted(bench: Bench, name: str, work: Work) -> dict[str, Any]:
    """A case's row of results; its failure, out of memory for one, is told in it and leaves the others alone."""
    memory, error, begun, left_groups = Memory(), "", time.perf_counter(), bench.left_groups
    memory.begin()
    try:
        bench.run(work, memory)
    except Exception as caught:  # outside of this, where its frames are gone, its tensors are too
        traceback.print_exc()
        error = f"{type(caught).__name__}: {str(caught)[:300]}"
    memory.note("end")
    gc.collect()
    torch._dynamo.reset()
    row = {"case": name, "kind": type(work).__name__.lower(), "settings": asdict(work), "gpus": bench.world.size, "rank": bench.world.rank}
    if bench.world.is_main:
        print(f"{name}: {memory.peak_bytes / 1e9:.2f} GB, {time.perf_counter() - begun:.0f} s {error}", flush=True)
    found = asdict(memory) | ({"outside_bytes": None} if left_groups else {})
    return {**row, **found, "error": error}


def in_turn(names: list[str], measure: Callable[[str], dict[str, Any]], world: World, out: Path) -> list[dict[str, Any]]:
    """The rows of all cases and processes, which the main one writes, its own after each case: the next might end it."""
    rows: list[dict[str, Any]] = []
    for name in names:
        rows.append(measure(name))
        if world.is_main:
            write(rows, world, out)
        world.barrier()
    rows = gathered(rows, world)
    if world.is_main:
        write(rows, world, out)
    return rows


def write(rows: list[dict[str, Any]], world: World, out: Path) -> None:
    out.write_text(json.dumps({"machine": machine(world), "rows": rows}, indent=1))


def gathered(rows: list[dict[str, Any]], world: World) -> list[dict[str, Any]]:
    if world.size == 1:
        return rows
    found: list[Any] = [None] * world.size
    distributed.all_gather_object(found, rows)
    return [row for ranks in zip(*found, strict=True) for row in ranks]


def machine(world: World) -> dict[str, Any]:
    import deepspeed

    cuda = world.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "a CPU",
        "device_bytes": torch.cuda.get_device_properties(world.device).total_memory if cuda else 0,
        "gpus": world.size,
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
        "student": asdict(STUDENT),
        "teacher": asdict(TEACHER),
    }


def merge(out: Path, files: list[Path]) -> None:
    """The first process's figures of each case that went well, without what was allocated before it, one a line; files may be merged."""
    found = [json.loads(file.read_text()) for file in files]
    rows = {}
    for row in (row for each in found for row in each["rows"] if not row.get("rank") and not row.get("error")):
        less = {name: row[name] - row.get("before_bytes", 0) for name in ("peak_bytes", "reserved_bytes")}
        kept = {name: row[name] for name in ("case", "gpus", "kind", "settings", "seen", "outside_bytes")}
        rows[row["case"]] = json.dumps({**kept, **less})
    machine = {name: value for name, value in found[0]["machine"].items() if name != "gpus"}
    out.write_text('{"machine": ' + json.dumps(machine) + ',\n"rows": [\n' + ",\n".join(rows.values()) + "\n]}\n")


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("case", "rank", "peak GB", "reserved", "outside", "before", "phases, GB")
    for row in rows:
        sizes = (f"{(row[name] or 0) / 1e9:.2f}" for name in ("peak_bytes", "reserved_bytes", "outside_bytes", "before_bytes"))
        phases = " ".join(f"{name} {size / 1e9:.2f}" for name, size in row["phases"].items() if name not in ("rest", "end"))
        table.add_row(row["case"], str(row["rank"]), *sizes, row["error"][:60] or phases)
    Console(width=200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", default="", help="names with a semicolon between them; all where left out")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--merge", nargs="+", type=Path, help="files that earlier runs wrote")
    options = parser.parse_args()
    if options.merge:
        merge(options.out, options.merge)
        return
    world = start()
    cases = ONE if world.size == 1 else TWO
    asked = [name.strip() for name in options.cases.split(";")] if options.cases else list(cases)
    with tempfile.TemporaryDirectory() as folder:
        shape = TINY if options.tiny else STUDENT
        student = built(shape, world.device, torch.float32).to("cpu")
        bench = Bench(world, Path(folder), options.tiny, student)
        rows = in_turn(asked, lambda name: attempted(bench, name, cases[name]), world, options.out)
    if world.is_main:
        show(rows)
    stop()


if __name__ == "__main__":
    main()
