"""The one training loop. A student learns with it, and a teacher is tuned with it.

sequences -> global token counts -> losses -> backward -> step -> track -> validate -> checkpoint
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.batches import Order, SoftSource, StudentBatch, collate, deal, read_tokens, token_counts
from data.prompts import TextFormat
from data.rows import TrainRow, TrainSequence
from train.artifacts import Checkpoint
from train.config import LossConfig, TrainingConfig
from train.engine import TrainEngine, open_engine
from train.gpus import known_gpu
from train.keepers import Keeper, ModelFolders
from train.learner import Learner, LiveTeacher, can_pack, tensors_of
from train.lora import attach_lora, merged_weights
from train.losses import PARTS, Divergence
from train.meter import Meter
from train.models import num_parameters, save_model
from train.passes import open_passes
from train.progress import StageProgress
from train.pruning.gradual import MaskSchedule
from train.schedules import learning_rate
from train.signals import Stopped, catching
from train.throughput import Arithmetic
from train.tracking import Tracker
from train.world import World

OpenTracker = Callable[[int], Tracker]
"""Opens the tracker of a training that goes on after this step."""
Criterion = Literal["exact_match", "loss"]
_AUTO_TOKENS = 16384
_PREFIX = "model."
"""Of the model's parameters within a `Learner`."""


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """All that a training needs besides the model."""

    rows: Sequence[TrainRow]
    validation: Sequence[TrainRow]
    text_format: TextFormat
    config: TrainingConfig
    loss: LossConfig
    seed: int
    folder: Path
    """Where the resumable state goes."""
    title: str
    vocabulary: int | None = None
    """Ids of the tokenizer, over which soft labels are compared."""
    resumable: bool = True
    """Save the state to go on from; a run that is over within a minute is sooner begun anew."""
    masks: MaskSchedule | None = None
    """Prunes on the way; the best model is one of those that have lost all they should."""
    criterion: Criterion = "exact_match"
    """What the best model has most of, or least: exact matches mean little where a target is a whole solution."""
    began: float | None = None
    """`time.monotonic()` of when the stage began to load its model: its seconds are counted from there. None: from the training's start."""

    @property
    def order(self) -> Order:
        """Which rows each step sees."""
        return Order(len(self.rows), self.config.batch_size, self.seed)

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all."""
        return max(1, round(self.config.epochs * self.order.steps_per_epoch))

    @property
    def micro_batch_tokens(self) -> int:
        """Most tokens of one forward."""
        return _AUTO_TOKENS if self.config.micro_batch_tokens == "auto" else self.config.micro_batch_tokens

    @property
    def soft(self) -> SoftSource:
        """Where the soft labels come from."""
        return "live" if self.loss.soft and self.loss.teacher == "live" else "stored"

    @property
    def divergence(self) -> Divergence:
        """From the soft labels."""
        loss = self.loss
        return Divergence(loss.divergence, loss.temperature or 1.0, 0.5 if loss.beta is None else loss.beta, loss.skew or 0.1)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(read_tokens(sequence) for row in self.rows for sequence in row.sequences)

    def sequences_of(self, step: int) -> list[TrainSequence]:
        """What an optimizer step (from 0) learns."""
        return [sequence for n in self.order.rows_of(step) for sequence in self.rows[n].sequences]


@dataclass(frozen=True, slots=True)
class Best:
    """The model to keep, by the validation split."""

    step: int = 0
    exact_match: float = -1.0
    """Share of validation rows whose label greedy decoding writes exactly."""
    loss: float = math.inf
    """Cross-entropy of the validation labels, nats a token."""
    waited: int = 0
    """Validations since, none of them better."""

    def improved_by(self, found: Mapping[str, float], criterion: Criterion) -> bool:
        """A lower loss; or more exact matches, or as many at a lower loss. The first is better than none."""
        if criterion == "loss":
            return self.step == 0 or found["loss"] < self.loss
        return (-found["exact_match"], found["loss"]) < (-self.exact_match, self.loss)

    def figures(self, criterion: Criterion) -> dict[str, float]:
        """Those of the validation that say something."""
        return {"loss": self.loss} if criterion == "loss" else {"exact_match": self.exact_match, "loss": self.loss}


@dataclass(frozen=True, slots=True)
class Trained:
    """How a training ended."""

    steps: int
    best: Best
    seconds: float
    """From when each start began (`TrainingRun.began`); of a start that was stopped, until the state it saved last."""


def train(
    model: PreTrainedModel,
    run: TrainingRun,
    world: World,
    open_tracker: OpenTracker,
    keeper: Keeper,
    *,
    live: LiveTeacher | None = None,
    key: str = "student.model",
) -> Trained:
    """Trains `model`, selects on validation, and gives the best weights to `keeper`.

    Killed at any point and called again with the same arguments, it goes on from its last checkpoint to the same weights: the order
    of rows and the dropout are functions of seed, step and rank. Afterwards the model's parameters are the last step's, in fp32 under
    ZeRO stage 0.

    Args:
        model: parameters in fp32, the same on every process.
        run: rows, knobs and place.
        world: the processes.
        open_tracker: gives the tracker, from a step.
        keeper: gets the best weights.
        live: a teacher that reads every batch.
        key: the configuration key of the model, for messages.

    Raises:
        ValueError: if the model cannot be trained here.
        RuntimeError: on a loss or gradient that is not finite, with nothing updated since, on every process.
        Stopped: after SIGTERM or SIGUSR1, with the state saved, on every process.
    """
    started, config = time.monotonic() if run.began is None else run.began, run.config
    batches = _Batches(run, world, can_pack(model, run.text_format, key), getattr(model.config, "decoder_start_token_id", None) or 0)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    meter = Meter(world, torch.tensor([getattr(run.loss, part) for part in PARTS]), Arithmetic.of(model), _peak_flops(world, config))
    learner = Learner(model, divergence=run.divergence, vocabulary=run.vocabulary, live=live if run.soft == "live" else None)
    with _host_threads(world, config), ExitStack() as stack:
        stack.callback(learner.release)
        engine = open_engine(learner.train(), world, config)
        stack.callback(engine.release)
        passes = open_passes(learner, engine, config, packed=batches.packed, num_steps=run.num_steps, longest=run.longest)
        resumed = engine.resume(run.folder / "state")
        start, earlier = (resumed.step, resumed.state["seconds"]) if resumed else (0, 0.0)
        best = Best(**resumed.state["best"]) if resumed else Best()
        step, ended = start, _has_waited(best, run, start)
        validate_every, save_every = (every or run.order.steps_per_epoch for every in (config.validate_every, config.save_every))
        tracker = stack.enter_context(open_tracker(start))
        progress = stack.enter_context(StageProgress(run.title, run.num_steps, "steps", enabled=world.is_main))
        signal = stack.enter_context(catching())
        stack.enter_context(learner.packed() if batches.packed else nullcontext())
        progress.advance(start)
        best = _tightened(run, engine, world, 0, best) if start == 0 else best
        while step < run.num_steps and not ended:
            torch.manual_seed((run.seed << 32) + (step << 12) + world.rank)
            sequences = run.sequences_of(step)
            counts = token_counts(sequences, run.soft).clamp(min=1).float()
            scale = _moved(meter.weights / counts, world.device)
            rate = learning_rate(step, num_steps=run.num_steps, peak=config.learning_rate, warmup=config.warmup, schedule=config.schedule)
            sums = torch.zeros(len(PARTS), device=world.device)
            for number, batch in enumerate(micro := batches.of_step(sequences)):
                sums += passes(scale, batch, last=number == len(micro) - 1)
            meter.add(step + 1, sums, counts, engine.step(rate), rate, sequences, [run.rows[n].id for n in run.order.rows_of(step)])
            step += 1
            best = _tightened(run, engine, world, step, best)
            validates = step % validate_every == 0 or step == run.num_steps
            saves = run.resumable and (step % save_every == 0 or step == run.num_steps)
            if engine.zero_stage or validates or saves or step % config.log_every == 0:
                stopping = _flush(meter, run, tracker, progress, best, signal.asked)
                if validates:
                    best = _validated(engine, batches, run, tracker, step, best, keeper)
                    meter.restart()
                ended = _has_waited(best, run, step)
                if saves or (run.resumable and (ended or stopping)):
                    engine.save(run.folder / "state", step, {"best": asdict(best), "seconds": earlier + time.monotonic() - started})
                    keeper.settle(best.step)
                    meter.restart()
                if stopping and not ended and step < run.num_steps:
                    raise _stopped(run, step)
        tracker.summary({"best_step": best.step, **_logged(best, run)})
    return Trained(step, best, earlier + time.monotonic() - started)


def train_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run: TrainingRun,
    world: World,
    open_tracker: OpenTracker,
    counts: Mapping[str, int],
    *,
    live: LiveTeacher | None = None,
    key: str = "student",
) -> Checkpoint:
    """Trains `model` and describes the best of it, which lies in `run.folder / "model"` as plain transformers loads it.

    Args:
        model: parameters in fp32, whole; adapters are put in here, where the configuration asks for them.
        tokenizer: saved beside the weights; its size bounds the soft labels' vocabulary.
        run: rows, knobs and place.
        world: the processes.
        open_tracker: gives the tracker, from a step.
        counts: of the rows, for the report.
        live: a teacher that reads every batch.
        key: of the section of the configuration, for messages.
    """
    parameters, lora = num_parameters(model), run.config.lora
    if lora is not None:
        attach_lora(model, lora, f"{key}.lora", seed=run.seed)

    def export(weights: dict[str, Tensor], folder: Path) -> None:
        save_model(model, tokenizer, run.text_format, folder, state_dict=merged_weights(weights, lora) if lora else weights)

    keeper = ModelFolders(run.folder, world, export)
    trained = train(model, replace(run, vocabulary=len(tokenizer)), world, open_tracker, keeper, live=live, key=f"{key}.model")
    ended = time.monotonic()
    keeper.finish(trained.best.step)
    return Checkpoint(
        family=run.text_format.family,
        num_parameters=parameters,
        weight_bytes=sum(path.stat().st_size for path in (run.folder / "model").glob("*.safetensors")),
        steps=trained.steps,
        best_step=trained.best.step,
        validation=trained.best.figures(run.criterion),
        counts=dict(counts),
        max_input_tokens=run.text_format.max_input_tokens,
        max_label_tokens=run.text_format.max_label_tokens,
        max_rationale_tokens=run.text_format.max_rationale_tokens,
        processes=world.size,
        seconds=trained.seconds,
    ).plus_since(ended)


@dataclass(frozen=True, slots=True)
class _Batches:
    """This process's forwards of a set of sequences."""

    run: TrainingRun
    world: World
    packed: bool
    start_id: int

    def of_step(self, sequences: Sequence[TrainSequence]) -> list[StudentBatch]:
        shares = deal(sequences, num_ranks=self.world.size, max_tokens=self.run.micro_batch_tokens, packed=self.packed)
        return [
            collate(share, self.run.text_format, self.start_id, packed=self.packed, num_masked=filling, soft=self.run.soft)
            for share, filling in shares[self.world.rank]
        ]


@torch.no_grad()
def validate(engine: TrainEngine, batches: _Batches, rows: Sequence[TrainRow]) -> dict[str, float]:
    """Exact matches of greedy decoding (share of rows) and the cross-entropy of labels (nats a token), over all processes' rows.

    If every most probable token under the gold prefix is the gold token, greedy decoding writes the gold label, and the other way round.
    """
    engine.module.eval()
    device = batches.world.device
    found = torch.zeros(3, device=device, dtype=torch.float64)
    scale = torch.ones(len(PARTS), device=device)
    for batch in batches.of_step([sequence for row in rows for sequence in row.sequences if sequence.is_label]):
        batch = batch.to(device)
        with torch.compiler.set_stance("force_eager"):  # a graph without gradients would be compiled for a few forwards
            sums, right = engine.forward(scale, matching=True, **tensors_of(batch))
        written = torch.ones(batch.num_sequences, device=device).scatter_reduce(0, batch.sequence, right.float(), "amin")
        counted = torch.zeros_like(written).scatter_reduce(0, batch.sequence, batch.weights, "amax")
        found += torch.stack([(written * counted).sum().double(), sums[0].double(), batch.weights.sum().double()])
    engine.module.train()
    matched, loss, tokens = batches.world.sum(found).tolist()
    return {"exact_match": matched / len(rows), "loss": loss / tokens}


def _validated(engine: TrainEngine, batches: _Batches, run: TrainingRun, tracker: Tracker, step: int, best: Best, keeper: Keeper) -> Best:
    found = validate(engine, batches, run.validation)
    now = Best(step, found["exact_match"], found["loss"])
    tracker.log(step, _logged(now, run))
    if not best.improved_by(found, run.criterion):
        return replace(best, waited=best.waited + 1)

    def gather() -> dict[str, Tensor]:
        return {name.removeprefix("model."): value for name, value in engine.gather_weights().items()}

    keeper.keep(step, gather)
    return now


def _logged(best: Best, run: TrainingRun) -> dict[str, float]:
    return {f"validation_{name}": value for name, value in best.figures(run.criterion).items()}


def _flush(meter: Meter, run: TrainingRun, tracker: Tracker, progress: StageProgress, best: Best, asked: str | None) -> bool:
    """Writes what the meter holds; whether any process was asked to stop."""
    lines, stopping = meter.flush(asked is not None)
    for step, values in lines:
        tracker.log(step, values if run.masks is None else {**values, "sparsity": run.masks.fraction_after(step)})
    told = f"loss {lines[-1][1]['loss']:.3f}"
    reached = f"loss {best.loss:.3f}" if run.criterion == "loss" else f"{best.exact_match:.1%}"
    progress.advance(len(lines), f"{told}  best validation {reached}" if best.step else told)
    return stopping


def _stopped(run: TrainingRun, step: int) -> Stopped:
    kept = "the state is saved" if run.resumable else "it begins anew"
    return Stopped(f"{run.title}: stopped by a signal after step {step} of {run.num_steps}; {kept}")


def _tightened(run: TrainingRun, engine: TrainEngine, world: World, step: int, best: Best) -> Best:
    """Prunes where that is due after this step; what was the best before has lost too little to be chosen."""
    if run.masks is None or not run.masks.is_due(step):
        return best
    run.masks.tighten(engine, world, step, _PREFIX)
    return Best()


def _has_waited(best: Best, run: TrainingRun, step: int) -> bool:
    is_pruning = run.masks is not None and step < run.masks.end
    return run.config.patience is not None and best.waited >= run.config.patience and not is_pruning


@contextmanager
def _host_threads(world: World, config: TrainingConfig) -> Iterator[None]:
    """One thread for what torch does on the CPU beside a GPU: tensors of a batch, for which waking others takes longer than the work.

    An optimizer that is offloaded works on the CPU with all of them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if world.device.type == "cuda" and not config.offload_optimizer else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _peak_flops(world: World, config: TrainingConfig) -> float | None:
    """Of one device in bf16; None for a CPU, a GPU that is not known, and in fp32."""
    gpu = known_gpu(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    return gpu.bf16_flops if gpu is not None and config.precision != "fp32" else None


def _moved(values: Tensor, device: torch.device) -> Tensor:
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)
