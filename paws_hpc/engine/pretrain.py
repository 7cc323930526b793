"""PAWS pre-training: one step, and the loop around it.

Legend: n unlabelled images and S support rows per rank, m small crops, K classes in the support, D features, W ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from paws_hpc import distributed
from paws_hpc.data.devices import to_device
from paws_hpc.data.streams import PawsBatch, PawsStream
from paws_hpc.engine.accumulation import accumulate, rows_of_parts, spread_momentum
from paws_hpc.engine.averaging import WeightAverage
from paws_hpc.engine.checkpoint import CheckpointFolder
from paws_hpc.engine.compiled import as_written, compile_passes
from paws_hpc.engine.metrics import Describe, MetricsWindow, ThroughputMeter, TrainingStoppedError
from paws_hpc.engine.optimizer import OptimizerConfig, build_optimizer, set_rates
from paws_hpc.engine.parallel import move, replicate, synchronise_buffers
from paws_hpc.engine.preemption import UNATTENDED, Interrupted, JobControl, PreemptedError
from paws_hpc.engine.schedule import warmup_cosine
from paws_hpc.engine.tracking import Row, Tracker
from paws_hpc.models import Encoder
from paws_hpc.objective import (
    CollapseMonitor,
    ObjectiveConfig,
    TrueClasses,
    class_labels,
    paws_loss,
    supervised_nce,
    support_warmup_weight,
)
from paws_hpc.objective.diagnostics import diagnose


@dataclass
class SupportConfig:
    """The support mini-batch of a step, over all ranks.

    Attributes:
        classes: drawn per step, K.
        images_per_class: drawn from each.
    """

    classes: int = 960
    images_per_class: int = 7

    def __post_init__(self) -> None:
        if self.classes < 2 or self.images_per_class < 1:
            raise ValueError(
                f"pretrain.support.classes={self.classes} must be at least 2 and "
                f"pretrain.support.images_per_class={self.images_per_class} at least 1."
            )


@dataclass
class CollapseConfig:
    """When uniform predictions count as collapse.

    Attributes:
        tolerance: relative distance of both loss terms from log K below which predictions count as uniform.
        patience_steps: consecutive steps after which it is reported.
        action: ``warn`` once, or ``stop`` the run.
    """

    tolerance: float = 0.02
    patience_steps: int = 1000
    action: str = "stop"

    def __post_init__(self) -> None:
        if self.action not in ("warn", "stop"):
            raise ValueError(f"pretrain.collapse.action={self.action!r} must be 'warn' or 'stop'.")
        if not 0 <= self.tolerance < 1 or self.patience_steps < 1:
            raise ValueError(
                f"pretrain.collapse.tolerance={self.tolerance} must be in [0, 1) and "
                f"pretrain.collapse.patience_steps={self.patience_steps} at least 1."
            )


@dataclass
class PretrainConfig:
    """The pre-training loop; sizes are global, whatever the number of ranks.

    Attributes:
        batch_size: unlabelled images per step.
        accumulate_steps: micro-batches per step, equal parts of its images and supports that go through the network one
            after the other, twice, so that only one part's activations are in memory. The gradient is that of the whole
            batch's loss, which couples all its rows (paws_hpc/engine/accumulation.py). One thing differs from a single
            pass: batch normalisation takes the statistics of a micro-batch, over all ranks. So a run with 8 parts is
            the same on 1, 8 and 64 GPUs, but is not the run with 1.
        epochs: passes over all training images.
        support: labelled images per step.
        collapse: detection of uniform predictions.
        ema: decay d in (0, 1) of an average of the weights that takes their place wherever they are scored, fine-tuned
            or handed on: the weights of s steps ago count d^s (paws_hpc/engine/averaging.py). None: the weights
            themselves.
        precision: ``auto`` (bf16 autocast on CUDA, fp32 elsewhere), ``bf16``, ``fp32`` or ``fp64``. The loss is fp32
            or wider in every case.
        compile: whether the network goes through ``torch.compile``, which takes a while at every start
            (paws_hpc/engine/compiled.py).
        log_every_steps: between rows of metrics; also how often device values are read by the host.
        diagnose_every_steps: between the diagnostics of Fig. 4.
        validate_every_epochs: between PAWS-NN scores on the local validation split.
        checkpoint_every_steps: between checkpoints.
        keep_checkpoints: kept at any time.
    """

    batch_size: int = 4096
    accumulate_steps: int = 1
    epochs: int = 100
    support: SupportConfig = field(default_factory=SupportConfig)
    collapse: CollapseConfig = field(default_factory=CollapseConfig)
    ema: float | None = None
    precision: str = "auto"
    compile: bool = False
    log_every_steps: int = 10
    diagnose_every_steps: int = 100
    validate_every_epochs: int = 10
    checkpoint_every_steps: int = 200
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "bf16", "fp32", "fp64"):
            raise ValueError(f"pretrain.precision={self.precision!r} must be auto, bf16, fp32 or fp64.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"pretrain.ema={self.ema} must be in (0, 1), such as 0.999, or null to turn it off.")
        for name in (
            "batch_size",
            "accumulate_steps",
            "epochs",
            "log_every_steps",
            "diagnose_every_steps",
            "validate_every_epochs",
            "checkpoint_every_steps",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"pretrain.{name}={getattr(self, name)} must be at least 1.")


@dataclass(frozen=True)
class PretrainSummary:
    """What ``summary.json`` says of a finished pre-training."""

    steps: int
    collapsed: bool
    seconds: float


class Pretraining:
    """An encoder in training: the objects that a checkpoint must hold, and the step that moves them."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        config: PretrainConfig,
        stream: PawsStream,
        device: torch.device,
    ) -> None:
        self.objective, self.optimizer_config, self.config = objective, optimizer, config
        self.stream, self.device = stream, device
        self.total_steps = config.epochs * stream.steps_per_epoch
        self.half = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
        dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.encoder = move(encoder, device, dtype)
        self.average = None if config.ema is None else WeightAverage(self.encoder, config.ema)
        self.model = replicate(self.encoder, device)
        spread_momentum(self.encoder, config.accumulate_steps)
        if config.compile:
            compile_passes(self.encoder)
        self.optimizer = build_optimizer(self.encoder, optimizer)
        collapse = config.collapse
        self.monitor = CollapseMonitor(
            config.support.classes, tolerance=collapse.tolerance, patience=collapse.patience_steps
        )
        self.collapsed = False
        self.validated = 0  # steps done when the encoder was last scored

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on; the data's place is the step itself."""
        return {
            "encoder": self.encoder.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "monitor": self.monitor.state_dict(),
            "collapsed": self.collapsed,
            "validated": self.validated,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.encoder.load_state_dict(state["encoder"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.monitor.load_state_dict(state["monitor"])
        self.collapsed = state["collapsed"]
        self.validated = state["validated"]

    @property
    def result(self) -> Encoder:
        """The encoder that is scored and handed on: the average of the weights if there is one, or the weights."""
        return self.encoder if self.average is None else self.average.module

    def awaits_validation(self, done: int) -> bool:
        """Whether the encoder is to be scored after ``done`` steps, and was not yet."""
        every = self.config.validate_every_epochs * self.stream.steps_per_epoch
        return (done % every == 0 or done == self.total_steps) and self.validated != done

    def learning_rate(self, step: int) -> float:
        """Of a 0-based step."""
        schedule, per_epoch = self.optimizer_config, self.stream.steps_per_epoch
        return warmup_cosine(
            step,
            start=schedule.start_lr,
            peak=schedule.peak_lr,
            final=schedule.final_lr,
            warmup_steps=round(schedule.warmup_epochs * per_epoch),
            total_steps=self.total_steps,
        )

    def step(self, batch: PawsBatch) -> dict[str, Tensor]:
        """One optimisation step (paper, eq. 4); nothing is read back from the device.

        Returns:
            0-dimensional tensors named as in ``metrics.jsonl``, of this rank.
        """
        weight_decay = self.optimizer_config.weight_decay_at(batch.step, total_steps=self.total_steps)
        set_rates(self.optimizer, lr=self.learning_rate(batch.step), weight_decay=weight_decay)
        self.optimizer.zero_grad(set_to_none=True)
        if len(batch.parts) == 1:
            h, z = self._encode(self.model, batch, 0)
            metrics = self._losses(batch, h, z)
            metrics["loss/total"].backward()
        else:
            metrics = self._accumulate(batch)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.encoder, batch.step)
        with torch.no_grad():
            metrics["gradient/norm"] = torch.nn.utils.get_total_norm(
                [p.grad for p in self.encoder.parameters() if p.grad is not None]
            )
        return {name: value.detach() for name, value in metrics.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and images."""
        return next(self.encoder.parameters()).dtype

    def _encode(self, network: nn.Module, batch: PawsBatch, part: int) -> tuple[Tensor, Tensor]:
        if batch.ahead is not None:
            views = batch.ahead.take()
        else:
            views = self.stream.augment(batch.parts[part], self.device, self.dtype)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            h, z = network(views)
        return h, z

    def _accumulate(self, batch: PawsBatch) -> dict[str, Tensor]:
        views, images, parts = self.stream.views, len(batch.records), len(batch.parts)
        supports = batch.num_support_rows // views.support_views
        kinds = [(views.support_views, supports), (2, images), (views.small.count, images)]
        return accumulate(
            self.model,
            encode=lambda network, part: self._encode(network, batch, part),
            losses=lambda h, z: self._losses(batch, h, z),
            rows=to_device(rows_of_parts(kinds, parts), self.device),
        )

    def _losses(self, batch: PawsBatch, h: Tensor, z: Tensor) -> dict[str, Tensor]:
        rows, large = batch.num_support_rows, 2 * len(batch.records)
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        supports, target_supports = distributed.gather_rows_and_constants(z[:rows], h[:rows], dtype=wide)
        labels = class_labels(
            batch.support_classes,
            self.config.support.classes,
            smoothing=self.objective.label_smoothing,
            device=self.device,
        )
        loss = paws_loss(
            z[rows:].to(wide),
            supports,
            h[rows : rows + large].detach().to(wide),
            target_supports,
            labels,
            temperature=self.objective.temperature,
            sharpening=self.objective.sharpening,
            num_small_crops=self.stream.views.small.count,
            me_max=self.objective.me_max,
            target_floor=self.objective.target_floor,
            true_classes=self._true_classes(batch),
            entropy_weight=self.objective.entropy_weight,
        )
        metrics = {"loss/consistency": loss.consistency, "loss/me_max": loss.me_max, "loss/total": loss.total}
        if self.objective.entropy_weight > 0:
            metrics["loss/entropy"] = loss.entropy
        weight = support_warmup_weight(
            batch.step,
            total_steps=self.total_steps,
            fraction=self.objective.support_warmup_fraction,
            weight=self.objective.support_warmup_weight,
        )
        if weight > 0:  # ours, not the paper's: keeps few-label runs from collapsing in their first epochs
            hard = replace(labels, smoothing=0.0)
            metrics["loss/support_nce"] = supervised_nce(supports, hard, temperature=self.objective.temperature)
            metrics["loss/total"] = loss.total + weight * metrics["loss/support_nce"]
        if batch.step % self.config.diagnose_every_steps == 0:
            metrics |= diagnose(z[rows : rows + large].to(wide), supports, labels, loss, self.objective)
        return metrics

    def _true_classes(self, batch: PawsBatch) -> TrueClasses | None:
        if not self.objective.true_label_targets:
            return None
        return TrueClasses(to_device(batch.known, self.device), to_device(batch.known_classes, self.device))


def pretrain(
    training: Pretraining,
    *,
    checkpoints: CheckpointFolder,
    tracker: Tracker,
    start: int,
    validate: Callable[[], Row],
    describe: Describe,
    control: JobControl = UNATTENDED,
) -> PretrainSummary:
    """Train from step ``start`` to the end.

    Args:
        training: holds the state, already restored if ``start`` is not 0.
        checkpoints: written every so many steps, at the end, and when the job is asked to stop.
        tracker: takes rows of metrics.
        start: steps already done.
        validate: scores the encoder on the local validation split, as a row of metrics whose names begin with
            ``validation``; may raise Interrupted.
        describe: record positions → keys, for error messages.
        control: asked before every step.

    Raises:
        PreemptedError: ``control`` asked to stop, and the state is saved.
        TrainingStoppedError: loss or weights are not finite, or predictions collapsed and ``collapse.action`` is
            ``stop``.
        ValueError: the run ends before ``start``.
    """
    config, began = training.config, time.monotonic()
    if start > training.total_steps:
        raise ValueError(
            f"The checkpoint is of step {start}, but pretrain.epochs={config.epochs} ends at step "
            f"{training.total_steps}. Raise pretrain.epochs, or remove the later checkpoints."
        )
    window = MetricsWindow(describe, remedy="Lower optimizer.peak_lr or lengthen optimizer.warmup_epochs.")
    meter = ThroughputMeter(config.batch_size)
    done = saved = start
    try:
        if training.awaits_validation(start):  # the job was asked to stop before it had finished
            log_validation(training, start, validate, tracker)
            meter.restart()
        with checkpoints, training.stream.prefetch(start, training.total_steps, training.dtype) as batches:
            for batch in meter.waiting_for(batches):
                control.check()
                checkpoints.check()
                window.add(batch.step, batch.records, training.learning_rate(batch.step), training.step(batch))
                done = batch.step + 1
                validating = training.awaits_validation(done)
                saving = done % config.checkpoint_every_steps == 0 or done == training.total_steps
                if done % config.log_every_steps == 0 or saving or validating:
                    report_window(training, window, meter, tracker)
                if validating:
                    log_validation(training, done, validate, tracker)
                if saving:
                    checkpoints.save(done, training.state_dict())
                    saved = done
                if saving or validating:
                    meter.restart()
    except Interrupted:
        report_window(training, window, meter, tracker)
        if saved != done or checkpoints.lost:  # what is on disk stays as it is: replacing it could lose it
            checkpoints.save(done, training.state_dict())
        checkpoints.wait()
        raise PreemptedError(done) from None
    checkpoints.wait()
    return PretrainSummary(training.total_steps, training.collapsed, time.monotonic() - began)


def log_validation(training: Pretraining, done: int, validate: Callable[[], Row], tracker: Tracker) -> None:
    """Score the encoder as it is after ``done`` steps."""
    synchronise_buffers(training.result)
    with as_written() if training.config.compile else nullcontext():  # whose import takes 1.5 s
        scores = validate()
    tracker.log(done - 1, {"epoch": done / training.stream.steps_per_epoch, **scores})
    training.validated = done


def report_window(training: Pretraining, window: MetricsWindow, meter: ThroughputMeter, tracker: Tracker) -> None:
    """Log the steps since the last call, and stop if one of them was the last that made sense."""
    done = window.read(training.encoder)
    for step in done:
        row: Row = {
            "epoch": (step.step + 1) / training.stream.steps_per_epoch,
            "optimizer/lr": step.lr,
            **step.metrics,
            "loss/num_classes": training.config.support.classes,
        }
        if step is done[-1]:
            row |= meter.read(len(done))
        tracker.log(step.step, row)
        step.require_finite()
        # Without me-max its term is 0 and says nothing; cross-entropy alone then tells.
        me_max = step.metrics["loss/me_max"] if training.objective.me_max else -math.log(training.monitor.num_classes)
        uniform = training.monitor.update(step.metrics["loss/consistency"], me_max)
        if uniform and not training.collapsed:
            training.collapsed = True
            _report_collapse(training.config.collapse, step.step, training.config.support.classes, tracker)


def _report_collapse(config: CollapseConfig, step: int, classes: int, tracker: Tracker) -> None:
    message = (
        f"Collapse: predictions have been uniform over {classes} classes for {config.patience_steps} steps "
        f"(step {step}: consistency near log K, me-max near -log K), where every gradient vanishes. With few labels "
        "set objective.support_warmup_fraction=0.33, use more labels, or try another seed."
    )
    tracker.log(step, {"event": "collapse", "message": message})
    if config.action == "stop":
        raise TrainingStoppedError(message)
