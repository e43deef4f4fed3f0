"""Rows collated into tensors, and the order in which they are seen: a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.prompts import TextFormat
from data.rows import TrainRow, TrainSequence
from data.soft_labels import Sampled, SoftLabels, TopK


@dataclass(frozen=True, slots=True)
class StudentBatch:
    """N sequences of both tasks for one forward; L is the length of the logits' time axis.

    For an encoder-decoder L runs over the target, for a decoder-only model over input and target; either way the logits at a position
    predict `targets` at that same position.
    """

    input_ids: Tensor
    """[N, S] int64, right-padded."""
    attention_mask: Tensor
    """[N, S] int64, 1 where a token is; made from lengths, so that padding with the end-of-sequence id hides nothing."""
    decoder_input_ids: Tensor | None
    """[N, L] int64; None for a decoder-only model."""
    targets: Tensor
    """[N, L] int64, valid where a mask below is true."""
    label_mask: Tensor
    """[N, L] bool: target tokens of labels."""
    rationale_mask: Tensor
    """[N, L] bool: target tokens of rationales."""
    answer_weights: Tensor
    """[N, L] float32: at each target token of one of the teacher's answers the answer's probability; 0 elsewhere."""
    soft_positions: Tensor
    """[M] int64: positions with a soft label, in the flattened [N * L]."""
    soft_ids: Tensor
    """[M, k] int64; of sampled ones k is the largest number of distinct ids, and shorter positions are filled up with id 0."""
    soft_log_probs: Tensor
    """[M, k] float32; -inf at an id that only fills up."""
    soft_temperature: float | None
    """Of sampled soft labels, whose probabilities add up to 1; None of top-k ones, which miss the mass of all other ids."""

    def to(self, device: torch.device) -> StudentBatch:
        """The same batch on a device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for name, value in values.items()
        }
        return StudentBatch(**moved)

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return inputs if self.decoder_input_ids is None else {**inputs, "decoder_input_ids": self.decoder_input_ids}

    def token_counts(self) -> Tensor:
        """[3] float64: target tokens of labels, of rationales, and with soft labels: what each loss is a mean over.

        A token of one of the teacher's answers counts as much as it weighs: the answers of one question count together as one target of
        the mean length, and answers of which one is certain count as a label does.
        """
        soft = len(self.soft_positions) + self.answer_weights.sum(dtype=torch.float64)
        return torch.stack([self.label_mask.sum(), self.rationale_mask.sum(), soft]).to(torch.float64)


def collate(sequences: Sequence[TrainSequence], text_format: TextFormat, decoder_start_id: int, *, num_masked: int = 0) -> StudentBatch:
    """Sequences as one padded batch.

    Args:
        sequences: at least one.
        text_format: whose family and padding id.
        decoder_start_id: opens a decoder's input (encoder-decoder only).
        num_masked: how many of the last sequences only fill the batch and count in no loss.
    """
    encoder_decoder = text_format.family == "encoder_decoder"
    inputs = [s.input_ids if encoder_decoder else s.input_ids + s.target_ids[:-1] for s in sequences]
    starts = [0 if encoder_decoder else len(s.input_ids) - 1 for s in sequences]
    length = max(start + len(s.target_ids) for start, s in zip(starts, sequences, strict=True))
    input_ids, attention_mask = _padded(inputs, text_format.pad_id)
    targets = np.full((len(sequences), length), text_format.pad_id, dtype=np.int64)
    # How much each target token counts as a label's, a rationale's and an answer's.
    weights = np.zeros((3, len(sequences), length), dtype=np.float32)
    for n, (start, s) in enumerate(zip(starts, sequences, strict=True)):
        targets[n, start : start + len(s.target_ids)] = s.target_ids
        kind = 0 if s.is_label else 1 if s.weight is None else 2
        weights[kind, n, start : start + len(s.target_ids)] = (s.weight or 1.0) * (n < len(sequences) - num_masked)
    decoder = np.concatenate([np.full((len(sequences), 1), decoder_start_id), targets[:, :-1]], axis=1) if encoder_decoder else None
    return StudentBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        decoder_input_ids=torch.from_numpy(decoder) if decoder is not None else None,
        targets=torch.from_numpy(targets),
        label_mask=torch.from_numpy(weights[0] > 0),
        rationale_mask=torch.from_numpy(weights[1] > 0),
        answer_weights=torch.from_numpy(weights[2]),
        **_soft_labels(sequences[: len(sequences) - num_masked], starts, length),
    )


def _padded(lists: Sequence[list[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, lists))
    ids = np.full((len(lists), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for n, values in enumerate(lists):
        ids[n, : len(values)] = values
        mask[n, : len(values)] = 1
    return ids, mask


def _soft_labels(sequences: Sequence[TrainSequence], starts: Sequence[int], length: int) -> dict[str, Any]:
    # Soft labels of no token have lost their k in Parquet, and could not be joined with others.
    rows = [(n, s.soft) for n, s in enumerate(sequences) if s.soft is not None and len(s.soft)]
    if not rows:
        return {
            "soft_positions": torch.zeros(0, dtype=torch.int64),
            "soft_ids": torch.zeros(0, 1, dtype=torch.int64),
            "soft_log_probs": torch.zeros(0, 1),
            "soft_temperature": None,
        }
    positions = np.concatenate([n * length + starts[n] + np.arange(len(soft)) for n, soft in rows])
    ids, log_probs, temperature = _probabilities([soft for _, soft in rows])
    return {
        "soft_positions": torch.from_numpy(positions.astype(np.int64)),
        "soft_ids": torch.from_numpy(ids.astype(np.int64)),
        "soft_log_probs": torch.from_numpy(log_probs),
        "soft_temperature": temperature,
    }


def _probabilities(labels: Sequence[SoftLabels]) -> tuple[np.ndarray, np.ndarray, float | None]:
    """Ids [M, k] and log-probabilities [M, k] of all positions, and the temperature of sampled ones."""
    tops = [soft for soft in labels if isinstance(soft, TopK)]
    sampled = [soft for soft in labels if isinstance(soft, Sampled)]
    assert not (tops and sampled), "a record store holds one format of soft labels"
    if tops:
        return np.concatenate([soft.ids for soft in tops]), np.concatenate([soft.log_probs for soft in tops]), None
    temperatures = {soft.temperature for soft in sampled}
    assert len(temperatures) == 1, temperatures
    distinct = np.concatenate([soft.distinct for soft in sampled])
    drawn = np.arange(distinct.max()) < distinct[:, None]
    ids = np.zeros(drawn.shape, dtype=np.int64)
    log_probs = np.full(drawn.shape, -np.inf, dtype=np.float32)
    ids[drawn] = np.concatenate([soft.ids for soft in sampled])
    log_probs[drawn] = np.log(np.concatenate([soft.counts / soft.draws for soft in sampled]))
    return ids, log_probs, temperatures.pop()


@dataclass(frozen=True, slots=True)
class Order:
    """Which rows each optimizer step sees.

    Every epoch is a permutation drawn from (seed, epoch), so a resumed run needs the step's number only.
    """

    num_rows: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass; the last may be short."""
        return -(-self.num_rows // self.batch_size)

    def rows_of(self, step: int) -> list[int]:
        """Row numbers of optimizer step `step` (from 0)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        permutation = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        return [int(n) for n in permutation[position * self.batch_size : (position + 1) * self.batch_size]]


def micro_batches(
    rows: Sequence[TrainRow], *, rank: int, num_ranks: int, micro_batch_size: int, num_micro_batches: int
) -> Iterator[tuple[list[TrainRow], int]]:
    """A rank's share of a step, in micro-batches, and how many of each one's last rows only fill it.

    Every rank gets `num_micro_batches`, and none is empty: where the rows run out, one fills in whose losses are masked, because a
    rank that makes fewer forwards than the others, or one without a gradient, would hang them.
    """
    mine = rows[rank::num_ranks]
    for m in range(num_micro_batches):
        part = list(mine[m * micro_batch_size : (m + 1) * micro_batch_size])
        yield (part, 0) if part else ([rows[0]], 1)
