"""The sweep: one folder per trial with its best weights and its accuracy on the local validation split.

The supervised baseline is the same sweep from the weights that pre-training starts from, random ones as a rule.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from paws_hpc import distributed
from paws_hpc.config import Config, Identity, identity, sweep_config
from paws_hpc.data.samplers import Positions
from paws_hpc.data.streams import ClassifierStream
from paws_hpc.engine.checkpoint import CheckpointFolder, save_tensors
from paws_hpc.engine.config import ClassifierConfig
from paws_hpc.engine.errors import PreemptedError
from paws_hpc.engine.evaluate import forward_set, score
from paws_hpc.engine.finetune import ClassifierTraining
from paws_hpc.engine.loop import train
from paws_hpc.engine.parallel import synchronise_buffers
from paws_hpc.engine.preemption import Interrupted, JobControl
from paws_hpc.engine.tracking import Row
from paws_hpc.files import file_hash, read_json, value_digest, write_json
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
    digests = {f"digest.{name}": digest for name, digest in data.digests.items()}
    determined = _trial_identity(config, sweep, trial) | digests | {"start": start_weights}
    validation = data.validation_images()
    held_out: list[float] = []
    if validation is None:
        kept = folder / "folds.json"
        held_out = _cross_validate(data, encoder, settings, device, control=control, kept=kept, identity=determined)
    stream = _stream(data, data.labelled, settings, device)
    training = ClassifierTraining(build_classifier(encoder, len(data.classes)), settings, stream, device)
    checkpoints = CheckpointFolder(
        folder / "checkpoints",
        identity=determined,
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

    def validate() -> Row:
        if validation is None:
            return {"val/top1": held_out[training.validated // training.validate_every]}
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


def _stream(data: RunData, labelled: Positions, settings: ClassifierConfig, device: torch.device) -> ClassifierStream:
    return ClassifierStream(
        data.labelled_store,
        labelled,
        crop=settings.crop,
        augment=settings.augment,
        batch_size=settings.batch_size,
        seed=data.config.seed,
        threads=data.config.data.threads,
        images=data.supports,
        normalised_as=data.train,
        device=device,
    )


def _cross_validate(
    data: RunData,
    encoder: Encoder,
    settings: ClassifierConfig,
    device: torch.device,
    *,
    control: JobControl,
    kept: Path,
    identity: Identity,
) -> list[float]:
    """The share of the labelled images that are classified rightly by the training that leaves out their fold.

    A classifier from the same weights is trained for each fold. Finished folds are in the file ``kept``, with the
    digest of the ``identity`` that determines them; one that is interrupted begins anew.

    Returns:
        A fraction for each epoch that is validated, in order.

    Raises:
        PreemptedError: by ``control``.
    """
    digest, there = value_digest(identity), read_json(kept) if kept.exists() else {}
    right: list[list[int]] = there["right"] if there.get("identity") == digest else []
    for mask in data.folds()[len(right) :]:
        stream = _stream(data, data.labelled[~mask], settings, device)
        training = ClassifierTraining(build_classifier(encoder, len(data.classes)), settings, stream, device)
        left_out, counts = data.images(data.labelled_store, data.labelled[mask]), []
        try:
            with stream.prefetch(0, training.total_steps, training.dtype) as batches:
                for batch in batches:
                    control.check()
                    training.step(batch)
                    if training.is_due(batch.step + 1, training.validate_every):
                        synchronise_buffers(training.classifier)
                        logits = forward_set(training.classifier, left_out, device, control).cpu()
                        counts.append(int((logits.argmax(1) == left_out.labels).sum()))
        except Interrupted:
            raise PreemptedError(0) from None
        right.append(counts)
        control.fence()
        if distributed.is_main():
            write_json(kept, {"identity": digest, "right": right})
    return [sum(counts) / len(data.labelled) for counts in zip(*right, strict=True)]


def _trial_identity(config: Config, sweep: str, trial: Trial) -> Identity:
    """What determines a trial: its own point of the sweep, not which other points the sweep has."""
    fields = identity(config, "seed", "model", "views.evaluation", sweep)
    own = {f"{sweep}.{field}": value for field, value in trial.values.items()}
    return {name: value for name, value in fields.items() if not name.startswith(f"{sweep}.sweep.")} | own
