"""PAWS pre-training: one step, and the loop around it.

Legend: n unlabelled images and S support rows per rank, m small crops, K classes in the support, D features, W ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from paws_hpc import distributed
from paws_hpc.data.devices import to_device
from paws_hpc.data.streams import PawsBatch, PawsStream
from paws_hpc.engine.accumulation import accumulate, rows_of_parts, spread_momentum
from paws_hpc.engine.checkpoint import CheckpointFolder
from paws_hpc.engine.compiled import as_written, compile_passes
from paws_hpc.engine.config import CollapseConfig, OptimizerConfig, PretrainConfig
from paws_hpc.engine.errors import PreemptedError, TrainingStoppedError
from paws_hpc.engine.metrics import Describe, MetricsWindow, ThroughputMeter
from paws_hpc.engine.optimizer import LARS, build_optimizer
from paws_hpc.engine.parallel import move, replicate, synchronise_buffers
from paws_hpc.engine.preemption import UNATTENDED, Interrupted, JobControl
from paws_hpc.engine.schedule import warmup_cosine
from paws_hpc.engine.tracking import Row, Tracker
from paws_hpc.models.encoder import Encoder
from paws_hpc.objective.config import ObjectiveConfig
from paws_hpc.objective.diagnostics import CollapseMonitor, diagnose
from paws_hpc.objective.labels import class_labels
from paws_hpc.objective.nce import supervised_nce
from paws_hpc.objective.paws import paws_loss, support_warmup_weight


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
        self.model = replicate(self.encoder, device)
        spread_momentum(self.encoder, config.accumulate_steps)
        if config.compile:
            compile_passes(self.encoder)
        self.optimizer: LARS = build_optimizer(self.encoder, optimizer)
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
            "optimizer": self.optimizer.state_dict(),
            "monitor": self.monitor.state_dict(),
            "collapsed": self.collapsed,
            "validated": self.validated,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.encoder.load_state_dict(state["encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.monitor.load_state_dict(state["monitor"])
        self.collapsed = state["collapsed"]
        self.validated = state["validated"]

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
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(batch.step)
        self.optimizer.zero_grad(set_to_none=True)
        if len(batch.parts) == 1:
            h, z = self._encode(self.model, batch, 0)
            metrics = self._losses(batch, h, z)
            metrics["loss/total"].backward()
        else:
            metrics = self._accumulate(batch)
        self.optimizer.step()
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
        )
        metrics = {"loss/consistency": loss.consistency, "loss/me_max": loss.me_max, "loss/total": loss.total}
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
    synchronise_buffers(training.encoder)
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
