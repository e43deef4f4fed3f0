"""What is trained: a model whose forward ends in its losses, computed at target tokens only, in chunks of the vocabulary's matrix product.

The model's own code runs unchanged; only its head is tapped, so that its states meet `head_losses` there in place of a matrix of logits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from data.batches import StudentBatch, collate
from data.prompts import TextFormat
from data.rows import TrainSequence
from train.head_loss import Head, LiveRows, head_losses, head_matches
from train.losses import Divergence, Targets, loss_sums
from train.varlen import Layout, UnsupportedAttention, attending, has_flash


@dataclass(frozen=True, slots=True)
class LiveTeacher:
    """A teacher that reads every batch beside the student and gives its whole distribution at each target token."""

    model: PreTrainedModel
    """In evaluation mode, on the student's device; of the student's family and vocabulary."""


class Tap:
    """Puts a function in the place of a model's head, for the forwards inside `giving`."""

    def __init__(self, model: Any) -> None:
        """Taps the model's output embeddings, until `release`."""
        self.module: nn.Module = model.get_output_embeddings()
        self._own = self.module.forward
        self._function: Callable[[Tensor], Tensor] | None = None
        self.module.forward = self._forward
        config = model.config.get_text_config()
        factor = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        self.scale, self.softcap = float(factor), getattr(config, "final_logit_softcapping", None)

    @property
    def head(self) -> Head:
        """The head's numbers; under ZeRO-3 whole only within its own forward."""
        return Head(self.module.weight, getattr(self.module, "bias", None), self.scale, self.softcap)  # type: ignore[arg-type]

    @property
    def is_last(self) -> bool:
        """Nothing happens to the logits after the head."""
        return self.scale == 1.0 and self.softcap is None

    def release(self) -> None:
        """Gives the head back its own forward."""
        self.module.forward = self._own

    @contextmanager
    def giving(self, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """The head gives function(states [*, H]) inside."""
        self._function = function
        try:
            yield
        finally:
            self._function = None

    def _forward(self, hidden: Tensor) -> Tensor:
        if self._function is not None:
            return self._function(hidden)
        logits: Tensor = self._own(hidden)
        return logits


class Learner(nn.Module):
    """A student with its losses."""

    def __init__(
        self, model: PreTrainedModel, *, divergence: Divergence, vocabulary: int | None = None, live: LiveTeacher | None = None
    ) -> None:
        """Taps the model's head, until `release`.

        Args:
            model: the student.
            divergence: of its soft labels.
            vocabulary: ids of the tokenizer, over which soft labels are compared; all rows of the head where None.
            live: a teacher that gives soft labels, in place of stored ones.
        """
        super().__init__()
        self.model = model
        self.divergence, self.vocabulary = divergence, vocabulary
        self.tap = Tap(model)
        # In a tuple, so that it is no module of this one: it is neither trained, nor sharded, nor saved.
        self._live = () if live is None else ((live.model, Tap(live.model)),)

    @property
    def teachers(self) -> tuple[PreTrainedModel, ...]:
        """The live teacher, if there is one."""
        return tuple(model for model, _ in self._live)

    def release(self) -> None:
        """Gives the models their heads back."""
        self.tap.release()
        for _, tap in self._live:
            tap.release()

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Forwards inside may be of packed batches, and only of those: also what is computed again in a backward pass."""
        with ExitStack() as stack:
            for model in (self.model, *self.teachers):
                stack.enter_context(attending(model))
            yield

    def forward(self, scale: Tensor, *, matching: bool = False, **batch: Any) -> tuple[Tensor, Tensor]:
        """One forward of the student, its losses with it.

        Args:
            scale: [3] fp32, what each part's sum counts in the total: its weight over its global count of target tokens.
            matching: give what validation asks for instead of a total that can be learnt from.
            batch: the tensors of a batch, as `tensors_of` gives them.

        Returns:
            (the total, a scalar in fp32; [3] fp32, the sum of each part over this batch's target tokens, without gradient); or, matching,
            ([3] fp32, the same sums without soft labels; [M] bool, where the student's most probable token is the target).
        """
        live = None if matching else self._live_rows(batch)
        found: tuple[Tensor, ...] = ()

        def losses(hidden: Tensor) -> Tensor:
            nonlocal found
            states, head, targets = _at(hidden, batch["at"]), self.tap.head, _targets(batch)
            if matching:
                found = head_matches(states, head, targets)
            else:
                found = head_losses(states, head, targets, scale, self.divergence, vocabulary=self.vocabulary, live=live)
            return found[0]

        with self.tap.giving(losses):
            output = self.model(**_inputs(batch, self.model.dtype), use_cache=False)
        # ZeRO-3 hangs what it needs in the backward pass on what the head's module gives.
        return (output.logits if self.tap.is_last else found[0]), found[1]

    @torch.no_grad()
    def _live_rows(self, batch: Mapping[str, Any]) -> LiveRows | None:
        if not self._live:
            return None
        ((model, tap),) = self._live
        states: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            states.append(_at(hidden, batch["at"][batch["soft_rows"]]))
            return states[0].new_zeros(())

        with tap.giving(keep):
            model(**_inputs(batch, model.dtype), use_cache=False)
        return LiveRows(states[0], tap.head)


def tensors_of(batch: StudentBatch) -> dict[str, Any]:
    """A batch as keyword arguments of a `Learner`."""
    return {name: getattr(batch, name) for name in StudentBatch.__slots__ if getattr(batch, name) is not None}


def _at(hidden: Tensor, positions: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)


def _inputs(batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    inputs = {name: batch.get(name) for name in ("input_ids", "attention_mask", "position_ids", "decoder_input_ids")}
    if (starts := batch.get("starts")) is not None:
        flash = has_flash(starts.device, dtype)
        inputs |= Layout.of(starts, batch["longest"], batch["position_ids"], flash=flash).arguments()
    return {name: value for name, value in inputs.items() if value is not None}


def _targets(batch: Mapping[str, Any]) -> Targets:
    return Targets(
        batch["targets"],
        batch["parts"],
        batch["weights"],
        batch["soft_rows"],
        batch["soft_ids"],
        batch["soft_log_probs"],
        batch.get("soft_temperature"),
        batch.get("soft_weights"),
    )


_TRIED: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()
"""Models that were tried, and whether they take packed batches."""


def can_pack(model: PreTrainedModel, text_format: TextFormat, key: str) -> bool:
    """Whether a model takes sequences joined in one row, found by trying: packed, padded and by its own logits its losses must agree.

    Args:
        model: in fp32; tried once.
        text_format: how it is called.
        key: the configuration key it was written under, for messages.

    Raises:
        ValueError: if the losses at its head are not those of its own logits.
    """
    if model not in _TRIED:
        training = model.training
        _TRIED[model] = _try(model.eval(), text_format, key)
        model.train(training)
    return _TRIED[model]


@torch.no_grad()
def _try(model: PreTrainedModel, text_format: TextFormat, key: str) -> bool:
    draw = torch.Generator().manual_seed(0)
    rows = model.get_input_embeddings().weight.shape[0]
    ids = [torch.randint(rows, (length,), generator=draw).tolist() for length in (5, 2, 7, 1, 3, 4)]
    sequences = [TrainSequence(ids[n], ids[n + 1], True) for n in (0, 2, 4)]
    start = getattr(model.config, "decoder_start_token_id", None) or 0
    padded = collate(sequences, text_format, start, packed=False).to(model.device)
    own = model(**_inputs(tensors_of(padded), model.dtype), use_cache=False).logits
    expected = loss_sums(own.flatten(0, 1)[padded.at], _targets(tensors_of(padded)), Divergence("forward_kl"))
    learner, scale = Learner(model, divergence=Divergence("forward_kl")), torch.ones(3, device=model.device)
    try:
        if not torch.allclose(learner(scale, **tensors_of(padded))[1], expected, rtol=1e-3):
            raise ValueError(
                f"{key} is a {type(model).__name__}, whose logits are not its head's product with its last states: it cannot be trained "
                "here; choose a model of another family"
            )
        if text_format.family == "encoder_decoder":
            return False
        packed = collate(sequences, text_format, start, packed=True).to(model.device)
        with learner.packed():
            return torch.allclose(learner(scale, **tensors_of(packed))[1], expected, rtol=1e-3)
    except UnsupportedAttention:
        return False
    finally:
        learner.release()
