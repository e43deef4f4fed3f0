"""The one training loop. A student learns with it, and a teacher is tuned with it.

batches -> global token counts -> losses -> backward -> finite? -> step -> track -> validate -> checkpoint
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.batches import Order, StudentBatch, collate, micro_batches
from data.prompts import TextFormat
from data.rows import TrainRow
from train.artifacts import Checkpoint
from train.config import LossConfig, TrainingConfig
from train.engine import TrainEngine, World
from train.losses import cross_entropy_sum, exact_matches, sampled_forward_kl_sum, top_k_forward_kl_sum, weighted_cross_entropy_sum
from train.models import num_parameters, save_model
from train.progress import StageProgress
from train.schedules import learning_rate
from train.tracking import Tracker

PARTS = ("label", "rationale", "soft")

Export = Callable[[dict[str, Tensor], Path], None]
"""Writes gathered weights as a model folder."""
OpenTracker = Callable[[int], Tracker]
"""Opens the tracker of a training that goes on after this step."""


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
    """Where checkpoints and the best model go."""
    title: str

    @property
    def order(self) -> Order:
        """Which rows each step sees."""
        return Order(len(self.rows), self.config.batch_size, self.seed)

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all."""
        return max(1, round(self.config.epochs * self.order.steps_per_epoch))

    def micro_batching(self, world: World) -> tuple[int, int]:
        """Examples of a micro-batch, and micro-batches of a step, the same on every process."""
        share = -(-min(self.config.batch_size, len(self.rows)) // world.size)
        # Rows of more sequences than a label and a rationale take their memory from the number of rows.
        widest = max(2, max(len(row.sequences) for row in self.rows))
        auto = max(1, (min(share, 32) if world.device.type == "cuda" else share) * 2 // widest)
        size = auto if self.config.micro_batch_size == "auto" else min(self.config.micro_batch_size, share)
        return size, -(-share // size)


@dataclass(frozen=True, slots=True)
class Best:
    """The model to keep, by the validation split."""

    step: int = 0
    exact_match: float = -1.0
    """Share of validation rows whose label greedy decoding writes exactly."""
    loss: float = math.inf
    """Cross-entropy of the validation labels, nats a token."""

    def improved_by(self, found: dict[str, float]) -> bool:
        """More exact matches, or as many at a lower loss."""
        return (-found["exact_match"], found["loss"]) < (-self.exact_match, self.loss)


@dataclass(frozen=True, slots=True)
class Trained:
    """How a training ended; the best model lies in `folder/model`."""

    steps: int
    best: Best
    seconds: float


def train(model: nn.Module, run: TrainingRun, world: World, open_tracker: OpenTracker, export: Export) -> Trained:
    """Trains `model`, selects on validation, and leaves the best in `run.folder / "model"`.

    Killed at any point and called again with the same arguments, it goes on from its last checkpoint to the same weights: the order
    of rows and the dropout are functions of seed, step and rank.

    Raises:
        RuntimeError: on a loss that is not finite, before the update, on every process.
    """
    started = time.monotonic()
    config = run.config
    micro_size, num_micro = run.micro_batching(world)
    engine = _wrap(model, config, world, num_micro)
    start, best, earlier_seconds = _resume(engine, run.folder)
    weights = torch.tensor([getattr(run.loss, part) for part in PARTS], device=world.device)
    validate_every = config.validate_every or run.order.steps_per_epoch
    save_every = config.save_every or run.order.steps_per_epoch
    with open_tracker(start) as tracker, StageProgress(run.title, run.num_steps, "steps", enabled=world.is_main) as progress:
        progress.advance(start)
        for step in range(start, run.num_steps):
            torch.manual_seed((run.seed << 32) + (step << 12) + world.rank)
            rows = [run.rows[n] for n in run.order.rows_of(step)]
            batches = _batches(rows, run.text_format, _start_id(engine), world, micro_size, num_micro)
            counts = world.sum(torch.stack([batch.token_counts() for batch in batches]).sum(dim=0)).clamp(min=1)
            rate = learning_rate(step, num_steps=run.num_steps, peak=config.learning_rate, warmup=config.warmup, schedule=config.schedule)
            sums = torch.zeros(len(PARTS), device=world.device)
            for number, batch in enumerate(batch.to(world.device) for batch in batches):
                local = loss_sums(engine.forward(batch.model_inputs()), batch)
                engine.backward((weights * local / counts.to(local)).sum())
                sums += local.detach()
                if number == num_micro - 1:
                    losses = _finite(world.sum(sums).cpu() / counts, step + 1, rows)
                engine.micro_step(rate)
            total = float((weights.cpu() * losses).sum())
            parts = {f"loss_{part}": float(losses[i]) for i, part in enumerate(PARTS) if getattr(run.loss, part)}
            tracker.log(step + 1, {"loss": total, **parts, "learning_rate": rate, "gradient_norm": engine.gradient_norm()})
            last = step + 1 == run.num_steps
            if (step + 1) % validate_every == 0 or last:
                found = validate(engine, run.validation, run.text_format, world, micro_size)
                tracker.log(step + 1, {f"validation_{name}": value for name, value in found.items()})
                if best.improved_by(found):
                    best = Best(step + 1, **found)
                    _write_model(engine, run.folder / f"model-{best.step}", world, export)
            if (step + 1) % save_every == 0 or last:
                seconds = earlier_seconds + time.monotonic() - started
                engine.save(run.folder / "state", step + 1, {"best": asdict(best), "seconds": seconds})
                _remove_models_but(run.folder, best.step, world)
            progress.advance(1, f"loss {total:.3f}  best validation {best.exact_match:.1%}" if best.step else f"loss {total:.3f}")
        tracker.summary({"best_step": best.step, "validation_exact_match": best.exact_match, "validation_loss": best.loss})
    _finish(run.folder, best.step, world)
    return Trained(run.num_steps, best, earlier_seconds + time.monotonic() - started)


def train_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run: TrainingRun,
    world: World,
    open_tracker: OpenTracker,
    counts: Mapping[str, int],
) -> Checkpoint:
    """Trains `model` and describes the best of it, which lies in `run.folder / "model"` as plain transformers loads it.

    Args:
        model: parameters in fp32, whole.
        tokenizer: saved beside the weights.
        run: rows, knobs and place.
        world: the processes.
        open_tracker: gives the tracker, from a step.
        counts: of the rows, for the report.
    """
    parameters = num_parameters(model)

    def export(weights: dict[str, Tensor], folder: Path) -> None:
        save_model(model, tokenizer, run.text_format, folder, state_dict=weights)

    trained = train(model, run, world, open_tracker, export)
    return Checkpoint(
        family=run.text_format.family,
        num_parameters=parameters,
        weight_bytes=sum(path.stat().st_size for path in (run.folder / "model").glob("*.safetensors")),
        steps=trained.steps,
        best_step=trained.best.step,
        validation={"exact_match": trained.best.exact_match, "loss": trained.best.loss},
        counts=dict(counts),
        max_input_tokens=run.text_format.max_input_tokens,
        max_label_tokens=run.text_format.max_label_tokens,
        max_rationale_tokens=run.text_format.max_rationale_tokens,
        processes=world.size,
        seconds=trained.seconds,
    )


def loss_sums(logits: Tensor, batch: StudentBatch) -> Tensor:
    """[3] fp32: losses of label, rationale and soft labels, each summed over its own target tokens of this batch.

    The soft labels' loss is a divergence at the tokens that have a distribution, and a weighted cross-entropy at those of the teacher's
    answers.
    """
    on_tokens = (logits, batch.soft_positions, batch.soft_ids, batch.soft_log_probs)
    divergence = (
        top_k_forward_kl_sum(*on_tokens)
        if batch.soft_temperature is None
        else sampled_forward_kl_sum(*on_tokens, temperature=batch.soft_temperature)
    )
    return torch.stack(
        [
            cross_entropy_sum(logits, batch.targets, batch.label_mask),
            cross_entropy_sum(logits, batch.targets, batch.rationale_mask),
            divergence + weighted_cross_entropy_sum(logits, batch.targets, batch.answer_weights),
        ]
    )


@torch.no_grad()
def validate(engine: TrainEngine, rows: Sequence[TrainRow], text_format: TextFormat, world: World, batch_size: int) -> dict[str, float]:
    """Exact matches of greedy decoding (share of rows) and the cross-entropy of labels (nats a token), over all processes' rows."""
    engine.module.eval()
    found = torch.zeros(3, dtype=torch.float64)
    num_batches = -(-len(rows) // (world.size * batch_size))
    for batch in _batches(rows, text_format, _start_id(engine), world, batch_size, num_batches, labels_only=True):
        batch = batch.to(world.device)
        logits = engine.forward(batch.model_inputs())
        matches = exact_matches(logits, batch.targets, batch.label_mask).sum()
        loss = cross_entropy_sum(logits, batch.targets, batch.label_mask)
        found += torch.stack([matches, loss, batch.label_mask.sum()]).to("cpu", torch.float64)
    engine.module.train()
    matched, loss, tokens = world.sum(found).tolist()
    return {"exact_match": matched / len(rows), "loss": loss / tokens}


def _wrap(model: nn.Module, config: TrainingConfig, world: World, num_micro_batches: int) -> TrainEngine:
    bf16 = config.precision == "bf16" or (config.precision == "auto" and world.device.type == "cuda")
    return TrainEngine(
        model.train(),
        world,
        zero_stage=config.zero_stage,
        bf16=bf16,
        num_micro_batches=num_micro_batches,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )


def _resume(engine: TrainEngine, folder: Path) -> tuple[int, Best, float]:
    found = engine.resume(folder / "state")
    return (found.step, Best(**found.state["best"]), found.state["seconds"]) if found else (0, Best(), 0.0)


def _start_id(engine: TrainEngine) -> int:
    return getattr(engine.module.config, "decoder_start_token_id", None) or 0


def _batches(
    rows: Sequence[TrainRow],
    text_format: TextFormat,
    start_id: int,
    world: World,
    micro_size: int,
    num_micro: int,
    *,
    labels_only: bool = False,
) -> list[StudentBatch]:
    batches = []
    shares = micro_batches(rows, rank=world.rank, num_ranks=world.size, micro_batch_size=micro_size, num_micro_batches=num_micro)
    for share, is_filling in shares:
        sequences = [s for row in share for s in row.sequences if s.is_label or not labels_only]
        batches.append(collate(sequences, text_format, start_id, num_masked=len(sequences) if is_filling else 0))
    return batches


def _finite(losses: Tensor, step: int, rows: Sequence[TrainRow]) -> Tensor:
    # The sums are the same on all processes, so all of them raise, and none has updated.
    if torch.isfinite(losses).all():
        return losses
    parts = ", ".join(f"{part} {float(value):.4g}" for part, value in zip(PARTS, losses, strict=True))
    ids = ", ".join(row.id for row in rows[:8])
    raise RuntimeError(
        f"the loss is not finite at step {step} ({parts}); nothing was updated. The batch holds the examples {ids}"
        f"{', ...' if len(rows) > 8 else ''}. Lower the learning rate or lengthen the warm-up, and run again from the last checkpoint"
    )


def _write_model(engine: TrainEngine, folder: Path, world: World, export: Export) -> None:
    weights = engine.gather_weights()
    error: Exception | None = None
    if world.is_main:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            export(weights, folder)
        except (OSError, RuntimeError) as caught:
            error = caught
    world.agree(error)


def _remove_models_but(folder: Path, step: int, world: World) -> None:
    if world.is_main:
        for old in folder.glob("model-*"):
            if old.name != f"model-{step}":
                shutil.rmtree(old)


def _finish(folder: Path, best_step: int, world: World) -> None:
    if world.is_main:
        best = folder / f"model-{best_step}"
        if best.is_dir():
            # A process killed while it removed the state trains again from the start, and finds its earlier result here.
            shutil.rmtree(folder / "model", ignore_errors=True)
            best.replace(folder / "model")
        shutil.rmtree(folder / "state", ignore_errors=True)
    world.barrier()
