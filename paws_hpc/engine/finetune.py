"""Training a classifier on the labelled images: fine-tuning after PAWS, and the supervised baseline without it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paws_hpc import distributed
from paws_hpc.data.devices import to_device
from paws_hpc.data.streams import ClassifierStream, LabelledBatch
from paws_hpc.engine.config import ClassifierConfig
from paws_hpc.engine.loop import Training, Validate
from paws_hpc.engine.metrics import MetricsWindow, ThroughputMeter
from paws_hpc.engine.parallel import move, replicate, synchronise_buffers
from paws_hpc.engine.schedule import warmup_cosine
from paws_hpc.engine.tracking import Row, Tracker


class ClassifierTraining(Training):
    """A classifier in training.

    Attributes:
        best: best accuracy on the local validation split so far, and its epoch; None before the first score.
        best_weights: of that moment, on the host. They are in the checkpoint: a file of their own could be newer or
            older than the checkpoint.
        scores: the accuracies so far, one for each validation.
        loss_sum: of the steps since the last score, in nats.
        loss_steps: their number.
    """

    EPOCHS = "the trial's epochs"
    REMEDY = "Take this learning rate out of the sweep."
    stream: ClassifierStream

    def __init__(
        self, classifier: nn.Module, config: ClassifierConfig, stream: ClassifierStream, device: torch.device
    ) -> None:
        self.config, self.stream = config, stream
        steps = config.validate_every_epochs * stream.steps_per_epoch
        super().__init__(
            device, epochs=config.epochs, batch_size=stream.batch_size, log_every=steps, save_every=steps,
            validate_every_epochs=config.validate_every_epochs,
        )  # fmt: skip
        self.classifier = move(classifier, device, torch.float32)
        self.model = replicate(self.classifier, device)
        self.optimizer = torch.optim.SGD(
            self.classifier.parameters(),
            config.learning_rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
        self.best: tuple[float, int] | None = None
        self.best_weights: dict[str, Tensor] | None = None
        self.scores: list[float] = []
        self.loss_sum, self.loss_steps = 0.0, 0
        self._rate: Row = {}

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Training`."""
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": None if self.best is None else [*self.best],
            "best_weights": self.best_weights,
            "scores": [*self.scores],
            "validated": self.validated,
            "loss": [self.loss_sum, self.loss_steps],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`Training`."""
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = None if state["best"] is None else tuple(state["best"])
        self.best_weights = None if state["best_weights"] is None else _on_host(state["best_weights"])
        self.validated = state["validated"]
        self.scores = [*state.get("scores", [])]  # of an older version: validated on held-out images, which need none
        self.loss_sum, self.loss_steps = state["loss"]

    def learning_rate(self, step: int) -> float:
        """Of a 0-based step: cosine to 0."""
        warmup, peak = round(self.config.warmup_epochs * self.stream.steps_per_epoch), self.config.learning_rate
        return warmup_cosine(step, peak=peak, final=0.0, warmup_steps=warmup, total_steps=self.total_steps)

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

    def report(self, window: MetricsWindow, meter: ThroughputMeter, tracker: Tracker) -> None:
        """Add the losses of the steps since the last call to the running mean; see :class:`Training`."""
        steps = window.read(self.classifier)
        for step in steps:
            step.require_finite()
            self.loss_sum += step.metrics["train/loss"]
            self.loss_steps += 1
        self._rate = meter.read(len(steps))

    def score(self, done: int, validate: Validate, tracker: Tracker) -> None:
        """Log the epochs since the last score, and keep the weights if they are the best; see :class:`Training`."""
        synchronise_buffers(self.classifier)
        scores = validate()
        accuracy, epoch = float(scores["val/top1"]), done // self.stream.steps_per_epoch
        loss, rate = {"train/loss": self.loss_sum / self.loss_steps}, {"train/lr": self.learning_rate(done - 1)}
        if self.best is None or accuracy > self.best[0]:
            self.best = accuracy, epoch
            self.best_weights = _on_host(self.classifier.state_dict())
        self.scores.append(accuracy)
        self.validated, self.loss_sum, self.loss_steps = done, 0.0, 0
        tracker.log(done - 1, {"epoch": epoch, **loss, **rate, **scores, **self._rate})


def _on_host(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy, contiguous, so that the same weights give the same file whatever their layout on the device."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in weights.items()}
