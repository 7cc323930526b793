"""Metrics between the device and the log: read in windows, checked for being finite, and timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from paws_hpc import distributed
from paws_hpc.data.order import Positions
from paws_hpc.engine.tracking import Row

Describe = Callable[[Positions], list[str]]
"""Record positions → keys, for messages."""


class TrainingStoppedError(RuntimeError):
    """Training cannot usefully go on: the loss is not finite, or predictions have collapsed."""


class Batch(Protocol):
    """What a message about a step needs to know of its batch."""

    @property
    def step(self) -> int:
        """0-based."""

    @property
    def records(self) -> Positions:
        """Positions of its images in their store."""


BatchT = TypeVar("BatchT", bound=Batch)


class MetricsWindow:
    """Metrics that stay on the device until they are read together, and the check that they are finite.

    Reading one value forces the host to wait for the device; reading a window of steps costs as little as reading one.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[Batch, float, dict[str, Tensor]]] = []

    def add(self, batch: Batch, lr: float, metrics: dict[str, Tensor]) -> None:
        """Remember a step's metrics."""
        self._steps.append((batch, lr, metrics))

    def read(self, describe: Describe) -> list[tuple[Batch, float, dict[str, float]]]:
        """Average over ranks, bring to the host, and forget.

        Raises:
            TrainingStoppedError: a loss is not finite; step, learning rate and the images of the batch are named.
        """
        names = [(index, name) for index, (_, _, metrics) in enumerate(self._steps) for name in metrics]
        values = torch.stack([self._steps[index][2][name].double() for index, name in names])
        on_host = distributed.mean_over_ranks(values).tolist()
        rows = [(batch, lr, dict[str, float]()) for batch, lr, _ in self._steps]
        for (index, name), value in zip(names, on_host, strict=True):
            rows[index][2][name] = value
        self._steps.clear()
        for batch, lr, metrics in rows:
            if not math.isfinite(metrics["loss/total"]):
                raise TrainingStoppedError(
                    f"The loss is {metrics['loss/total']} at step {batch.step} (learning rate {lr:g}; terms: "
                    f"{ {name: value for name, value in metrics.items() if name.startswith('loss/')} }). The batch on "
                    f"this rank: {', '.join(describe(batch.records)[:8])}, … Lower optimizer.peak_lr or lengthen "
                    "optimizer.warmup_epochs; the last checkpoint is from before this step."
                )
        return rows


class ThroughputMeter:
    """Images per second over all ranks, and the share of time spent waiting for data."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Begin anew, so that scoring and saving do not count as slow training."""
        self._began, self._waited = time.monotonic(), 0.0

    def waiting_for(self, batches: Iterable[BatchT]) -> Iterator[BatchT]:
        """Pass batches on, counting the time until each arrives."""
        iterator = iter(batches)
        while True:
            asked = time.monotonic()
            batch = next(iterator, None)
            if batch is None:
                return
            self._waited += time.monotonic() - asked
            yield batch

    def read(self, steps: int) -> Row:
        """The figures of ``steps`` steps since the last reading."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        row = {
            "throughput/images_per_s": steps * self._batch_size / seconds,
            "throughput/data_wait": self._waited / seconds,
        }
        self.restart()
        return row
