"""Training a classifier on the labelled images: fine-tuning after PAWS, and the supervised baseline without it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paws_hpc import distributed
from paws_hpc.data.streams import ClassifierStream, EvaluationSet
from paws_hpc.data.views import AugmentConfig, CropConfig
from paws_hpc.engine.checkpoint import CheckpointFolder, save_tensors
from paws_hpc.engine.evaluate import forward_all, score
from paws_hpc.engine.metrics import Describe, MetricsWindow, ThroughputMeter
from paws_hpc.engine.parallel import replicate, synchronise_buffers, to_device
from paws_hpc.engine.schedule import warmup_cosine
from paws_hpc.engine.tracking import Tracker


def _crop() -> CropConfig:
    return CropConfig(size=224, count=1, scale=[0.08, 1.0])


def _flip_only() -> AugmentConfig:
    return AugmentConfig(
        brightness=0.0,
        contrast=0.0,
        saturation=0.0,
        hue=0.0,
        jitter_probability=0.0,
        grayscale_probability=0.0,
        blur_probability=0.0,
    )


@dataclass
class ClassifierConfig:
    """A sweep over learning rate and epochs (Appendix A: SGD, Nesterov momentum, no decay, cosine to 0, no warm-up).

    Batch normalisation takes each rank's own statistics, as the reference does, so that here, and here alone, the
    number of ranks is part of the result.

    Attributes:
        learning_rates: swept.
        epochs: swept.
        batch_size: labelled images per step over all ranks; a smaller labelled set is one batch.
        momentum: Nesterov.
        weight_decay: of all parameters.
        warmup_epochs: linear from 0.
        crop: of training.
        augment: of training crops; flip alone in the paper.
        validate_every_epochs: between scores on the local validation split; the best is kept.
    """

    learning_rates: list[float] = field(default_factory=lambda: [0.01, 0.02, 0.05, 0.1, 0.2])
    epochs: list[int] = field(default_factory=lambda: [30, 50])
    batch_size: int = 1024
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup_epochs: float = 0.0
    crop: CropConfig = field(default_factory=_crop)
    augment: AugmentConfig = field(default_factory=_flip_only)
    validate_every_epochs: int = 1

    def __post_init__(self) -> None:
        if not self.learning_rates or not self.epochs:
            raise ValueError("A sweep needs at least one learning rate and one number of epochs.")
        if min(self.learning_rates) <= 0 or min(self.epochs) < 1:
            raise ValueError(f"learning_rates={self.learning_rates} and epochs={self.epochs} must be positive.")
        if len({cell.name for cell in self.cells()}) < len(self.cells()):
            raise ValueError(
                f"learning_rates={self.learning_rates} or epochs={self.epochs} repeat a value (learning rates are "
                "told apart to six digits). Remove the repetition."
            )
        for name in ("batch_size", "validate_every_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} (of finetune or baseline) must be at least 1.")
        if not 0 <= self.momentum < 1 or self.weight_decay < 0 or self.warmup_epochs < 0:
            raise ValueError(
                f"momentum={self.momentum} must be in [0, 1), weight_decay={self.weight_decay} and "
                f"warmup_epochs={self.warmup_epochs} 0 or more (of finetune or baseline)."
            )

    def cells(self) -> list[Cell]:
        """All combinations, in a fixed order."""
        return [Cell(lr, epochs) for lr in self.learning_rates for epochs in self.epochs]


@dataclass(frozen=True)
class Cell:
    """One point of a sweep."""

    learning_rate: float
    epochs: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"lr={self.learning_rate:g},epochs={self.epochs}"


@dataclass(frozen=True)
class CellResult:
    """What a cell reports: its best accuracy on the local validation split, and when it had it."""

    validation_accuracy: float
    best_epoch: int


class ClassifierTraining:
    """A classifier in training: the objects that a checkpoint must hold, and the step that moves them."""

    def __init__(
        self,
        classifier: nn.Module,
        cell: Cell,
        config: ClassifierConfig,
        stream: ClassifierStream,
        device: torch.device,
    ) -> None:
        self.cell, self.config, self.stream, self.device = cell, config, stream, device
        self.classifier = to_device(classifier, device, torch.float32)
        self.model = replicate(self.classifier, device)
        self.optimizer = torch.optim.SGD(
            self.classifier.parameters(),
            cell.learning_rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
        self.total_steps = cell.epochs * stream.steps_per_epoch
        self.best: CellResult | None = None

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        best = None if self.best is None else [self.best.validation_accuracy, self.best.best_epoch]
        return {"classifier": self.classifier.state_dict(), "optimizer": self.optimizer.state_dict(), "best": best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = None if state["best"] is None else CellResult(*state["best"])

    def learning_rate(self, step: int) -> float:
        """Of a 0-based step: cosine to 0."""
        warmup = round(self.config.warmup_epochs * self.stream.steps_per_epoch)
        return warmup_cosine(
            step, start=0.0, peak=self.cell.learning_rate, final=0.0, warmup_steps=warmup, total_steps=self.total_steps
        )

    def step(self, images: Tensor, labels: Tensor, step: int) -> dict[str, Tensor]:
        """One step of cross-entropy; nothing is read back from the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        # Not this rank's mean: ranks may hold one image more or less, and their losses are averaged.
        loss = nn.functional.cross_entropy(self.model(images), labels, reduction="sum")
        loss = loss * distributed.world_size() / self.stream.batch_size
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"loss/total": loss.detach()}


def train_classifier(
    training: ClassifierTraining,
    *,
    validation: EvaluationSet,
    checkpoints: CheckpointFolder,
    tracker: Tracker,
    start: int,
    best_path: Path,
    describe: Describe,
) -> CellResult:
    """Train from step ``start`` to the end, scoring the local validation split and keeping the best weights.

    Args:
        training: holds the state, already restored if ``start`` is not 0.
        validation: labelled images that are not trained on.
        checkpoints: written at the end of every scored epoch.
        tracker: takes rows of metrics.
        start: steps already done.
        best_path: where the best weights go.
        describe: record positions → keys, for error messages.

    Raises:
        TrainingStoppedError: loss or weights are not finite.
    """
    window = MetricsWindow(describe, remedy="Take this learning rate out of the sweep.")
    meter = ThroughputMeter(training.stream.batch_size)
    per_epoch, labels = training.stream.steps_per_epoch, validation.labels
    with training.stream.prefetch(start, training.total_steps) as batches:
        for batch in meter.waiting_for(batches):
            images = training.stream.augment(batch, training.device, torch.float32)
            metrics = training.step(images, batch.labels.to(training.device), batch.step)
            window.add(batch.step, batch.records, training.learning_rate(batch.step), metrics)
            done = batch.step + 1
            epoch, last = done // per_epoch, done == training.total_steps
            if not last and done % (per_epoch * training.config.validate_every_epochs):
                continue
            synchronise_buffers(training.classifier)
            rows = window.read(training.classifier)
            rate = meter.read(len(rows))
            for row in rows:
                row.require_finite()
            accuracy = score(predict(training.classifier, validation, training.device).cpu(), labels).top1
            if training.best is None or accuracy > training.best.validation_accuracy:
                training.best = CellResult(accuracy, epoch)
                if distributed.is_main():
                    save_tensors(best_path, training.classifier.state_dict())
            tracker.log(
                batch.step,
                {
                    "epoch": epoch,
                    "loss": sum(row.metrics["loss/total"] for row in rows) / len(rows),
                    "lr": training.learning_rate(batch.step),
                    "validation_accuracy": accuracy,
                    **rate,
                },
            )
            checkpoints.save(done, training.state_dict())
            distributed.barrier()
            meter.restart()
    assert training.best is not None, "the last step is always scored"
    return training.best


def predict(classifier: nn.Module, images: EvaluationSet, device: torch.device) -> Tensor:
    """(N, K) logits of an evaluation set, on every rank."""
    return forward_all(classifier, images.batches(device, torch.float32), len(images))
