"""Training a classifier on the labelled images: fine-tuning after PAWS, and the supervised baseline without it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paws_hpc import distributed
from paws_hpc.data.devices import to_device
from paws_hpc.data.streams import ClassifierStream, EvaluationSet, LabelledBatch
from paws_hpc.engine.checkpoint import CheckpointFolder, save_tensors
from paws_hpc.engine.config import ClassifierConfig
from paws_hpc.engine.errors import PreemptedError
from paws_hpc.engine.evaluate import forward_set, score
from paws_hpc.engine.metrics import Describe, MetricsWindow, ThroughputMeter
from paws_hpc.engine.parallel import move, replicate, synchronise_buffers
from paws_hpc.engine.preemption import UNATTENDED, Interrupted, JobControl
from paws_hpc.engine.schedule import warmup_cosine
from paws_hpc.engine.tracking import Row, Tracker


@dataclass(frozen=True)
class BestScore:
    """What a trial reports: its best accuracy on the local validation split, and when it had it."""

    validation_accuracy: float
    best_epoch: int


class ClassifierTraining:
    """A classifier in training: the objects that a checkpoint must hold, and the step that moves them.

    Attributes:
        best: the result so far; None before the first score.
        best_weights: of that moment, on the host. They are in the checkpoint: a file of their own could be newer or
            older than the checkpoint.
        validated: steps done when the classifier was last scored.
        loss_sum: of the steps since then, in nats.
        loss_steps: their number.
    """

    def __init__(
        self, classifier: nn.Module, config: ClassifierConfig, stream: ClassifierStream, device: torch.device
    ) -> None:
        self.config, self.stream, self.device = config, stream, device
        self.classifier = move(classifier, device, torch.float32)
        self.model = replicate(self.classifier, device)
        self.optimizer = torch.optim.SGD(
            self.classifier.parameters(),
            config.learning_rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
        self.total_steps = config.epochs * stream.steps_per_epoch
        self.best: BestScore | None = None
        self.best_weights: dict[str, Tensor] | None = None
        self.validated = 0
        self.loss_sum, self.loss_steps = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """All that the next step and the final result depend on."""
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": None if self.best is None else [self.best.validation_accuracy, self.best.best_epoch],
            "best_weights": self.best_weights,
            "validated": self.validated,
            "loss": [self.loss_sum, self.loss_steps],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = None if state["best"] is None else BestScore(*state["best"])
        self.best_weights = None if state["best_weights"] is None else _on_host(state["best_weights"])
        self.validated = state["validated"]
        self.loss_sum, self.loss_steps = state["loss"]

    def awaits_validation(self, done: int) -> bool:
        """Whether the classifier is to be scored after ``done`` steps, and was not yet."""
        every = self.stream.steps_per_epoch * self.config.validate_every_epochs
        return (done % every == 0 or done == self.total_steps) and self.validated != done

    def learning_rate(self, step: int) -> float:
        """Of a 0-based step: cosine to 0."""
        warmup, peak = round(self.config.warmup_epochs * self.stream.steps_per_epoch), self.config.learning_rate
        return warmup_cosine(step, start=0.0, peak=peak, final=0.0, warmup_steps=warmup, total_steps=self.total_steps)

    def step(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """One step of cross-entropy; returns this rank's loss, which stays on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(batch.step)
        images = (
            self.stream.augment(batch, self.device, torch.float32)
            if batch.prefetched is None
            else batch.prefetched.take()[0]
        )
        logits = self.model(images)
        # Not this rank's mean: ranks may hold one image more or less, and their losses are averaged.
        loss = nn.functional.cross_entropy(logits, to_device(batch.labels, self.device), reduction="sum")
        loss = loss * distributed.world_size() / self.stream.batch_size
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"train/loss": loss.detach()}

    def record_score(self, done: int, accuracy: float) -> None:
        """Take the validation accuracy after ``done`` steps; keep the weights if it is the best so far."""
        if self.best is None or accuracy > self.best.validation_accuracy:
            self.best = BestScore(accuracy, done // self.stream.steps_per_epoch)
            self.best_weights = _on_host(self.classifier.state_dict())
        self.validated, self.loss_sum, self.loss_steps = done, 0.0, 0


def _on_host(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy, contiguous, so that the same weights give the same file whatever their layout on the device."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in weights.items()}


def train_classifier(
    training: ClassifierTraining,
    *,
    validation: EvaluationSet,
    checkpoints: CheckpointFolder,
    tracker: Tracker,
    start: int,
    best_path: Path,
    describe: Describe,
    control: JobControl = UNATTENDED,
) -> BestScore:
    """Train from step ``start`` to the end, scoring the local validation split, and write the best weights.

    Args:
        training: holds the state, already restored if ``start`` is not 0.
        validation: labelled images that are not trained on.
        checkpoints: written at the end of every scored epoch, and when the job must stop.
        tracker: takes rows of metrics.
        start: steps already done.
        best_path: where the best weights go, at the end.
        describe: record positions → keys, for error messages.
        control: may interrupt before every step and every batch of an evaluation.

    Raises:
        PreemptedError: the job must stop, and the state is saved.
        TrainingStoppedError: loss or weights are not finite.
    """
    window = MetricsWindow(describe, remedy="Take this learning rate out of the sweep.")
    meter = ThroughputMeter(training.stream.batch_size, training.device)
    done = saved = start
    try:
        if training.awaits_validation(start):  # the job had to stop before the score was complete
            _log_score(training, start, validation, tracker, rate={}, control=control)
            meter.restart()
        with checkpoints, training.stream.prefetch(start, training.total_steps, torch.float32) as batches:
            for batch in meter.waiting_for(batches):
                control.check()
                checkpoints.check()
                window.add(batch.step, batch.records, training.learning_rate(batch.step), training.step(batch))
                done = batch.step + 1
                if training.awaits_validation(done):
                    synchronise_buffers(training.classifier)
                    rate = meter.read(_read_losses(training, window))
                    _log_score(training, done, validation, tracker, rate=rate, control=control)
                    checkpoints.save(done, training.state_dict())
                    saved = done
                    meter.restart()
    except Interrupted:
        _read_losses(training, window)
        if saved != done or checkpoints.lost:  # what is on disk stays as it is: replacing it could lose it
            checkpoints.save(done, training.state_dict())
        checkpoints.wait()
        raise PreemptedError(done) from None
    checkpoints.wait()
    assert training.best is not None, "the last step is always scored"
    if distributed.is_main():
        save_tensors(best_path, training.best_weights, fence=control.fence)
    return training.best


def _read_losses(training: ClassifierTraining, window: MetricsWindow) -> int:
    """Add the steps of the window to the running mean; returns their number. Raise if a loss is not finite."""
    steps = window.read(training.classifier)
    for step in steps:
        step.require_finite()
        training.loss_sum += step.metrics["train/loss"]
        training.loss_steps += 1
    return len(steps)


def _log_score(
    training: ClassifierTraining,
    done: int,
    validation: EvaluationSet,
    tracker: Tracker,
    *,
    rate: Row,
    control: JobControl,
) -> None:
    """Score the classifier after ``done`` steps, with synchronised buffers, and log the epochs since the last score.

    Nothing has changed if ``control`` interrupts. ``rate`` is the throughput, empty before this process's first step.
    """
    logits = forward_set(training.classifier, validation, training.device, control)
    accuracy = score(logits.cpu(), validation.labels).top1
    row: Row = {
        "epoch": done // training.stream.steps_per_epoch,
        "train/loss": training.loss_sum / training.loss_steps,
        "train/lr": training.learning_rate(done - 1),
        "val/top1": accuracy,
        **rate,
    }
    training.record_score(done, accuracy)
    tracker.log(done - 1, row)
