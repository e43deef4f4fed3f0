"""The live teacher writes: greedy decoding of rationale and label."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from data.prompts import TextFormat
from train.engine import InferenceModel
from train.runtimes import pad, until


@torch.no_grad()
def generate(teacher: InferenceModel, form: TextFormat, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The tokens that follow each prompt, without the end-of-sequence token.

    Args:
        teacher: placed on its devices.
        form: for family and special tokens.
        prompts: token ids; padded on the left for a decoder-only model, masked by length.
        max_new_tokens: most tokens written.

    Returns:
        One list of token ids a prompt.
    """
    decoder_only = form.family == "decoder_only"
    ids, mask = pad(prompts, form.pad_id, left=decoder_only)
    device = next(teacher.model.parameters()).device
    output = teacher.model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=form.pad_id,
        eos_token_id=form.eos_id,
        synced_gpus=teacher.in_step,
    )
    start = ids.shape[1] if decoder_only else 1
    return [until(row, form.eos_id) for row in output[:, start:].tolist()]


def batches_by_length(prompts: Sequence[list[int]], batch_size: int) -> Iterable[list[int]]:
    """Positions of `prompts` in batches of like length, longest first, so that memory runs out at once or never."""
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n]), n))
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))
