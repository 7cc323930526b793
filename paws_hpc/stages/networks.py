"""The networks of a run: what training starts from, what pre-training left, and what selection chose.

Every ``load_`` function returns a network on the device and the file of the run that its weights are from.
"""

from __future__ import annotations

from pathlib import Path

import torch

from paws_hpc.config import Config, Identity, identity
from paws_hpc.engine.checkpoint import CheckpointFolder, load_tensors
from paws_hpc.engine.preemption import UNATTENDED, JobControl
from paws_hpc.engine.starting_weights import load_backbone
from paws_hpc.files import file_hash, read_record
from paws_hpc.models.encoder import Classifier, Encoder, build_classifier, build_encoder
from paws_hpc.stages.run_data import RunData, order_identity
from paws_hpc.stages.run_folder import RunFolder, is_done
from paws_hpc.trial import Trial


def starting_encoder(config: Config) -> Encoder:
    """The encoder before its first step, on the CPU: with random weights, or the backbone's from ``model.init``.

    Raises:
        FileNotFoundError: ``model.init`` is no file.
        ValueError: it does not fit; what does not is listed.
    """
    encoder = build_encoder(config.model, seed=config.seed)
    if config.model.init is not None:
        load_backbone(encoder, Path(config.model.init))
    return encoder


def start_identity(config: Config) -> Identity:
    """What determines those weights beside the seed and the network; nothing where they are random."""
    return {} if config.model.init is None else {"model.init.xxh3_128": file_hash(Path(config.model.init))}


def checkpoint_folder(run: RunFolder, data: RunData, control: JobControl = UNATTENDED) -> CheckpointFolder:
    """The checkpoints of a run's pre-training, bound to what determines them."""
    config = data.config
    determined: Identity = identity(config, "seed", "views", "model", "objective", "optimizer", "pretrain")
    determined |= order_identity(data) | start_identity(config)
    determined |= {f"digest.{name}": digest for name, digest in data.digests.items() if name != "validation"}
    return CheckpointFolder(
        run.checkpoints,
        identity=determined,
        accept_changes=tuple(config.accept_changes),
        fence=control.fence,
    )


def load_pretrained(run: RunFolder, data: RunData, device: torch.device) -> tuple[Encoder, Path]:
    """The encoder after pre-training; with ``pretrain.ema`` the average of its weights.

    Raises:
        FileNotFoundError: pre-training has not finished.
        ValueError: the checkpoints are of another experiment.
    """
    if not is_done(run.pretrain):
        raise FileNotFoundError(f"{run.pretrain} is not done: run the stage 'pretrain' of this run first.")
    checkpoint = checkpoint_folder(run, data).newest(device)
    steps = read_record(run.pretrain / "DONE")["steps"]
    if checkpoint is None or checkpoint.step != steps:
        raise FileNotFoundError(
            f"{run.checkpoints} holds no valid checkpoint of step {steps}, where pre-training ended. Remove "
            f"{run.pretrain / 'DONE'} and launch again to train from the newest valid one."
        )
    encoder = build_encoder(data.config.model, seed=data.config.seed)
    encoder.load_state_dict(checkpoint.state["encoder" if data.config.pretrain.ema is None else "average"])
    return encoder.to(device, torch.float32), run.checkpoint(steps)


def load_neighbours(run: RunFolder, data: RunData, device: torch.device) -> tuple[Encoder, Path]:
    """The encoder by which PAWS-NN is scored: after SuNCEt fine-tuning if the run has that, else after pre-training.

    Raises:
        FileNotFoundError: pre-training or SuNCEt fine-tuning has not finished.
        ValueError: the checkpoints are of another experiment.
    """
    encoder, weights = load_pretrained(run, data, device)
    if data.config.suncet.steps:
        weights = run.tuned
        if not weights.exists():
            raise FileNotFoundError(f"{weights} is missing: run the stage 'selection' of this run first, which tunes.")
        encoder.load_state_dict(load_tensors(weights, device))
    return encoder, weights


def load_winner(run: RunFolder, data: RunData, device: torch.device) -> tuple[Classifier, Path]:
    """The fine-tuned network that selection chose.

    Raises:
        FileNotFoundError: none is chosen yet.
        ValueError: selection went on without fine-tuned networks.
    """
    if not run.selected.exists():
        raise FileNotFoundError(
            f"{run.selected} is missing: no fine-tuned network is chosen yet. Run the stage 'selection' of this run "
            "first."
        )
    selected = read_record(run.selected)
    if "trial" not in selected:
        raise ValueError(
            f"{run.selected} names no fine-tuned network: selection went on without one, as finetune.min_trials=0 "
            "allowed or without pre-training."
        )
    return load_trial(run, data, device, sweep="finetune", trial=Trial.parse(selected["trial"]))


def load_trial(
    run: RunFolder, data: RunData, device: torch.device, *, sweep: str, trial: Trial
) -> tuple[Classifier, Path]:
    """The network of a finished trial, with its best weights."""
    classifier = build_classifier(build_encoder(data.config.model, seed=data.config.seed), len(data.classes)).to(device)
    best = run.trial(sweep, trial) / "best.pt"
    classifier.load_state_dict(load_tensors(best, device))
    return classifier, best
