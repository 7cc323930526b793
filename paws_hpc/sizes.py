"""Sizes in the config are global: what a rank holds must come out even."""

from __future__ import annotations


def check_divides(total: int, ranks: int, *, name: str, accumulate_steps: int = 1) -> None:
    """Raise ValueError, naming the nearest sizes that would fit, unless all micro-batches of all ranks are equal."""
    pieces = ranks * accumulate_steps
    if total % pieces:
        below = total - total % pieces
        fits = f"{below} or {below + pieces}" if below else f"{pieces}"
        micro_batches = f" with pretrain.accumulate_steps={accumulate_steps} each" if accumulate_steps > 1 else ""
        raise ValueError(
            f"{name}={total} does not divide by {ranks} ranks{micro_batches}. Sizes are global: {name}={fits} would "
            "fit."
        )
