"""The live teacher scores: its distribution at each target token, from one forward over prompt and solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.batches import collate
from data.prompts import TextFormat
from data.rows import TrainSequence
from data.soft_labels import TopK
from train.engine import InferenceModel


@dataclass(frozen=True, slots=True)
class Solution:
    """A prompt with the solution to score, in segments (`TextFormat.solution_ids`)."""

    prompt_ids: list[int]
    rationale_ids: list[int]
    mark_ids: list[int]
    label_ids: list[int]


@torch.no_grad()
def score(teacher: InferenceModel, form: TextFormat, solutions: Sequence[Solution], k: int) -> list[tuple[TopK, TopK]]:
    """The top-k distributions at the tokens of each rationale and of each label, given all before them.

    Args:
        teacher: placed on its devices.
        form: for family and special tokens.
        solutions: what to score, one forward for all.
        k: probabilities a token; at most the vocabulary's size.

    Returns:
        (rationale, label) for each solution; the temperature is 1.
    """
    targets = [s.rationale_ids + s.mark_ids + s.label_ids for s in solutions]
    start_id = getattr(teacher.model.config, "decoder_start_token_id", None) or 0
    sequences = [TrainSequence(s.prompt_ids, target, True) for s, target in zip(solutions, targets, strict=True)]
    batch = collate(sequences, form, start_id).to(next(teacher.model.parameters()).device)
    logits = teacher.model(**batch.model_inputs(), use_cache=False).logits
    found = []
    for n, solution in enumerate(solutions):
        rows = top_k(logits[n][batch.label_mask[n]], batch.targets[n][batch.label_mask[n]], k)
        end = len(solution.rationale_ids)
        label = end + len(solution.mark_ids)
        found.append((rows.cut(end), TopK(rows.ids[label:], rows.log_probs[label:], rows.target_log_probs[label:])))
    return found


def top_k(logits: Tensor, targets: Tensor, k: int) -> TopK:
    """The k most probable tokens at T positions, with natural log-probabilities in fp32.

    Args:
        logits: [T, V].
        targets: [T] int64, the tokens that stand there.
        k: at most V.
    """
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = log_probs.topk(min(k, logits.shape[-1]), dim=-1)
    at_target = log_probs.gather(1, targets[:, None])[:, 0]
    return TopK(ids.to("cpu", torch.int32).numpy(), values.cpu().numpy(), at_target.cpu().numpy())
