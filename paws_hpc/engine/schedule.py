"""The learning rate as a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, start: float, peak: float, final: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up, then half a cosine down to ``final``, where it stays.

    ``lr(t) = start + t/w (peak - start)`` for ``t < w``,
    then ``final + (peak - final)/2 (1 + cos(pi (t - w)/(T - w)))``.

    Args:
        step: t, counted from 0 over the whole run.
        start: value at step 0 if there is a warm-up.
        peak: value at step ``warmup_steps``.
        final: value from step ``total_steps`` on.
        warmup_steps: w; 0 begins at the peak.
        total_steps: T.

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
