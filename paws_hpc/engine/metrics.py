"""Metrics between the device and the log: read in windows, checked for being finite, and timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from paws_hpc import distributed
from paws_hpc.data.samplers import Positions
from paws_hpc.engine.errors import TrainingStoppedError
from paws_hpc.engine.gpus import GpuMeter
from paws_hpc.engine.tracking import Row

Describe = Callable[[Positions], list[str]]
"""Record positions → keys, for messages."""


@dataclass(frozen=True)
class StepMetrics:
    """One training step, 0-based: its metrics, means over all ranks, and the ``fault`` that ends training, or None."""

    step: int
    lr: float
    metrics: dict[str, float]
    fault: str | None

    def require_finite(self) -> None:
        """Raise TrainingStoppedError if loss or weights are not finite; step, learning rate and batch are named."""
        if self.fault is not None:
            raise TrainingStoppedError(self.fault)


class MetricsWindow:
    """Metrics that stay on the device until they are read together, and the check that training is still finite.

    Reading one value forces the host to wait for the device; reading a window of steps costs as little as reading one.
    """

    def __init__(self, describe: Describe, *, remedy: str) -> None:
        """Begin an empty window; ``remedy`` is what a user can do about a loss that is not finite."""
        self._describe, self._remedy = describe, remedy
        self._steps: list[tuple[int, Positions, float, dict[str, Tensor]]] = []

    def add(self, step: int, records: Positions, lr: float, metrics: dict[str, Tensor]) -> None:
        """Remember a step: 0-based number, its images' positions, its learning rate and 0-dimensional metrics."""
        self._steps.append((step, records, lr, metrics))

    def read(self, model: nn.Module) -> list[StepMetrics]:
        """Average over ranks, bring to the host, and forget.

        The weights of ``model`` are checked too: the update of a step can fail although its loss is finite.
        """
        steps, self._steps = self._steps, []
        names = [(index, name) for index, (_, _, _, metrics) in enumerate(steps) for name in metrics]
        values = [steps[index][3][name].double() for index, name in names]
        *on_host, largest = distributed.mean_over_ranks(torch.stack([*values, _largest(model)])).tolist()
        averages: list[dict[str, float]] = [{} for _ in steps]
        for (index, name), value in zip(names, on_host, strict=True):
            averages[index][name] = value
        rows = []
        for index, (step, records, lr, _) in enumerate(steps):
            weights_fail = index == len(steps) - 1 and not math.isfinite(largest)
            fault = None
            if weights_fail or not math.isfinite(averages[index]["train/loss"]):
                fault = self._explain(step, records, lr, averages[index])
            rows.append(StepMetrics(step, lr, averages[index], fault))
        return rows

    def _explain(self, step: int, records: Positions, lr: float, metrics: dict[str, float]) -> str:
        terms = ", ".join(f"{name} {value:g}" for name, value in metrics.items() if name.startswith("train/loss"))
        what = "Weights or running statistics are" if math.isfinite(metrics["train/loss"]) else "The loss is"
        return (
            f"{what} not finite after step {step} (learning rate {lr:g}; {terms}). The batch on this "
            f"rank: {', '.join(self._describe(records)[:8])}, … {self._remedy} The last checkpoint is from before "
            "this step."
        )


@torch.no_grad()
def _largest(model: nn.Module) -> Tensor:
    """Greatest magnitude among parameters and buffers, 0-dimensional float64; not finite where one of them is not."""
    tensors = [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()]
    return torch.nn.utils.get_total_norm(tensors, math.inf).double()


BatchT = TypeVar("BatchT")


class ThroughputMeter:
    """Images per second over all ranks, the share of time spent waiting for data, and what the GPUs did meanwhile."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self._batch_size, self._gpus = batch_size, GpuMeter(device)
        self.restart()

    def restart(self) -> None:
        """Begin anew, so that scoring and saving do not count as slow training."""
        self._began, self._waited = time.monotonic(), 0.0

    def waiting_for(self, batches: Iterable[BatchT]) -> Iterator[BatchT]:
        """Pass batches on, counting the time until each arrives."""
        iterator = iter(batches)
        while True:
            began = time.monotonic()
            batch = next(iterator, None)
            if batch is None:
                return
            self._waited += time.monotonic() - began
            yield batch

    def read(self, steps: int) -> Row:
        """The figures of ``steps`` steps since the last reading, on all ranks together."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        row = {
            "train/images_per_s": steps * self._batch_size / seconds,
            "train/data_wait": self._waited / seconds,
            **self._gpus.read(),
        }
        self.restart()
        return row
