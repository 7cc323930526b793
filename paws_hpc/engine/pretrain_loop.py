"""The loop of PAWS pre-training: steps, metrics, scores, checkpoints, and an orderly end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from paws_hpc.engine.checkpoint import CheckpointFolder
from paws_hpc.engine.compiled import eager
from paws_hpc.engine.errors import PreemptedError, TrainingStoppedError
from paws_hpc.engine.metrics import Describe, MetricsWindow, ThroughputMeter
from paws_hpc.engine.parallel import synchronise_buffers
from paws_hpc.engine.preemption import UNATTENDED, Interrupted, JobControl
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.engine.tracking import Row, Tracker


@dataclass(frozen=True)
class PretrainSummary:
    """What ``summary.json`` says of a finished pre-training."""

    steps: int
    collapsed: bool
    seconds: float


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
        checkpoints: written every so many steps, at the end, and when the job must stop.
        tracker: takes rows of metrics.
        start: steps already done.
        validate: scores the encoder on the local validation split, as a row of metrics whose names begin with
            ``val/``; may raise Interrupted.
        describe: record positions → keys, for error messages.
        control: checked before every step.

    Raises:
        PreemptedError: by ``control``; the state is saved.
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
    meter = ThroughputMeter(config.batch_size, training.device)
    done = saved = start
    try:
        if training.awaits_validation(start):  # the job had to stop before it had finished
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
    with eager(training.encoder):
        scores = validate()
    tracker.log(done - 1, {"epoch": done / training.stream.steps_per_epoch, **scores})
    training.validated = done


def report_window(training: Pretraining, window: MetricsWindow, meter: ThroughputMeter, tracker: Tracker) -> None:
    """Log the steps since the last call, and stop if one of them was the last that made sense."""
    done, collapse = window.read(training.encoder), training.config.collapse
    for step in done:
        row: Row = {
            "epoch": (step.step + 1) / training.stream.steps_per_epoch,
            "train/lr": step.lr,
            **step.metrics,
        }
        if step is done[-1]:
            row |= meter.read(len(done))
        tracker.log(step.step, row)
        step.require_finite()
        training.collapsed_steps = training.collapsed_steps + 1 if training.objective.collapsed(step.metrics) else 0
        if training.collapsed_steps >= collapse.patience_steps and not training.collapsed:
            training.collapsed = True
            message = f"Collapse: {training.objective.collapse_message(step.step, collapse.patience_steps)}"
            tracker.log(step.step, {"event": "collapse", "message": message})
            if collapse.action == "stop":
                raise TrainingStoppedError(message)
