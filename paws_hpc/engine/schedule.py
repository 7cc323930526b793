"""The learning rate as a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def warmup_cosine(
    step: int, *, peak: float, final: float, total_steps: int, start: float = 0.0, warmup_steps: int = 0
) -> float:
    """Linear warm-up, then half a cosine down to ``final``, where it stays.

    ``lr(t) = start + t/w (peak - start)`` for ``t < w``,
    then ``final + (peak - final)/2 (1 + cos(pi (t - w)/(T - w)))``.

    A step t is counted from 0 over the whole run of T steps, of which w are the warm-up; 0 begins at the peak.

    Raises:
        ValueError: ``step`` is negative, or the warm-up does not fit into the run.
    """
    if step < 0:
        raise ValueError(f"step={step} is negative; steps count from 0.")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"a warm-up of {warmup_steps} steps does not fit into a run of {total_steps}")
    if step >= total_steps:
        return final
    if step < warmup_steps:
        return start + step / warmup_steps * (peak - start)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + (peak - final) / 2 * (1 + math.cos(math.pi * progress))
