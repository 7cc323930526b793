"""Where the time of a training step goes, seen from outside: marks between its parts.

On CUDA marks are events, which the device passes while the host runs ahead; nothing waits until all steps are done.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from paws_hpc.engine.pretrain import Pretraining

PARTS = ("augmentation", "forward", "loss", "loss, backward", "backward", "optimiser", "metrics")
"""In their order. ``loss`` holds the gather of supports, the two ``backward`` divide where the encoder's begins."""

LOSS_PARTS = ("loss", "loss, backward", "optimiser")
"""Loss, gather and LARS."""

_END = "end"
_Mark = float | torch.cuda.Event


class Timeline:
    """Steps and their parts: time from one mark to the next counts for the part that the first one names."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._steps: list[list[tuple[str, _Mark]]] = []

    def begin(self) -> None:
        """A step begins, with its augmentation."""
        self.close()
        self._steps.append([])
        self.mark(PARTS[0])

    def mark(self, part: str) -> None:
        """From now on time counts for ``part``."""
        self._steps[-1].append((part, self._now()))

    def close(self) -> None:
        """The step has ended, if it had not."""
        if self._steps and self._steps[-1][-1][0] != _END:
            self.mark(_END)

    def read(self) -> list[dict[str, float]]:
        """Seconds of each part, step by step; waits for the device."""
        synchronise(self._cuda)
        steps = []
        for marks in self._steps:
            parts: dict[str, float] = defaultdict(float)
            for (part, start), (_, stop) in pairwise(marks):
                parts[part] += _seconds(start, stop)
            steps.append(dict(parts))
        return steps

    def _now(self) -> _Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def synchronise(cuda: bool) -> None:
    """Wait for the GPU, if it is one."""
    if cuda:
        torch.cuda.synchronize()


def _seconds(start: _Mark, stop: _Mark) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(stop, torch.cuda.Event)
        return start.elapsed_time(stop) / 1000
    assert isinstance(stop, float)
    return stop - start


def medians(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median over steps of each part, in the order of :data:`PARTS`, and of their ``step``; seconds."""
    found = {part: statistics.median(step.get(part, 0.0) for step in steps) for part in PARTS}
    return found | {"step": statistics.median(sum(step.values()) for step in steps)}


class _Marked:
    """A model whose forward pass is marked, and the arrival of its output's gradient; all else is the model's own."""

    def __init__(self, model: nn.Module, line: Timeline) -> None:
        self._model, self._line = model, line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        self._line.mark("forward")
        h, z = self._model(views)
        self._line.mark("loss")
        if z.requires_grad:
            z.register_hook(lambda _: self._line.mark("backward"))
        return h, z


@contextmanager
def marked(training: Pretraining, line: Timeline) -> Iterator[None]:
    """Mark the parts of the steps that ``training`` takes while the block runs.

    The step itself knows nothing of it: its model, its ``backward`` and its optimiser are observed where they are
    called, so that whatever a step does between them is counted too.
    """

    def backward(*inputs: Any, **named: Any) -> Any:
        line.mark("loss, backward")
        return of_torch(*inputs, **named)

    def augment(*inputs: Any) -> Any:
        line.mark("augmentation")
        return of_stream(*inputs)

    of_torch: Callable[..., Any] = torch.autograd.backward
    of_stream, optimizer = training.stream.augment, training.optimizer
    with ExitStack() as undo:
        undo.enter_context(_replaced(training, "model", _Marked(training.model, line)))
        undo.enter_context(_replaced(training.stream, "augment", augment))
        undo.enter_context(_replaced(torch.autograd, "backward", backward))
        for handle in (
            optimizer.register_step_pre_hook(lambda *_: line.mark("optimiser")),
            optimizer.register_step_post_hook(lambda *_: line.mark("metrics")),
        ):
            undo.callback(handle.remove)
        yield


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)
