"""A teacher that writes now: what answers, what scores, and how it lies on the devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from data.config import Metric, SoftLabelsConfig
from data.examples import TaskExample
from data.prompts import Encode, TextFormat
from data.records import TeacherRecord
from train.config import TeacherConfig
from train.engine import InferenceModel, place_for_inference
from train.models import load_model
from train.teacher.alignment import soft_labels, vocabulary_of
from train.teacher.answers import Answering, Attach
from train.teacher.claims import Chunk, claimed
from train.teacher.endpoint import EndpointWriter, LogProbs
from train.teacher.fusing import fuse
from train.teacher.generate import open_writer
from train.teacher.labelling import Labelling
from train.teacher.opening import Local, Served
from train.teacher.prompter import server_request
from train.teacher.rounds import Answered, in_step, streamed
from train.teacher.score import Scorer, auto_batch_tokens
from train.teacher.vllm import VllmWriter
from train.teacher.writing import Sampling, Writer, Written
from train.tokenization import encoder, text_format
from train.world import World


@dataclass(frozen=True, slots=True)
class Layout:
    """How a teacher lies on the devices; `auto` is resolved."""

    sharding: Literal["replica", "tensor", "zero3"] = "replica"
    tensor_degree: int | None = None
    """Processes that hold one copy between them (tensor); all of a node where None."""
    offload: bool = False
    """The shares stay in the host's memory (zero3)."""


@dataclass(frozen=True, slots=True)
class Live:
    """A teacher that answers and, where it runs here, scores."""

    answering: Answering | None
    """None where the main process alone asks a server or an engine, and this is another."""
    teacher: InferenceModel | None
    """None where it is a server, or an engine of its own."""
    labelling: Labelling | None
    """Soft labels by forwards; None where there are none, or they come with the answers."""

    @property
    def keeps(self) -> bool:
        """This process writes what its group has answered."""
        return self.teacher is None or self.teacher.is_writer

    def answers(self, chunks: Sequence[Chunk], world: World) -> Iterator[Answered]:
        """Those of the chunks that this process takes, with their records; every process must call it."""
        taken = claimed(chunks, world, self.teacher)
        if self.answering is None:
            return iter(())
        if self.teacher is not None and self.teacher.in_step:
            return in_step(self.answering, taken, self.teacher)
        return streamed(self.answering, taken)

    def close(self) -> None:
        """Gives back what the writer holds of a GPU's memory: the next stage runs in the same process."""
        close = getattr(self.answering.writer, "close", None) if self.answering is not None else None
        if close is not None:
            close()


def open_live(
    config: TeacherConfig, prompts: Local | Served, layout: Layout, metric: Metric, tuned: Path | None, world: World, *, seed: int
) -> Live:
    """Loads the teacher and places it; every process must call it.

    Args:
        config: the teacher.
        prompts: from `open_prompts`.
        layout: on the devices.
        metric: how labels are judged.
        tuned: the folder of the tuned checkpoint, or None.
        world: the processes.
        seed: of the draws.
    """
    writer: Writer | None = None
    teacher, labelling, attach = None, None, None
    if config.source != "deepspeed":
        if world.is_main:
            writer, attach = _served(config, prompts) if isinstance(prompts, Served) else (_vllm(config, prompts, world), None)
    else:
        assert isinstance(prompts, Local)
        teacher = _placed(config, prompts, layout, tuned, world)
        writer = open_writer(
            teacher,
            prompts.tokenizer,
            prompts.form,
            prompts.prompter,
            max_new_tokens=config.rationales.max_new_tokens,
            sampling=_sampling(config),
            batch_size=config.batch_size,
        )
        if config.soft_labels is not None and config.soft_labels.format != "answers":
            labelling = _labelling(config.soft_labels, teacher, prompts, seed)
    drawn = config.soft_labels is not None and config.soft_labels.format == "answers"
    answering = Answering(config.rationales, metric, writer, seed, drawn, attach) if writer is not None else None
    return Live(answering, teacher, labelling)


def _sampling(config: TeacherConfig) -> Sampling:
    return Sampling(config.rationales.sampling_temperature, config.rationales.top_p)


def _placed(config: TeacherConfig, prompts: Local, layout: Layout, tuned: Path | None, world: World) -> InferenceModel:
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    source = config.model if tuned is None else str(tuned / "model")
    assert source is not None, "the configuration refuses a live teacher without a model"
    model = load_model(source, prompts.tokenizer, seed=0, dtype=dtype, key="teacher.model")
    placed = place_for_inference(model, world, layout.sharding, degree=layout.tensor_degree, offload=layout.offload)
    if world.device.type == "cuda":
        fuse(placed.model)
    return placed


def _labelling(config: SoftLabelsConfig, teacher: InferenceModel, prompts: Local, seed: int) -> Labelling:
    scorer = Scorer(teacher, prompts.form, config, vocabulary=len(prompts.tokenizer), batch_tokens=auto_batch_tokens(teacher))
    return Labelling(scorer, prompts.prompter, prompts.form, encoder(prompts.tokenizer), config, seed)


def _vllm(config: TeacherConfig, prompts: Local, world: World) -> Writer:
    return VllmWriter(
        str(config.model),
        prompts.prompter.request,
        sampling=_sampling(config),
        max_input_tokens=prompts.form.max_input_tokens,
        max_new_tokens=config.rationales.max_new_tokens,
        num_gpus=max(1, min(world.size, torch.cuda.device_count())),
        stop=prompts.prompter.stop,
        stop_ids=prompts.prompter.stop_ids,
    )


def _served(config: TeacherConfig, prompts: Served) -> tuple[Writer, Attach | None]:
    server, soft = config.endpoint, config.soft_labels
    assert server is not None
    attach, log_probs = None, None
    if prompts.tokenizer is not None:
        assert soft is not None
        length = config.rationales.max_new_tokens
        form = text_format(prompts.tokenizer, "decoder_only", max_input_tokens=length, max_label_tokens=length, max_rationale_tokens=length)
        log_probs = LogProbs(soft.k, vocabulary_of(prompts.tokenizer))
        attach = partial(_server_labels, soft=soft, form=form, encode=encoder(prompts.tokenizer))
    writer = EndpointWriter(
        server,
        str(config.model),
        partial(server_request, prompts.prompt, server.api),
        sampling=_sampling(config),
        max_new_tokens=config.rationales.max_new_tokens,
        stop=prompts.prompt.stop,
        log_probs=log_probs,
    )
    return writer, attach


def _server_labels(
    example: TaskExample, record: TeacherRecord, written: Written, *, soft: SoftLabelsConfig, form: TextFormat, encode: Encode
) -> TeacherRecord:
    said = record.label if record.label == example.label else None
    rationale, label = soft_labels(written.tokens, record.rationale, said, form, encode, soft.k)
    return replace(
        record,
        rationale_soft=rationale if soft.on in ("rationale", "both") else None,
        label_soft=label if soft.on in ("label", "both") else None,
    )
