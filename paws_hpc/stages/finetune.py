"""The sweep: one folder per trial with its best weights and its accuracy on the local validation split.

The supervised baseline is the same sweep from the weights that pre-training starts from, random ones as a rule.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from paws_hpc import distributed
from paws_hpc.config import Config, Identity, identity, sweep_config
from paws_hpc.data.samplers import Positions
from paws_hpc.data.streams import ClassifierStream, EvaluationSet
from paws_hpc.engine.checkpoint import CheckpointFolder, save_tensors
from paws_hpc.engine.config import ClassifierConfig, TrackingConfig
from paws_hpc.engine.evaluate import forward_set, score
from paws_hpc.engine.finetune import ClassifierTraining
from paws_hpc.engine.loop import train
from paws_hpc.engine.preemption import JobControl
from paws_hpc.engine.tracking import Tracker
from paws_hpc.files import file_hash, write_record
from paws_hpc.models.encoder import Encoder, build_classifier
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.networks import load_pretrained, start_identity, starting_encoder
from paws_hpc.stages.run_data import RunData, open_data
from paws_hpc.stages.run_folder import RunFolder, is_done, mark_done
from paws_hpc.stages.trackers import network, open_trackers
from paws_hpc.trial import Trial


def run(context: TorchContext) -> None:
    """Train one trial, or continue it, or return at once if it is done.

    Raises:
        PreemptedError: the job must stop, and the state is saved.
    """
    run, sweep, trial = context.run, context.stage, context.trial
    assert trial is not None, "the jobs of a sweep are its trials"
    if is_done(run.trial(sweep, trial)):
        return
    data = open_data(context.config)
    with data.caching() as cached:
        _train(run, cached, context.device, context.control, sweep=sweep, trial=trial)


def _train(
    run: RunFolder, data: RunData, device: torch.device, control: JobControl, *, sweep: str, trial: Trial
) -> None:
    config, began, folder = data.config, time.monotonic(), run.trial(sweep, trial)
    used = None
    if sweep == "finetune":
        encoder, weights = load_pretrained(run, data, device)
        start_weights = file_hash(weights)
        used = network(run, "pretrain", weights.name, start_weights)
    else:
        encoder = starting_encoder(config).to(device)
        weights_hash = start_identity(config).get("model.init.xxh3_128", "random weights")
        start_weights = f"{weights_hash}, seed {config.seed}"
    digests = {f"digest.{name}": digest for name, digest in data.digests.items()}
    determined = _trial_identity(config, sweep, trial) | digests | {"start": start_weights}
    settings = sweep_config(config, sweep).of_trial(trial)
    fit = partial(_fit, data, encoder, settings=settings, device=device, control=control)
    held_out: list[float] = []
    if (validation := data.validation_images()) is None:
        job = f"{sweep}/{trial.name}"
        held_out = _cross_validate(run, data, control, fit, folder, job=job, identity=determined)

    def accuracy(training: ClassifierTraining) -> float:
        if validation is None:
            return held_out[training.validated // training.validate_every]
        logits = forward_set(training.classifier, validation, device, control)
        return score(logits.cpu(), validation.labels).top1

    best = folder / "best.pt"
    track = partial(open_trackers, config, run, folder, job=f"{sweep}/{trial.name}", used=used, made=best)
    training = fit(data.labelled, folder, identity=determined, track=track, accuracy=accuracy, best_weights=best)
    control.fence()
    if distributed.is_main():
        assert training.best is not None, "the last step is always scored"
        reached, epoch = training.best
        result = {"validation_accuracy": reached, "best_epoch": epoch, "seconds": time.monotonic() - began}
        write_record(folder / "result.json", {**trial.values} | result)
        mark_done(folder, steps=training.total_steps)
        for checkpoints in folder.glob("fold-*/checkpoints"):
            shutil.rmtree(checkpoints)


def _fit(
    data: RunData,
    encoder: Encoder,
    labelled: Positions,
    folder: Path,
    *,
    settings: ClassifierConfig,
    device: torch.device,
    control: JobControl,
    identity: Identity,
    track: Callable[..., Tracker],
    accuracy: Callable[[ClassifierTraining], float],
    best_weights: Path | None = None,
) -> ClassifierTraining:
    """Train a classifier on labelled images, from the newest checkpoint in ``folder`` if there is one, to the end.

    The ``encoder``, whose backbone it begins with, stays as it is. ``track`` opens the trackers, of ``start``,
    ``total_steps`` and ``awaits_validation``; ``accuracy`` scores the classifier; ``best_weights`` is the file for the
    best ones, if any.

    Raises:
        PreemptedError: by ``control``; the state is saved.
    """
    store, config = data.labelled_store, data.config
    stream = ClassifierStream(
        store,
        labelled,
        crop=settings.crop,
        augment=settings.augment,
        batch_size=settings.batch_size,
        seed=config.seed,
        threads=config.data.threads,
        images=data.supports,
        normalised_as=data.train,
        device=device,
    )
    training = ClassifierTraining(build_classifier(encoder, len(data.classes)), settings, stream, device)
    checkpoints = CheckpointFolder(
        folder / "checkpoints", identity=identity, accept_changes=tuple(config.accept_changes), fence=control.fence
    )
    start = checkpoints.resume(training.load_state_dict, device)
    awaits = training.awaits_validation(start)
    with track(start=start, total_steps=training.total_steps, awaits_validation=awaits) as tracker:
        train(
            training,
            checkpoints=checkpoints,
            tracker=tracker,
            start=start,
            validate=lambda: {"val/top1": accuracy(training)},
            describe=lambda records: [store.keys[int(record)] for record in records],
            control=control,
        )
        if best_weights is not None and distributed.is_main():
            save_tensors(best_weights, training.best_weights, fence=control.fence)
    return training


def _cross_validate(
    run: RunFolder,
    data: RunData,
    control: JobControl,
    fit: Callable[..., ClassifierTraining],
    folder: Path,
    *,
    job: str,
    identity: Identity,
) -> list[float]:
    """The share of the labelled images that are classified rightly by the training that leaves out their fold.

    A classifier from the same weights is trained for each fold, in ``fold-1`` … of the trial's folder.

    Returns:
        A fraction for each epoch that is validated, in order.
    """
    folds = data.folds()
    right: list[list[int]] = []
    quiet = replace(data.config, tracking=TrackingConfig(wandb="disabled"))  # W&B shows trials, not folds
    for number, mask in enumerate(folds, 1):
        left_out, place = data.images(data.labelled_store, data.labelled[mask]), folder / f"fold-{number}"

        def accuracy(training: ClassifierTraining, left_out: EvaluationSet = left_out) -> float:
            logits = forward_set(training.classifier, left_out, training.device, control)
            return score(logits.cpu(), left_out.labels).top1

        track = partial(open_trackers, quiet, run, place, job=f"{job} fold {number}/{len(folds)}")
        own = identity | {"fold": f"{number} of {len(folds)}"}
        training = fit(data.labelled[~mask], place, identity=own, track=track, accuracy=accuracy)
        right.append([round(accuracy * len(left_out)) for accuracy in training.scores])
    return [sum(counts) / len(data.labelled) for counts in zip(*right, strict=True)]


def _trial_identity(config: Config, sweep: str, trial: Trial) -> Identity:
    """What determines a trial: its own point of the sweep, not which other points the sweep has."""
    fields = identity(config, "seed", "model", "views.evaluation", sweep)
    own = {f"{sweep}.{field}": value for field, value in trial.values.items()}
    return {name: value for name, value in fields.items() if not name.startswith(f"{sweep}.sweep.")} | own
