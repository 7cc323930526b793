"""The sweep: one folder per trial with its best weights and its accuracy on the local validation split.

The supervised baseline is the same sweep from the weights that pre-training starts from, random ones as a rule.
"""

from __future__ import annotations

import time

import torch

from paws_hpc import distributed
from paws_hpc.config import Config, Identity, identity, sweep_config
from paws_hpc.data.streams import ClassifierStream
from paws_hpc.engine.checkpoint import CheckpointFolder, save_tensors
from paws_hpc.engine.evaluate import forward_set, score
from paws_hpc.engine.finetune import ClassifierTraining
from paws_hpc.engine.loop import train
from paws_hpc.engine.preemption import JobControl
from paws_hpc.engine.tracking import Row
from paws_hpc.files import file_hash, write_json
from paws_hpc.models.encoder import build_classifier
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
    settings = sweep_config(config, sweep).of_trial(trial)
    used = None
    if sweep == "finetune":
        encoder, weights = load_pretrained(run, data, device)
        start_weights = file_hash(weights)
        used = network(run, "pretrain", weights.name, start_weights)
    else:
        encoder = starting_encoder(config).to(device)
        weights_hash = start_identity(config).get("model.init.xxh3_128", "random weights")
        start_weights = f"{weights_hash}, seed {config.seed}"
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
        device=device,
    )
    training = ClassifierTraining(build_classifier(encoder, len(data.classes)), settings, stream, device)
    digests = {f"digest.{name}": digest for name, digest in data.digests.items()}
    checkpoints = CheckpointFolder(
        folder / "checkpoints",
        identity=_trial_identity(config, sweep, trial) | digests | {"start": start_weights},
        accept_changes=tuple(config.accept_changes),
        fence=control.fence,
    )
    start = checkpoints.resume(training.load_state_dict, device)
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
    validation = data.validation_images()

    def validate() -> Row:
        logits = forward_set(training.classifier, validation, device, control)
        return {"val/top1": score(logits.cpu(), validation.labels).top1}

    with job as tracker:
        train(
            training,
            checkpoints=checkpoints,
            tracker=tracker,
            start=start,
            validate=validate,
            describe=lambda records: [data.labelled_store.keys[int(record)] for record in records],
            control=control,
        )
        if distributed.is_main():
            save_tensors(folder / "best.pt", training.best_weights, fence=control.fence)
    control.fence()
    if distributed.is_main():
        assert training.best is not None, "the last step is always scored"
        accuracy, epoch = training.best
        result = {"validation_accuracy": accuracy, "best_epoch": epoch, "seconds": time.monotonic() - began}
        write_json(folder / "result.json", {**trial.values} | result)
        mark_done(folder, steps=training.total_steps)


def _trial_identity(config: Config, sweep: str, trial: Trial) -> Identity:
    """What determines a trial: its own point of the sweep, not which other points the sweep has."""
    fields = identity(config, "seed", "model", "views.evaluation", sweep)
    own = {f"{sweep}.{field}": value for field, value in trial.values.items()}
    return {name: value for name, value in fields.items() if not name.startswith(f"{sweep}.sweep.")} | own
