"""Where a training step's time goes, observed from outside.

On CUDA the marks are events, which the device passes while the host runs ahead.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from paws_hpc.engine.pretrain import Pretraining

PARTS = ("augmentation", "forward", "loss", "loss, backward", "backward", "metrics", "optimiser")
"""In their order. ``loss`` holds the gather of supports; ``backward`` begins at the encoder's output; ``metrics`` are
the gradient's norm, and the weight average after the optimiser."""

_END = "end"


class Timeline:
    """Marks of steps: the time from one mark to the next counts for what the first one names, one of :data:`PARTS`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step, which begins with its augmentation."""
        self.mark(PARTS[0])
        yield
        self.mark(_END)

    def mark(self, name: str) -> None:
        """From now on time counts for ``name``."""
        if self._device.type != "cuda":
            self._marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))

    def read(self) -> list[dict[str, float]]:
        """Seconds of each of :data:`PARTS`, step by step; waits for the device."""
        synchronise(self._device)
        steps = [dict.fromkeys(PARTS, 0.0)]
        for (name, start), (_, stop) in pairwise(self._marks):
            if name == _END:
                steps.append(dict.fromkeys(PARTS, 0.0))
            elif isinstance(start, float) and isinstance(stop, float):
                steps[-1][name] += stop - start
            else:
                assert isinstance(start, torch.cuda.Event)
                assert isinstance(stop, torch.cuda.Event)
                steps[-1][name] += start.elapsed_time(stop) / 1000
        return steps


def synchronise(device: torch.device) -> None:
    """Wait for the device, if it is a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def medians(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median over steps of each of :data:`PARTS`, and of their ``step``; seconds."""
    parts = {name: statistics.median(step[name] for step in steps) for name in PARTS}
    return parts | {"step": statistics.median(sum(step.values()) for step in steps)}


class _MarkedModel:
    """A model that marks its forward pass and the arrival of its output's gradient; all else is the model's own."""

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
    """Mark the steps that ``training`` takes while the block runs.

    Model, ``backward`` and optimiser are observed where the step calls them, so that whatever it does between them
    counts too.
    """
    optimizer = training.optimizer

    def marking(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any, **named: Any) -> Any:
            line.mark(name)
            return function(*inputs, **named)

        return call

    with ExitStack() as undo:
        for owner, name, observed in (
            (training, "model", _MarkedModel(training.model, line)),
            (training.stream, "augment", marking("augmentation", training.stream.augment)),
            (torch.autograd, "backward", marking("loss, backward", torch.autograd.backward)),
            (torch.nn.utils, "get_total_norm", marking("metrics", torch.nn.utils.get_total_norm)),
        ):
            undo.enter_context(patch.object(owner, name, observed))
        undo.callback(optimizer.register_step_pre_hook(lambda *_: line.mark("optimiser")).remove)
        undo.callback(optimizer.register_step_post_hook(lambda *_: line.mark("metrics")).remove)
        yield
