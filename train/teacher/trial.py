"""Tries the decoding loop on a model before it is trusted with it."""

from __future__ import annotations

import torch
from torch import distributed

from train.engine import InferenceModel
from train.teacher.attention import Joined, KeyValueCache, OneEach, attending
from train.teacher.slots import ints
from train.varlen import UnsupportedAttention


@torch.no_grad()
def reason_against(teacher: InferenceModel) -> str | None:
    """Why the loop cannot drive this model, or None: its logits are compared with the model's own forward on a few made-up tokens.

    A model may do what the loop does not know of (a sliding window, a state that is no key and no value); this finds out.
    """
    device = teacher.world.device
    ids = (torch.arange(24, device=device) * 37 + 11) % min(1000, teacher.model.config.get_text_config().vocab_size)
    plain = teacher.model(input_ids=ids[None], use_cache=False).logits[0, -2:].float()
    cache, found = KeyValueCache(2, 32, 8), []
    zero, one = ints([0], device), ints([1], device)
    steps: list[tuple[slice, Joined | OneEach]] = [
        (slice(0, 8), Joined(ints([0, 8], device), 8, zero, zero, zero, as_prefix=True)),
        (slice(8, 23), Joined(ints([0, 15], device), 15, zero, zero, one)),
        (slice(23, 24), OneEach(ints([15], device), one)),
    ]
    try:
        for span, batch in steps:
            positions = torch.arange(24, device=device)[None, span]
            with attending(teacher.model, cache, batch):
                found.append(teacher.model(input_ids=ids[None, span], position_ids=positions, use_cache=False).logits[0, -1].float())
    except (UnsupportedAttention, ImportError, TypeError, ValueError, AttributeError, NotImplementedError) as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    apart = (torch.stack(found[1:]) - plain).norm() / plain.norm()
    if teacher.group is not None:  # one process must not go another way than the others
        distributed.all_reduce(apart, distributed.ReduceOp.MAX, group=teacher.group)
    error = float(apart)
    # In bf16 the same sums in another order are some per cent apart (5.5 % for 32 random layers over two GPUs).
    limit = 1e-3 if plain.dtype == next(teacher.model.parameters()).dtype else 0.1
    return None if error < limit else f"its logits differ by {error:.1%} from the model's own forward"
