"""Learning rate against step: pure arithmetic."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(step: int, *, num_steps: int, peak: float, warmup: float, schedule: Literal["linear", "cosine", "constant"]) -> float:
    """The learning rate of optimizer step `step` (from 0).

    Rises linearly over `ceil(warmup * num_steps)` steps, reaching `peak` on the last of them; then falls to 0 just after the last
    step (linear, cosine) or stays (constant).

    Args:
        step: 0 <= step < num_steps.
        num_steps: optimizer steps in all.
        peak: highest learning rate.
        warmup: share of the steps, 0 <= warmup < 1.
        schedule: shape after the warm-up.
    """
    warmup_steps = math.ceil(warmup * num_steps - 1e-9)  # 0.07 * 100 is a little more than 7 in binary
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * (1 - done) if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * done))
