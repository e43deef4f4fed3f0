"""The teacher's stage: every training and test example becomes one record in the store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from data.config import Metric
from data.examples import TaskExample
from data.prompts import TextFormat, few_shot_text, parse_solution
from data.records import TeacherRecord
from data.store import CHUNK, MANIFEST, check_complete, manifest, missing_chunks, read_records, shard_path, write_shard
from data.tasks import Task
from train.artifacts import Records, write_json
from train.config import TeacherConfig
from train.engine import InferenceModel, World, place_for_inference
from train.models import family_of, load_folder, load_model
from train.progress import StageProgress
from train.teacher.generate import batches_by_length, generate
from train.teacher.recorded import record_of, records
from train.teacher.score import Solution, score
from train.tokenization import decode, encoder, load_tokenizer, text_format

SPLITS = ("train", "test")


@dataclass(frozen=True, slots=True)
class TeacherInputs:
    """What the teacher answers, and how answers are judged."""

    task: Task
    metric: Metric
    choices_field: str | None
    tuned: Path | None
    """Folder of the tuned checkpoint (`model/` inside), or None."""
    sharding: Literal["replica", "tensor", "zero3"]


def run(config: TeacherConfig, inputs: TeacherInputs, folder: Path, world: World, *, seed: int) -> Records:
    """Writes the records that are missing, then the manifest.

    Killed and called again, also with another number of processes, it writes only the chunks that are not there.

    Args:
        config: the teacher.
        inputs: the task, and where the tuned teacher lies.
        folder: of the record store.
        world: the processes.
        seed: of a model with random weights.
    """
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    sharding, degree = "recorded", 1
    if config.source == "recorded":
        if world.is_main:
            _write_recorded(config, inputs, folder)
    elif any(missing_chunks(folder, split, len(getattr(inputs.task, split))) for split in SPLITS):
        writer = _open_teacher(config, inputs, folder, world, seed)
        sharding, degree = writer.teacher.sharding, world.size if writer.teacher.sharding == "tensor" else 1
        for split in SPLITS:
            _write_live(writer, getattr(inputs.task, split), split, folder, world)
    world.barrier()
    return _finish(inputs.task, folder, world, sharding, degree, time.monotonic() - started)


def _write_recorded(config: TeacherConfig, inputs: TeacherInputs, folder: Path) -> None:
    for split in SPLITS:
        examples: list[TaskExample] = getattr(inputs.task, split)
        for chunk in missing_chunks(folder, split, len(examples)):
            part = examples[chunk * CHUNK : (chunk + 1) * CHUNK]
            write_shard(shard_path(folder, split, chunk), records(config, part, split, inputs.metric, inputs.choices_field))


@dataclass(frozen=True, slots=True)
class _Writer:
    """A live teacher with all it needs to answer a chunk."""

    config: TeacherConfig
    teacher: InferenceModel
    tokenizer: PreTrainedTokenizerBase
    form: TextFormat
    metric: Metric

    def answer(self, examples: Sequence[TaskExample], split: str) -> list[TeacherRecord]:
        """Greedy answers, each with its label judged."""
        encode = encoder(self.tokenizer)
        prompts = [self.form.prompt_ids("solve", example.input, encode)[0] for example in examples]
        found: dict[int, TeacherRecord] = {}
        for positions in self._batches(prompts):
            outputs = generate(self.teacher, self.form, [prompts[n] for n in positions], self.config.rationales.max_new_tokens)
            for n, ids in zip(positions, outputs, strict=True):
                text = decode(self.tokenizer, ids)
                rationale, label = parse_solution(text)
                found[n] = record_of(
                    examples[n], split, self.metric, text=text, rationale=rationale, label=label, generated_tokens=len(ids)
                )
        return [found[n] for n in range(len(examples))]

    def add_soft_labels(self, examples: Sequence[TaskExample], answered: Sequence[TeacherRecord]) -> list[TeacherRecord]:
        """The same records with the teacher's distributions at the tokens of its rationale and of the gold label."""
        soft = self.config.soft_labels
        assert soft is not None
        encode = encoder(self.tokenizer)
        solutions = [
            Solution(self.form.prompt_ids("solve", e.input, encode)[0], *self.form.solution_ids(r.rationale, e.label, encode))
            for e, r in zip(examples, answered, strict=True)
        ]
        scored = list(answered)
        for positions in self._batches([s.prompt_ids + s.rationale_ids for s in solutions]):
            for n, (rationale, label) in zip(
                positions, score(self.teacher, self.form, [solutions[n] for n in positions], soft.k), strict=True
            ):
                scored[n] = replace(
                    answered[n],
                    label_soft=label if soft.on in ("label", "both") else None,
                    rationale_soft=rationale if soft.on in ("rationale", "both") else None,
                )
        return scored

    def _batches(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        batches = list(batches_by_length(prompts, self.config.batch_size))
        # In step, a short last chunk makes as many forwards as a full one: it answers its first prompt again.
        return batches + [batches[0][:1]] * (-(-CHUNK // self.config.batch_size) - len(batches)) if self.teacher.in_step else batches


def _open_teacher(config: TeacherConfig, inputs: TeacherInputs, folder: Path, world: World, seed: int) -> _Writer:
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    if inputs.tuned is not None:
        model, tokenizer, form = load_folder(inputs.tuned / "model", dtype=dtype)
    else:
        assert config.model is not None
        tokenizer = load_tokenizer(config.model, texts=None, folder=None, key="teacher.model")
        model = load_model(config.model, tokenizer, seed=seed, dtype=dtype, key="teacher.model")
        shots = config.rationales.examples
        form = text_format(
            tokenizer,
            family_of(model),
            max_input_tokens=config.rationales.max_input_tokens,
            max_label_tokens=config.rationales.max_new_tokens,
            max_rationale_tokens=config.rationales.max_new_tokens,
            few_shot=few_shot_text(Path(shots), config.rationales.shots) if shots else "",
        )
    return _Writer(config, place_for_inference(model, world, inputs.sharding), tokenizer, form, inputs.metric)


def _write_live(writer: _Writer, examples: Sequence[TaskExample], split: str, folder: Path, world: World) -> None:
    world.barrier()  # all processes must see the same chunks missing
    missing = missing_chunks(folder, split, len(examples))
    world.barrier()
    group, groups = writer.teacher.group_rank, writer.teacher.num_groups
    with StageProgress(f"teach ({split})", len(missing), "chunks", enabled=world.is_main) as progress:
        for turn in range(0, len(missing), groups):
            mine = turn + group < len(missing)
            # Where all must step together, a process without a chunk repeats one and throws the result away.
            if mine or writer.teacher.in_step:
                chunk = missing[turn + group if mine else turn]
                part = examples[chunk * CHUNK : (chunk + 1) * CHUNK]
                answered = writer.answer(part, split)
                if split == "train" and writer.config.soft_labels is not None:
                    answered = writer.add_soft_labels(part, answered)
                if mine and writer.teacher.is_writer:
                    write_shard(shard_path(folder, split, chunk), answered)
            progress.advance(min(groups, len(missing) - turn))


def _finish(task: Task, folder: Path, world: World, sharding: str, degree: int, seconds: float) -> Records:
    found = {split: read_records(folder, split) for split in SPLITS}
    for split, records_ in found.items():
        check_complete(records_, [e.id for e in getattr(task, split)], folder)
    if world.is_main:
        write_json(folder / MANIFEST, manifest(folder))
    return Records(
        rows={split: len(r) for split, r in found.items()},
        parseable={split: sum(x.parseable for x in r) for split, r in found.items()},
        agreeing={split: sum(x.agrees for x in r) for split, r in found.items()},
        generated_tokens=sum(x.generated_tokens for r in found.values() for x in r),
        record_bytes=sum(p.stat().st_size for p in folder.glob("*.parquet")),
        soft_label_tokens=sum(len(s) for r in found.values() for x in r for s in (x.label_soft, x.rationale_soft) if s is not None),
        sharding=sharding,
        tensor_degree=degree,
        processes=world.size,
        seconds=seconds,
    )
