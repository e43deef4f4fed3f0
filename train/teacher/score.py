"""The live teacher scores: soft labels at the tokens of a solution, and the log-likelihoods of answer choices.

A pass of its own after writing, because one forward scores many tokens. Whatever is asked for in one call is sorted by length and cut
into forwards by a budget of tokens, so the same call gives the same numbers on any number of processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.config import SoftLabelsConfig
from data.prompts import TextFormat
from data.soft_labels import SoftLabels, TopK, sampled_of
from train.engine import InferenceModel
from train.teacher.distributions import SUM_BLOCK, draw, target_log_probs, top_log_probs
from train.teacher.target_logits import TargetLogits, Unit

_HEAD_BYTES = 2**30
"""Most that the logits of one forward may take."""
_SLICE = 2**25
"""Numbers of one tensor in fp32 while logits become soft labels."""
_CPU_TOKENS, _GPU_TOKENS = 4096, 8192

Pair = tuple[SoftLabels | None, SoftLabels | None]
"""Soft labels of the rationale's and of the label's tokens; None for the part that `soft_labels.on` leaves out."""

Reduce = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""Logits [n, V] in fp32, targets, keys and positions [n] -> tensors [n, ...], the last the targets' log-probabilities."""

Columns = tuple[NDArray[Any], ...]


@dataclass(frozen=True, slots=True)
class Solution:
    """A prompt with the solution to score, in segments (`TextFormat.solution_ids`)."""

    prompt_ids: list[int]
    rationale_ids: list[int]
    mark_ids: list[int]
    label_ids: list[int]


@dataclass(frozen=True, slots=True)
class _Landing:
    """Results on their way from the device."""

    numbers: list[int]
    """Of the units they belong to."""
    columns: list[Tensor]
    arrived: torch.cuda.Event | None


class Scorer:
    """Scores with a placed teacher.

    Under ZeRO-3 every process must call the same methods equally often, with any amount of work, none too.
    """

    def __init__(self, teacher: InferenceModel, form: TextFormat, soft: SoftLabelsConfig, *, vocabulary: int, batch_tokens: int) -> None:
        """A scorer; all processes of a tensor group must make one.

        Args:
            teacher: placed on its devices.
            form: its family and special tokens.
            soft: what is stored.
            vocabulary: tokens that the tokenizer knows; a model's rows beyond them are left out of every softmax.
            batch_tokens: most tokens of one forward, or one sequence (`auto_batch_tokens`).
        """
        self.teacher, self.soft, self.vocabulary, self.batch_tokens = teacher, soft, vocabulary, batch_tokens
        self._forward = TargetLogits(teacher, form)
        element = next(teacher.model.parameters()).element_size()
        self._rows = max(1, _HEAD_BYTES // (element * int(teacher.model.config.get_text_config().vocab_size)))
        gathered = SUM_BLOCK * soft.draws if soft.format == "sampled" else 0
        self._slice = max(1, _SLICE // max(vocabulary, 2 * gathered))

    def tokens(self, solutions: Sequence[Solution], keys: Sequence[int]) -> list[Pair]:
        """The teacher's distribution at each token of rationale and label, given all before it.

        Args:
            solutions: what to score, any number.
            keys: of their records; seed the draws (format sampled).

        Returns:
            (rationale, label) for each solution; target log-probabilities are at temperature 1.

        Raises:
            RuntimeError: if the GPU's memory does not hold one sequence, or the teacher gives numbers that are not finite.
        """
        assert self.soft.on_tokens, f"soft_labels.format {self.soft.format} is not stored token by token"
        units = [self._unit(solution) for solution in solutions]
        found = self._scan(units, keys, self._reduce)
        return [self._pair(solution, columns) for solution, columns in zip(solutions, found, strict=True)]

    def choices(self, contexts: Sequence[list[int]], choices: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        """The log-likelihood of each choice after its context, summed over the choice's tokens.

        Args:
            contexts: at least one token each; read by the encoder of an encoder-decoder.
            choices: of each context, at least one token each.

        Raises:
            RuntimeError: if the GPU's memory does not hold one context with its choices, or the teacher gives numbers that are not finite.
        """
        units = [Unit(context, [list(choice) for choice in own]) for context, own in zip(contexts, choices, strict=True)]
        found = self._scan(units, [0] * len(units), lambda logits, targets, keys, positions: (target_log_probs(logits, targets),))
        sums = []
        for unit, columns in zip(units, found, strict=True):
            ends = list(itertools.accumulate(map(len, unit.targets)))
            parts = zip([0, *ends], ends, strict=False)
            sums.append([float(columns[-1][begin:end].sum(dtype=np.float64)) for begin, end in parts])
        return sums

    # ----- what is scored, and what becomes of it -----

    def _unit(self, solution: Solution) -> Unit:
        if self.soft.on == "rationale":  # a token's score does not depend on what follows
            return Unit(solution.prompt_ids, [solution.rationale_ids])
        before = solution.rationale_ids + solution.mark_ids
        return Unit(solution.prompt_ids, [before + solution.label_ids], len(before) if self.soft.on == "label" else 0)

    def _reduce(self, logits: Tensor, targets: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        if self.soft.format == "top_k":
            return top_log_probs(logits, targets, min(self.soft.k, self.vocabulary))
        drawn = draw(logits, keys, positions, self.soft.draws, self.soft.temperature)
        return drawn, target_log_probs(logits, targets)

    def _pair(self, solution: Solution, columns: Columns) -> Pair:
        length, label = len(solution.rationale_ids), len(solution.label_ids)
        total = len(columns[-1])
        rationale = self._soft_labels(columns, 0, length) if self.soft.on != "label" else None
        return rationale, self._soft_labels(columns, total - label, total) if self.soft.on != "rationale" else None

    def _soft_labels(self, columns: Columns, begin: int, end: int) -> SoftLabels:
        part = tuple(column[begin:end] for column in columns)
        return TopK(*part) if self.soft.format == "top_k" else sampled_of(part[0], part[1], self.soft.temperature)

    # ----- forwards -----

    @torch.no_grad()
    def _scan(self, units: Sequence[Unit], keys: Sequence[int], reduce: Reduce) -> list[Columns]:
        """The columns of every unit, in the order of the units."""
        found: dict[int, Columns] = {}
        order = sorted((n for n, unit in enumerate(units) if unit.num_rows), key=lambda n: (-units[n].longest, n))
        self._forward.prepare([units[n] for n in order])
        groups = self._groups(units, order)
        groups += [[]] * (self.teacher.most(len(groups)) - len(groups))
        landing: _Landing | None = None
        while groups:
            launched = self._attempt([(n, units[n], keys[n]) for n in groups[0]], reduce)
            if launched is None:
                groups = self._groups(units, [n for group in groups for n in group])
                continue
            groups.pop(0)
            if landing is not None:  # read while the device works on what was just launched
                found |= _landed(landing, units)
            landing = launched
        found |= _landed(landing, units) if landing is not None else {}
        empty = self._empty(reduce)
        return [found.get(n, empty) for n in range(len(units))]

    def _groups(self, units: Sequence[Unit], order: Sequence[int]) -> list[list[int]]:
        """Numbers of units, cut into forwards."""
        groups: list[list[int]] = []
        for n in order:
            if groups:
                tokens, rows = self._forward.cost([units[m] for m in (*groups[-1], n)])
                if tokens <= self.batch_tokens and rows <= self._rows:
                    groups[-1].append(n)
                    continue
            groups.append([n])
        return groups

    def _attempt(self, group: Sequence[tuple[int, Unit, int]], reduce: Reduce) -> _Landing | None:
        """Launches a forward; None where memory ran out and smaller forwards are to be tried."""
        try:
            return self._launch(group, reduce)
        except torch.OutOfMemoryError as error:
            # Processes that work together cannot retry apart: the others wait in a collective of this forward.
            if self.teacher.sharding != "replica":
                raise
            if len(group) == 1:
                raise RuntimeError(
                    f"the GPU's memory does not hold the teacher and one sequence of {group[0][1].longest} tokens to score: lower "
                    "teacher.rationales.max_input_tokens (of a tuned teacher: teacher.tune.max_input_tokens), or set teacher.sharding to "
                    "tensor or zero3"
                ) from error
        torch.cuda.empty_cache()  # here the failed forward's tensors are gone; inside `except` its frames hold them
        self.batch_tokens, self._rows = max(1, self.batch_tokens // 2), max(1, self._rows // 2)
        return None

    def _launch(self, group: Sequence[tuple[int, Unit, int]], reduce: Reduce) -> _Landing:
        if not group:
            self._forward.idle()
            return _Landing([], [], None)
        scored = [
            (token, key, at) for _, unit, key in group for target in unit.targets for at, token in enumerate(target) if at >= unit.first
        ]
        targets, keys, positions = (self._forward.placed(column) for column in zip(*scored, strict=True))
        logits, rows = self._forward([unit for _, unit, _ in group])
        parts = []
        for begin in range(0, len(rows), self._slice):
            part = slice(begin, begin + self._slice)
            chunk = logits.index_select(0, rows[part])[:, : self.vocabulary].float()
            parts.append(reduce(chunk, targets[part], keys[part], positions[part]))
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        return _land([n for n, _, _ in group], columns)

    def _empty(self, reduce: Reduce) -> Columns:
        """The columns of a unit without a token to score."""
        nothing = torch.zeros(0, dtype=torch.int64)
        return tuple(column.numpy() for column in reduce(torch.zeros(0, self.vocabulary), nothing, nothing, nothing))


def _land(numbers: list[int], columns: Sequence[Tensor]) -> _Landing:
    """Starts the copies to the host; on a GPU they run while the next forward is launched."""
    if not columns[0].is_cuda:
        return _Landing(numbers, list(columns), None)
    hosted = [torch.empty(column.shape, dtype=column.dtype, pin_memory=True).copy_(column, non_blocking=True) for column in columns]
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return _Landing(numbers, hosted, arrived)


def _landed(landing: _Landing, units: Sequence[Unit]) -> dict[int, Columns]:
    if landing.arrived is not None:
        landing.arrived.synchronize()
    columns = [column.numpy() for column in landing.columns]
    if columns and (wrong := int((~np.isfinite(columns[-1])).sum())):
        raise RuntimeError(
            f"the teacher's log-probabilities are not finite at {wrong} of {len(columns[-1])} tokens: its weights are damaged, or do not "
            "bear its precision"
        )
    ends = np.cumsum([0, *(units[n].num_rows for n in landing.numbers)])
    return {n: tuple(column[begin:end] for column in columns) for n, begin, end in zip(landing.numbers, ends[:-1], ends[1:], strict=True)}


def auto_batch_tokens(teacher: InferenceModel) -> int:
    """Tokens of one forward: 4,096 on a CPU; on a GPU 8,192, which fill it, or fewer where a layer's activations would not fit."""
    if teacher.world.device.type != "cuda":
        return _CPU_TOKENS
    config = teacher.model.config.get_text_config()
    width = getattr(config, "hidden_size", None) or config.d_model
    neurons = getattr(config, "intermediate_size", None) or getattr(config, "d_ff", None) or 4 * width
    element = next(teacher.model.parameters()).element_size()
    free, _ = torch.cuda.mem_get_info(teacher.world.device)
    # Residual, norm, queries, keys, values and attention's output beside the two halves of the feed-forward layer and their product.
    fitting = (free - 2 * _HEAD_BYTES) // 2 // (element * (8 * width + 4 * neurons))
    return int(min(_GPU_TOKENS, max(512, fitting // 512 * 512)))
