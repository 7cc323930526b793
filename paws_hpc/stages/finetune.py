"""The sweep: one folder per trial with its best weights and its accuracy on the local validation split.

The supervised baseline is the same sweep from the weights that pre-training starts from, random ones as a rule.
"""

from __future__ import annotations

import time

import torch

from paws_hpc import distributed
from paws_hpc.config import Config, Identity, identity, sweep_config
from paws_hpc.data.streams import ClassifierStream, StreamOptions
from paws_hpc.engine.checkpoint import CheckpointFolder
from paws_hpc.engine.finetune import ClassifierTraining, train_classifier
from paws_hpc.engine.preemption import JobControl
from paws_hpc.files import read_json, write_json
from paws_hpc.models.encoder import Encoder, build_classifier
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.pretrain import load_pretrained, names
from paws_hpc.stages.run_data import RunData, open_data, stream_options
from paws_hpc.stages.run_folder import RunFolder, is_done, mark_done
from paws_hpc.stages.start import start_identity, starting_encoder
from paws_hpc.stages.trackers import network, open_trackers
from paws_hpc.trial import Trial


def run(context: TorchContext) -> None:
    """Train one trial, or continue it, or return at once if it is done.

    Raises:
        PreemptedError: it was asked to stop, and the state is saved.
    """
    config, run, device, control = context.config, context.run, context.device, context.control
    sweep, trial = context.stage, context.trial
    assert trial is not None, "the jobs of a sweep are its trials"
    folder = run.trial(sweep, trial)
    if is_done(folder):
        return
    data = open_data(config)
    options = stream_options(config, data, device)
    with data.caching() as cached:
        _train(config, run, cached, options, sweep=sweep, trial=trial, control=control)


def _train(
    config: Config,
    run: RunFolder,
    data: RunData,
    options: StreamOptions,
    *,
    sweep: str,
    trial: Trial,
    control: JobControl,
) -> None:
    device, began, folder = options.device, time.monotonic(), run.trial(sweep, trial)
    settings = sweep_config(config, sweep).of_trial(trial)
    encoder, start_weights = _starting_point(config, run, data, device, sweep)
    stream = ClassifierStream(
        data.labelled_store,
        data.labelled,
        crop=settings.crop,
        augment=settings.augment,
        batch_size=settings.batch_size,
        seed=config.seed,
        threads=config.data.threads,
        images=data.supports,
        normalised_as=data.train,
        options=options,
    )
    classifier = build_classifier(encoder, len(data.classes))
    training = ClassifierTraining(classifier, settings, stream, device)
    checkpoints = CheckpointFolder(
        folder / "checkpoints",
        identity=_trial_identity(config, sweep, trial) | data_identity(data) | {"start": start_weights},
        accept_changes=tuple(config.accept_changes),
        fence=control.fence,
    )
    start = checkpoints.resume(training, device)
    used = None
    if sweep == "finetune":
        checkpoint = run.checkpoint(read_json(run.pretrain / "DONE")["steps"])
        used = network(run, "pretrain", checkpoint.name, start_weights)
    job = open_trackers(
        config,
        run,
        folder,
        job=f"{sweep}/{trial.name}",
        start=start,
        total_steps=training.total_steps,
        awaits_validation=training.awaits_validation(start),
        used=used,
        made=folder / "best.pt",
    )
    with job as tracker:
        best = train_classifier(
            training,
            validation=data.validation_images(config),
            checkpoints=checkpoints,
            tracker=tracker,
            start=start,
            best_path=folder / "best.pt",
            describe=lambda records: names(data.labelled_store, records),
            control=control,
        )
    control.fence()
    if distributed.is_main():
        write_json(
            folder / "result.json",
            {
                **trial.values,
                "validation_accuracy": best.validation_accuracy,
                "best_epoch": best.best_epoch,
                "seconds": time.monotonic() - began,
            },
        )
        mark_done(folder, steps=training.total_steps)


def _trial_identity(config: Config, sweep: str, trial: Trial) -> Identity:
    """What determines a trial: its own point of the sweep, not which other points the sweep has."""
    fields = identity(config, "seed", "model", "views.evaluation", sweep)
    own = {f"{sweep}.{field}": value for field, value in trial.values.items()}
    return {name: value for name, value in fields.items() if not name.startswith(f"{sweep}.sweep.")} | own


def data_identity(data: RunData) -> Identity:
    """The digests that bind a checkpoint to its data, as identity fields."""
    return {f"digest.{name}": digest for name, digest in data.digests.items()}


def _starting_point(
    config: Config, run: RunFolder, data: RunData, device: torch.device, sweep: str
) -> tuple[Encoder, str]:
    if sweep == "finetune":
        return load_pretrained(config, run, data, device)
    weights = start_identity(config).get("model.init.xxh3_128", "random weights")
    return starting_encoder(config).to(device), f"{weights}, seed {config.seed}"
