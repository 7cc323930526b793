"""Where a training step's time goes, observed from outside, and what is counted: FLOPs, waits, graph breaks, memory.

On CUDA the marks between parts are events, which the device passes while the host runs ahead.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from paws_hpc.bench.workloads import rows_by_crop_group
from paws_hpc.config import Config
from paws_hpc.engine.pretrain import Pretraining

PARTS = ("augmentation", "forward", "loss", "loss, backward", "backward", "optimiser", "metrics")
"""In their order. ``loss`` holds the gather of supports; ``backward`` begins at the encoder's output."""

LOSS_PARTS = ("loss", "loss, backward", "optimiser")
"""Loss, gather and LARS."""

_END = "end"
_Mark = float | torch.cuda.Event


class Timeline:
    """Steps and their parts: the time from one mark to the next counts for the part that the first one names."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._steps: list[list[tuple[str, _Mark]]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step, which begins with its augmentation."""
        self._steps.append([])
        self.mark(PARTS[0])
        yield
        self.mark(_END)

    def mark(self, part: str) -> None:
        """From now on time counts for ``part``."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._steps[-1].append((part, event))
        else:
            self._steps[-1].append((part, time.perf_counter()))

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


def _seconds(start: _Mark, stop: _Mark) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(stop, torch.cuda.Event)
        return start.elapsed_time(stop) / 1000
    assert isinstance(stop, float)
    return stop - start


def synchronise(cuda: bool) -> None:
    """Wait for the GPU, if it is one."""
    if cuda:
        torch.cuda.synchronize()


def medians(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median over steps of each part, in the order of :data:`PARTS`, and of their ``step``; seconds."""
    parts = {part: statistics.median(step.get(part, 0.0) for step in steps) for part in PARTS}
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
    """Mark the parts of the steps that ``training`` takes while the block runs.

    The step itself knows nothing of it: its model, its ``backward`` and its optimiser are observed where they are
    called, so that whatever a step does between them is counted too.
    """
    torch_backward: Callable[..., Any] = torch.autograd.backward
    stream_augment, optimizer = training.stream.augment, training.optimizer

    def backward(*inputs: Any, **named: Any) -> Any:
        line.mark("loss, backward")
        return torch_backward(*inputs, **named)

    def augment(*inputs: Any) -> Any:
        line.mark("augmentation")
        return stream_augment(*inputs)

    with ExitStack() as undo:
        undo.enter_context(_replaced(training, "model", _MarkedModel(training.model, line)))
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


def forward_flops(model: nn.Module, size: int) -> int:
    """Floating-point operations of one image of ``size`` x ``size`` pixels, two per multiply-add."""
    meta = torch.device("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.to(meta)(torch.empty(1, 3, size, size, device=meta))
    return counter.get_total_flops()


def plain_images(config: Config, *, size: int = 224) -> float:
    """How many images of plain ResNet-50 training an unlabelled image of this step is worth, by FLOPs.

    Its crops and its part of the supports, through torchvision's ResNet-50: 4.74 for the paper's ImageNet recipe.
    """
    import torchvision  # noqa: PLC0415 - takes seconds

    with torch.device("meta"):
        model = torchvision.models.resnet50().eval()
    whole = sum(rows * forward_flops(model, side) for rows, side in rows_by_crop_group(config))
    return whole / config.pretrain.batch_size / forward_flops(model, size)


def host_waits(step: Callable[[], object], device: torch.device) -> int | None:
    """How often the host waits for the GPU in one step; None without one."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def graph_breaks() -> int | None:
    """How often torch.compile left graphs in this process; None where nothing was compiled."""
    compiler = sys.modules.get("torch._dynamo.utils")  # compiling imports it; here that would take seconds
    if compiler is None or not compiler.counters["stats"]["unique_graphs"]:
        return None
    return sum(compiler.counters["graph_break"].values())


def peak_memory_gb(device: torch.device) -> float:
    """Greatest memory so far, GB (10^9 bytes): of torch on a GPU, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
