"""The loop of pre-training and of a classifier's training: steps, metrics, scores, checkpoints, and an orderly end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from paws_hpc.engine.checkpoint import CheckpointFolder
from paws_hpc.engine.errors import PreemptedError
from paws_hpc.engine.metrics import Describe, MetricsWindow, ThroughputMeter
from paws_hpc.engine.preemption import UNATTENDED, Interrupted, JobControl
from paws_hpc.engine.tracking import Row, Tracker

Validate = Callable[[], Row]
"""Scores the network on the local validation split; may raise Interrupted."""


class Training(ABC):
    """A network in training: the objects that a checkpoint must hold, and the step that moves them.

    Attributes:
        stream: of batches, a ``PawsStream`` or a ``ClassifierStream``.
        dtype: of images, weights and views.
        validated: steps done when the network was last scored.
    """

    EPOCHS: ClassVar[str]
    """Their config field."""
    REMEDY: ClassVar[str]
    """What a user can do about a loss that is not finite."""
    stream: Any
    dtype = torch.float32

    def __init__(
        self,
        device: torch.device,
        *,
        epochs: int,
        batch_size: int,
        log_every: int,
        save_every: int,
        validate_every_epochs: int,
    ) -> None:
        """Prepare; ``stream`` is set already. Metrics are read and checkpoints saved every so many steps."""
        self.device, self.epochs, self.batch_size = device, epochs, batch_size
        self.total_steps = epochs * self.stream.steps_per_epoch
        self.log_every, self.save_every = log_every, save_every
        self.validate_every = validate_every_epochs * self.stream.steps_per_epoch
        self.validated = 0

    def is_due(self, done: int, every: int) -> bool:
        """Whether ``done`` steps are a multiple of ``every``, or all that the run has."""
        return done % every == 0 or done == self.total_steps

    def awaits_validation(self, done: int) -> bool:
        """Whether the network is to be scored after ``done`` steps, and was not yet."""
        return self.is_due(done, self.validate_every) and self.validated != done

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that the next step and the result depend on; the data's position is the step itself."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""

    @abstractmethod
    def learning_rate(self, step: int) -> float:
        """Of a 0-based step."""

    @abstractmethod
    def step(self, batch: Any) -> dict[str, Tensor]:
        """One optimisation step; returns this rank's metrics, 0-dimensional. Nothing is read from the device."""

    @abstractmethod
    def report(self, window: MetricsWindow, meter: ThroughputMeter, tracker: Tracker) -> None:
        """Take in the steps since the last call; raise TrainingStoppedError if one has no finite loss, or collapsed."""

    @abstractmethod
    def score(self, done: int, validate: Validate, tracker: Tracker) -> None:
        """Score the network after ``done`` steps and log that; nothing has changed if ``validate`` is interrupted."""


def train(
    training: Training,
    *,
    checkpoints: CheckpointFolder,
    tracker: Tracker,
    start: int,
    validate: Validate,
    describe: Describe,
    control: JobControl = UNATTENDED,
    begun: Callable[[], None] = lambda: None,
) -> None:
    """Train from step ``start``, whose state is restored already, to the end.

    Args:
        training: what is trained.
        checkpoints: written every so many steps, at the end, and when the job must stop.
        tracker: takes rows of metrics.
        start: steps already done.
        validate: see :data:`Validate`.
        describe: record positions → keys, for error messages.
        control: checked before every step.
        begun: called once, after the first step.

    Raises:
        PreemptedError: by ``control``; the state is saved.
        TrainingStoppedError: loss or weights are not finite, or predictions have collapsed.
        ValueError: the run ends before ``start``.
    """
    if start > training.total_steps:
        raise ValueError(
            f"The checkpoint is of step {start}, but {training.epochs} epochs end at step {training.total_steps}. "
            f"Raise {training.EPOCHS}, or remove the later checkpoints."
        )
    window = MetricsWindow(describe, remedy=training.REMEDY)
    meter = ThroughputMeter(training.batch_size, training.device)
    done = saved = start
    try:
        if training.awaits_validation(start):  # the job had to stop before it had finished
            training.score(start, validate, tracker)
            meter.restart()
        with checkpoints, training.stream.prefetch(start, training.total_steps, training.dtype) as batches:
            for batch in meter.waiting_for(batches):
                control.check()
                checkpoints.check()
                window.add(batch.step, batch.records, training.learning_rate(batch.step), training.step(batch))
                done = batch.step + 1
                tracker.reached(done)
                if done == start + 1:
                    begun()
                validating, saving = training.awaits_validation(done), training.is_due(done, training.save_every)
                if validating or saving or training.is_due(done, training.log_every):
                    training.report(window, meter, tracker)
                if validating:
                    training.score(done, validate, tracker)
                if saving:
                    tracker.sync()
                    checkpoints.save(done, training.state_dict())
                    saved = done
                if saving or validating:
                    meter.restart()
    except Interrupted:
        training.report(window, meter, tracker)
        if saved != done or checkpoints.lost:  # what is on disk stays as it is: replacing it could lose it
            tracker.sync()
            checkpoints.save(done, training.state_dict())
        checkpoints.wait()
        raise PreemptedError(done) from None
    checkpoints.wait()
