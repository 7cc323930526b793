"""How training ends before its time; without torch, for those who only need to catch it."""

from __future__ import annotations


class TrainingStoppedError(RuntimeError):
    """Training cannot usefully go on: the loss is not finite, or predictions have collapsed."""


class PreemptedError(Exception):
    """Training stopped before its end on request, and its state is saved.

    Attributes:
        step: steps done, which are those of the newest checkpoint; 0 without one.
    """

    def __init__(self, step: int) -> None:
        place = f"after step {step}, which is saved" if step else "before its first step"
        super().__init__(f"stopped on request {place}")
        self.step = step
