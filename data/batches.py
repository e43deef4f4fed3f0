"""Sequences dealt out to processes and forwards, collated into tensors, and the order in which rows are seen: pure functions.

A decoder-only student reads its sequences joined in one row, without padding (`packed`); an encoder-decoder, and a decoder-only model
that cannot do so, reads them padded, sequences of like length together.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.prompts import TextFormat
from data.rows import TrainSequence
from data.soft_labels import Sampled, SoftLabels, TopK

SoftSource = Literal["stored", "live"]
"""Where soft labels come from: with the rows, or from a teacher that reads the same batch."""


@dataclass(frozen=True, slots=True)
class StudentBatch:
    """n sequences of both tasks for one forward, with M target tokens in all.

    Packed: T tokens in one row. Padded: S is the length of the longest input (and target, for a decoder-only model), L that of the
    longest target.
    """

    input_ids: Tensor
    """Packed: [1, T] int64. Padded: [n, S] int64, padded on the right."""
    attention_mask: Tensor | None
    """Padded: [n, S] int64, 1 where a token is; made from lengths, so that padding with the end-of-sequence id hides nothing."""
    position_ids: Tensor | None
    """Packed: [1, T] int64, from 0 in each sequence."""
    starts: Tensor | None
    """Packed: [n + 1] int32, where each sequence begins; the last is T."""
    longest: int
    """Tokens of the longest sequence that the model reads."""
    decoder_input_ids: Tensor | None
    """[n, L] int64; None for a decoder-only model."""
    at: Tensor
    """[M] int64: the position whose state predicts each target token, in the flattened states ([T], [n * S] or [n * L])."""
    targets: Tensor
    """[M] int64: the target tokens, sequence by sequence."""
    parts: Tensor
    """[M] int64: 0 a label's token, 1 a rationale's, 2 one of the teacher's answers'."""
    weights: Tensor
    """[M] float32: how much each counts: 1, an answer's probability, or 0 where it only fills the batch."""
    sequence: Tensor
    """[M] int64: the number of its sequence."""
    soft_rows: Tensor
    """[K] int64, ascending: which of the M target tokens have a soft label."""
    soft_ids: Tensor
    """[K, k] int64; of sampled ones k is the largest number of distinct ids, and shorter rows are filled up with id 0."""
    soft_log_probs: Tensor
    """[K, k] float32; -inf at an id that only fills up."""
    soft_temperature: float | None
    """Of sampled soft labels, whose probabilities add up to 1; None of top-k ones, which miss the mass of all other ids."""
    soft_weights: Tensor | None = None
    """[K] float32: how much each soft label counts, 1 or 0; None where each counts 1."""

    def to(self, device: torch.device) -> StudentBatch:
        """The same batch on a device; to a GPU without waiting for what it is doing."""

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            # A copy from memory that is not pinned would wait for all that the GPU has been given to do.
            source = value.pin_memory() if device.type == "cuda" else value
            return source.to(device, non_blocking=True)

        return StudentBatch(**{f.name: moved(getattr(self, f.name)) for f in fields(self)})

    @property
    def num_sequences(self) -> int:
        """Sequences in it, those that only fill it too."""
        return len(self.starts) - 1 if self.starts is not None else len(self.input_ids)

    @property
    def num_computed_tokens(self) -> int:
        """Tokens that a forward computes, padding too."""
        return self.input_ids.numel() + (0 if self.decoder_input_ids is None else self.decoder_input_ids.numel())


def read_tokens(sequence: TrainSequence) -> int:
    """Tokens that the model reads of a sequence, input and target: the last target token is only predicted, the first is."""
    return len(sequence.input_ids) + len(sequence.target_ids) - 1


def token_counts(sequences: Sequence[TrainSequence], soft: SoftSource = "stored") -> Tensor:
    """[3] float64: target tokens of labels, of rationales, and with soft labels: what each loss is a mean over.

    A token of one of the teacher's answers counts as much as it weighs: the answers of one question count together as one target of
    the mean length, and answers of which one is certain count as a label does.
    """
    labels = sum(len(s.target_ids) - s.given for s in sequences if s.is_label)
    rationales = sum(len(s.target_ids) for s in sequences if not s.is_label and s.weight is None)
    if soft == "live":
        return torch.tensor([labels, rationales, labels + rationales], dtype=torch.float64)
    scored = sum(min(len(s.soft), len(s.target_ids)) for s in sequences if s.soft is not None)
    answers = sum(s.weight * len(s.target_ids) for s in sequences if s.weight is not None)
    return torch.tensor([labels, rationales, scored + answers], dtype=torch.float64)


def collate(
    sequences: Sequence[TrainSequence],
    text_format: TextFormat,
    decoder_start_id: int,
    *,
    packed: bool,
    num_masked: int = 0,
    soft: SoftSource = "stored",
) -> StudentBatch:
    """Sequences as one batch.

    Args:
        sequences: at least one.
        text_format: whose family and padding id.
        decoder_start_id: opens a decoder's input (encoder-decoder only).
        packed: joined in one row (decoder-only only).
        num_masked: how many of the last sequences only fill the batch and count in no loss.
        soft: live: every target token of a label or rationale gets an empty soft label, which a teacher fills in.
    """
    encoder_decoder = text_format.family == "encoder_decoder"
    assert not (packed and encoder_decoder), "an encoder-decoder's sequences are not joined"
    inputs = [s.input_ids if encoder_decoder else s.input_ids + s.target_ids[:-1] for s in sequences]
    lengths = np.array([len(ids) for ids in inputs])
    given = np.array([s.given for s in sequences])
    num_targets = np.array([len(s.target_ids) for s in sequences]) - given
    if packed:
        tensors, row_starts = _joined(inputs, lengths), np.concatenate([[0], np.cumsum(lengths)[:-1]])
    else:
        tensors = _padded_inputs(inputs, text_format.pad_id)
        width = (given + num_targets).max() if encoder_decoder else lengths.max()
        row_starts = np.arange(len(sequences)) * width
    first = row_starts + given + (0 if encoder_decoder else np.array([len(s.input_ids) - 1 for s in sequences]))
    # The k-th target token of a sequence is predicted k positions after its first one.
    offsets = np.concatenate([[0], np.cumsum(num_targets)[:-1]])
    within = np.arange(num_targets.sum()) - np.repeat(offsets, num_targets)
    kinds = np.array([0 if s.is_label else 1 if s.weight is None else 2 for s in sequences])
    weights = np.array([(s.weight or 1.0) * (n < len(sequences) - num_masked) for n, s in enumerate(sequences)], dtype=np.float32)
    counted = sequences[: len(sequences) - num_masked]
    decoder = _decoder_inputs(sequences, decoder_start_id, text_format.pad_id) if encoder_decoder else None
    return StudentBatch(
        **tensors,
        longest=int(max(lengths.max(), (given + num_targets).max() if encoder_decoder else 0)),
        decoder_input_ids=decoder,
        at=torch.from_numpy(np.repeat(first, num_targets) + within),
        targets=torch.from_numpy(np.concatenate([np.asarray(s.target_ids[s.given :], dtype=np.int64) for s in sequences])),
        parts=torch.from_numpy(np.repeat(kinds, num_targets)),
        weights=torch.from_numpy(np.repeat(weights, num_targets)),
        sequence=torch.from_numpy(np.repeat(np.arange(len(sequences)), num_targets)),
        **(_stored(counted, offsets) if soft == "stored" else _live(counted, offsets)),
    )


_TOKENS, _TARGETS, _SEQUENCES, _IDS = 512, 1024, 32, 16
"""Multiples to which `rounded` fills tokens, target tokens and soft labels, sequences, and the ids of a soft label."""
_FILLING = 128
"""Tokens of a sequence that only fills up; no more than kernels for the shortest sequences take."""


def rounded(batch: StudentBatch) -> StudentBatch:
    """A packed batch filled up to one of a few sizes, so that what was recorded for one batch can be replayed for another.

    What fills it counts in no loss: sequences of their own, some of no token, and target tokens and soft labels of weight 0.
    """
    assert batch.starts is not None
    assert batch.position_ids is not None
    num_tokens, num_targets, num_soft = batch.input_ids.shape[1], len(batch.targets), len(batch.soft_rows)
    more_soft = -num_soft % _TARGETS
    # Each soft label needs a target token of its own.
    more_targets = more_soft + (-(num_targets + more_soft)) % _TARGETS
    more_tokens = -num_tokens % _TOKENS
    lengths = [_FILLING] * (more_tokens // _FILLING) + ([more_tokens % _FILLING] if more_tokens % _FILLING else [])
    # As many places for sequences that fill as there can be, so that their number makes no size of its own.
    lengths += [0] * (_TOKENS // _FILLING - len(lengths))
    lengths += [0] * (-(batch.num_sequences + len(lengths)) % _SEQUENCES)
    starts = num_tokens + torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.arange(length) for length in lengths)])[None]
    # A top-k soft label has its k ids, distinct ones; of drawn ones there may be any number.
    k = batch.soft_ids.shape[1]
    more_ids = -k % _IDS if batch.soft_temperature is not None else 0
    some_ids = torch.cat([torch.arange(k), torch.zeros(more_ids, dtype=torch.int64)]).expand(more_soft, -1)
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, more_tokens)),
        position_ids=torch.cat([batch.position_ids, positions], dim=1),
        starts=torch.cat([batch.starts, starts]),
        longest=max(batch.longest, _FILLING),
        at=F.pad(batch.at, (0, more_targets)),
        targets=F.pad(batch.targets, (0, more_targets)),
        parts=F.pad(batch.parts, (0, more_targets)),
        weights=F.pad(batch.weights, (0, more_targets)),
        sequence=F.pad(batch.sequence, (0, more_targets)),
        soft_rows=torch.cat([batch.soft_rows, torch.arange(num_targets, num_targets + more_soft)]),
        soft_ids=torch.cat([F.pad(batch.soft_ids, (0, more_ids)), some_ids]),
        soft_log_probs=F.pad(batch.soft_log_probs, (0, more_ids, 0, more_soft), value=-math.inf),
        soft_weights=F.pad(torch.ones(num_soft), (0, more_soft)),
    )


def _joined(inputs: Sequence[list[int]], lengths: np.ndarray) -> dict[str, Any]:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    return {
        "input_ids": torch.from_numpy(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in inputs]))[None],
        "attention_mask": None,
        "position_ids": torch.from_numpy(positions)[None],
        "starts": torch.from_numpy(starts.astype(np.int32)),
    }


def _padded_inputs(inputs: Sequence[list[int]], pad_id: int) -> dict[str, Any]:
    ids, mask = _padded(inputs, pad_id)
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask), "position_ids": None, "starts": None}


def _decoder_inputs(sequences: Sequence[TrainSequence], start_id: int, pad_id: int) -> Tensor:
    return torch.from_numpy(_padded([[start_id, *s.target_ids[:-1]] for s in sequences], pad_id)[0])


def _padded(lists: Sequence[list[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, lists))
    ids = np.full((len(lists), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for n, values in enumerate(lists):
        ids[n, : len(values)] = values
        mask[n, : len(values)] = 1
    return ids, mask


def _stored(sequences: Sequence[TrainSequence], offsets: np.ndarray) -> dict[str, Any]:
    # Soft labels of no token have lost their k in Parquet, and could not be joined with others.
    found = [(int(offsets[n]), s.soft) for n, s in enumerate(sequences) if s.soft is not None and len(s.soft)]
    if not found:
        return _soft_tensors(np.zeros(0, dtype=np.int64), np.zeros((0, 1), dtype=np.int64), np.zeros((0, 1), dtype=np.float32), None)
    rows = np.concatenate([offset + np.arange(len(soft)) for offset, soft in found])
    return _soft_tensors(rows, *_probabilities([soft for _, soft in found]))


def _live(sequences: Sequence[TrainSequence], offsets: np.ndarray) -> dict[str, Any]:
    read = [(int(offsets[n]), len(s.target_ids) - s.given) for n, s in enumerate(sequences) if s.weight is None]
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *(offset + np.arange(count) for offset, count in read)])
    return _soft_tensors(rows, np.zeros((len(rows), 0), dtype=np.int64), np.zeros((len(rows), 0), dtype=np.float32), None)


def _soft_tensors(rows: np.ndarray, ids: np.ndarray, log_probs: np.ndarray, temperature: float | None) -> dict[str, Any]:
    return {
        "soft_rows": torch.from_numpy(rows.astype(np.int64)),
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


Share = tuple[list[TrainSequence], int]
"""The sequences of one forward, and how many of the last of them only fill it."""


def deal(sequences: Sequence[TrainSequence], *, num_ranks: int, max_tokens: int, packed: bool) -> list[list[Share]]:
    """Deals the sequences of a step to processes, and to the forwards of each; the same on every process.

    Every process gets as many forwards, of about as many tokens, and none is empty: where the sequences run out, one fills in whose
    losses are masked, because a process that makes fewer forwards than the others, or one without a gradient, would hang them.

    Args:
        sequences: of one optimizer step, at least one.
        num_ranks: processes.
        max_tokens: most tokens of one forward, padding too; a sequence that is longer goes alone.
        packed: sequences are joined without padding, else padded to the longest of their forward.

    Returns:
        For each process its forwards.
    """
    rounds = -(-sum(map(read_tokens, sequences)) // (max_tokens * num_ranks))
    while not _fits(bins := _bins(sequences, num_ranks * rounds, packed), sequences, max_tokens, packed):
        rounds += 1
    if not packed:
        # Shorter forwards waste less on padding, and each costs something of its own.
        more = [bins, *(_bins(sequences, num_ranks * (rounds + n), packed) for n in range(1, 4))]
        bins = min(more, key=lambda bins: sum(_computed(share, sequences, packed) + _FORWARD_TOKENS for share in bins))
    filling: Share = ([sequences[0]], 1)
    shares = [([sequences[n] for n in share], 0) if share else filling for share in bins]
    return [shares[rank::num_ranks] for rank in range(num_ranks)]


_FORWARD_TOKENS = 2048
"""What a forward and its backward cost besides their tokens, in tokens: small models on a CPU and large ones on a GPU are near it."""


def _fits(bins: Sequence[Sequence[int]], sequences: Sequence[TrainSequence], max_tokens: int, packed: bool) -> bool:
    return all(len(share) <= 1 or _computed(share, sequences, packed) <= max_tokens for share in bins)


def _computed(share: Sequence[int], sequences: Sequence[TrainSequence], packed: bool) -> int:
    """Tokens that a forward over these sequences computes."""
    if packed or not share:
        return sum(read_tokens(sequences[n]) for n in share)
    return len(share) * (max(len(sequences[n].input_ids) for n in share) + max(len(sequences[n].target_ids) for n in share))


def _bins(sequences: Sequence[TrainSequence], num_bins: int, packed: bool) -> list[list[int]]:
    return _packed_bins(sequences, num_bins) if packed else _padded_bins(sequences, num_bins)


def _packed_bins(sequences: Sequence[TrainSequence], num_bins: int) -> list[list[int]]:
    """The longest first, each into the bin with the fewest tokens; then in their own order, as long as they lie in one bin."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, number) for number in range(num_bins)]
    for n in sorted(range(len(sequences)), key=lambda n: -read_tokens(sequences[n])):
        tokens, number = heapq.heappop(heap)
        bins[number].append(n)
        heapq.heappush(heap, (tokens + read_tokens(sequences[n]), number))
    return [sorted(share) for share in bins]


def _padded_bins(sequences: Sequence[TrainSequence], num_bins: int) -> list[list[int]]:
    """Sequences of like length together: cut in the order of their lengths so that the bin of most padded tokens has as few as can be."""
    order = sorted(range(len(sequences)), key=lambda n: (-len(sequences[n].input_ids), -len(sequences[n].target_ids)))
    low, high = 1, _computed(order, sequences, packed=False)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(sequences, order, middle)) <= num_bins else (middle + 1, high)
    bins = _cut(sequences, order, low)
    return bins + [[] for _ in range(num_bins - len(bins))]


def _cut(sequences: Sequence[TrainSequence], order: Sequence[int], most: int) -> list[list[int]]:
    """Runs of `order` of at most so many padded tokens each, or of one sequence."""
    bins: list[list[int]] = []
    widest_input = widest_target = 0
    for n in order:
        widest_input = max(widest_input, len(sequences[n].input_ids))
        widest_target = max(widest_target, len(sequences[n].target_ids))
        if bins and (len(bins[-1]) + 1) * (widest_input + widest_target) <= most:
            bins[-1].append(n)
        else:
            bins.append([n])
            widest_input, widest_target = len(sequences[n].input_ids), len(sequences[n].target_ids)
    return bins
