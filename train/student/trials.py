"""Many trainings of one student in one process: the model, its compiled layers and the tokenised rows stay, the weights start anew.

Each trial trains, takes the weights that validation chose, and where it is scored answers the test split once. Weights are not kept.
"""

from __future__ import annotations

import copy
import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.config import Metric
from data.examples import TaskExample
from data.prompts import TextFormat, label_of, vocabulary_texts
from data.rows import TrainRow
from train.config import ModelSource, ScratchModel, StudentConfig, TrainingConfig
from train.keepers import InMemory
from train.learner import LiveTeacher, can_pack
from train.lora import attach_lora, merged_weights
from train.models import family_of, load_tokenizer
from train.runtimes import TransformersRuntime, answers
from train.scoring import equal, parse_answer
from train.student.results import Trial, TrialResult
from train.student.stage import StudentInputs, live_teacher, load_student, prepare_rows, student_format
from train.tracking import LOG_FILE, read_log
from train.trainer import OpenTracker, Trained, TrainingRun, train
from train.world import World

_NOT_FINITE = " is not finite at step "
"""In the message of a training that diverged: what the trial's own values did, and would do again."""
_ROW_KEYS = {*StudentConfig.model_fields} - {*TrainingConfig.model_fields} - {"seed", "loss", "baselines"}
_ROW_KEYS |= {"max_input_tokens", "max_label_tokens", "max_rationale_tokens"}
"""Keys of the student that its rows depend on, besides which losses have a weight."""

_WORTH_COMPILING = 300
"""Steps, of all trials together, from which on the quarter of a minute that a compiler takes is won back."""

Compile = Literal["auto", "off", "layers", "graphs"]
Weights = dict[str, Tensor]
Rows = tuple[list[TrainRow], list[TrainRow], Mapping[str, int]]


@dataclass(slots=True)
class _Student:
    """A model that trial after trial starts from."""

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    start: Weights
    """Its first weights, in fp32 on the CPU."""
    answering: PreTrainedModel
    """A copy that training never touches, whose weights are set before it answers."""
    live: LiveTeacher | None = None


class TrialRunner:
    """Runs trials one after another."""

    def __init__(
        self,
        inputs: StudentInputs,
        world: World,
        *,
        seed: int,
        metric: Metric,
        batch_size: int,
        num_trials: int,
        open_tracker: Callable[[Trial, Path], OpenTracker],
    ) -> None:
        """Loads nothing yet.

        Args:
            inputs: what every arm learns from.
            world: the processes that train each trial together; one where every process takes trials of its own.
            seed: the run's, of the rows that a share of the data takes.
            metric: how answers are read and compared.
            batch_size: test items answered at once.
            num_trials: how many will follow, about: whether compiling is worth its time.
            open_tracker: gives what opens the tracker of a trial in its folder.
        """
        self._inputs, self._world, self._seed, self._metric, self._batch_size = inputs, world, seed, metric, batch_size
        self._num_trials, self._open_tracker = num_trials, open_tracker
        self._student: _Student | None = None
        self._rows: dict[str, Rows] = {}

    def run(self, trial: Trial, folder: Path) -> TrialResult:
        """Trains a trial and writes how it went into `folder`. Every process of the world must call it.

        A loss or gradient that is not finite is the trial's result, not an error.

        Raises:
            ValueError: if the arm cannot be trained on these rows.
            RuntimeError: for all that is not the trial's own fault.
        """
        if self._world.is_main:
            # What an interrupted attempt left: its best weights are gone, so that it cannot go on.
            shutil.rmtree(folder, ignore_errors=True)
        self._world.barrier()
        config = StudentConfig.model_validate(trial.student)
        try:
            result = self._learn(trial, config, folder)
        except RuntimeError as error:
            if _NOT_FINITE not in str(error):
                raise
            result = TrialResult(trial, failed=str(error), processes=self._world.size)
        if self._world.is_main:
            result.write(folder)
        self._world.barrier()
        return result

    def _learn(self, trial: Trial, config: StudentConfig, folder: Path) -> TrialResult:
        assert config.seed is not None, "a trial names its seed"
        student = self._fresh(config)
        form = student_format(config, student.tokenizer, family_of(student.model))
        rows, validation, counts = self._prepared(config, student, form)
        run = TrainingRun(
            rows,
            validation,
            form,
            config,
            config.loss,
            config.seed,
            folder,
            str(trial),
            vocabulary=len(student.tokenizer),
            resumable=False,  # what it would go on from, the best weights, are in memory
        )
        run = replace(run, config=config.model_copy(update={"compile": self._compile(config, student, run)}))
        keeper = InMemory()
        trained = train(student.model, run, self._world, self._open_tracker(trial, folder), keeper, live=self._live(config, student))
        written = None
        if trial.scored and self._world.is_main:
            weights = merged_weights(keeper.best, config.lora) if config.lora is not None else keeper.best
            written = self._answers(student, weights, form, config)
        return _result(trial, trained, folder, self._world.size, counts, written)

    def _fresh(self, config: StudentConfig) -> _Student:
        """The student with its first weights."""
        student, self._student = self._student, None
        if student is None or student.source != config.model:
            student = self._loaded(config)
        else:
            start = student.start
            if isinstance(config.model, ScratchModel):
                start = _weights(self._model(config, student.tokenizer))
            _set_weights(student.model, start)
        if self._stays(config):
            self._student = student
        if config.lora is not None:
            assert config.seed is not None
            attach_lora(student.model, config.lora, "student.lora", seed=config.seed)
        return student

    def _stays(self, config: StudentConfig) -> bool:
        """Adapters and sharded weights change the model for good."""
        return config.lora is None and (config.zero_stage == 0 or (config.zero_stage == "auto" and self._world.size == 1))

    def _compile(self, config: StudentConfig, student: _Student, run: TrainingRun) -> Compile:
        """What `auto` comes to where all trials share what is compiled once."""
        on_gpu = self._world.device.type == "cuda"
        if config.compile != "auto" or not on_gpu or not self._stays(config) or run.num_steps * self._num_trials < _WORTH_COMPILING:
            return config.compile
        return "graphs" if can_pack(student.model, run.text_format, "student.model") else "layers"

    def _loaded(self, config: StudentConfig) -> _Student:
        tokenizer = load_tokenizer(config.model, texts=vocabulary_texts(self._inputs.task.train), folder=self._inputs.teacher)
        model = self._model(config, tokenizer)
        return _Student(config.model, tokenizer, model, _weights(model), copy.deepcopy(model))

    def _model(self, config: StudentConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        assert config.seed is not None
        return load_student(config, self._inputs, tokenizer, seed=config.seed)

    def _live(self, config: StudentConfig, student: _Student) -> LiveTeacher | None:
        if not config.loss.soft or config.loss.teacher != "live":
            return None
        student.live = student.live or live_teacher(config, self._inputs, student.tokenizer, self._world)
        return student.live

    def _prepared(self, config: StudentConfig, student: _Student, form: TextFormat) -> Rows:
        values = config.model_dump(mode="json", include=_ROW_KEYS)
        parts = [config.loss.rationale > 0, config.loss.soft > 0, config.loss.teacher]
        key = json.dumps([values, parts], sort_keys=True)
        if key not in self._rows:
            self._rows[key] = prepare_rows(config, config.loss, self._inputs, student.tokenizer, form, seed=self._seed)
        return self._rows[key]

    def _answers(self, student: _Student, weights: Weights, form: TextFormat, config: StudentConfig) -> list[dict[str, Any]]:
        """What these weights answer to the test split, by greedy decoding in the precision of the training."""
        bf16 = config.precision == "bf16" or (config.precision == "auto" and self._world.device.type == "cuda")
        model = student.answering.to(self._world.device)
        # Parameters only, as in training: rotary frequencies and the like stay in fp32.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16 if bf16 else torch.float32)
        _set_weights(model, weights)
        runtime = TransformersRuntime.over(model, student.tokenizer, form)
        test = self._inputs.task.test
        texts = answers(
            runtime, [item.input for item in test], form.part, batch_size=self._batch_size, max_new_tokens=form.max_answer_tokens
        )
        return [_judged(item, label_of(text, form.part), self._metric) for item, text in zip(test, texts, strict=True)]


def _judged(item: TaskExample, label: str | None, metric: Metric) -> dict[str, Any]:
    parsed = None if label is None else parse_answer(label, metric, item.choices)
    return {"id": item.id, "parsed": parsed, "correct": equal(parsed, item.label, metric, item.choices)}


def _weights(model: PreTrainedModel) -> Weights:
    """A copy of the parameters, those that are tied once."""
    return {name: parameter.detach().to("cpu", torch.float32, copy=True) for name, parameter in model.named_parameters()}


@torch.no_grad()
def _set_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def _result(
    trial: Trial, trained: Trained, folder: Path, processes: int, counts: Mapping[str, int], written: Sequence[dict[str, Any]] | None
) -> TrialResult:
    speeds = [line["tokens_per_second"] for line in read_log(folder / LOG_FILE) if "tokens_per_second" in line]
    return TrialResult(
        trial,
        validation={"exact_match": trained.best.exact_match, "loss": trained.best.loss},
        best_step=trained.best.step,
        steps=trained.steps,
        seconds=trained.seconds,
        tokens_per_second=statistics.median(speeds) if speeds else None,
        processes=processes,
        counts=dict(counts),
        answers=None if written is None else list(written),
    )
