"""What selection asks of the pre-trained encoder beside PAWS-NN: its frozen features' worth, and its tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paws_hpc import distributed
from paws_hpc.config import Config
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.engine.checkpoint import save_tensors
from paws_hpc.engine.evaluate import forward_set
from paws_hpc.engine.preemption import JobControl
from paws_hpc.engine.probes import Probe, linear_probe, nearest_neighbours
from paws_hpc.engine.suncet import fine_tune_with_suncet
from paws_hpc.models.encoder import Encoder
from paws_hpc.stages.pretrain import score_nearest_neighbours
from paws_hpc.stages.run_data import RunData


def backbone_features(encoder: Encoder, images: EvaluationSet, device: torch.device, control: JobControl) -> Tensor:
    """(N, ``feature_dim``) of a set's images, before the projection head; the same on every rank."""
    return forward_set(encoder.backbone, images, device, control)


def fit_probes(
    encoder: Encoder, data: RunData, config: Config, device: torch.device, control: JobControl
) -> dict[str, Probe]:
    """Linear probe and k nearest neighbours on the labelled images, chosen by the local validation split."""
    labelled, validation = data.labelled_images(config), data.validation_images(config)
    features = backbone_features(encoder, labelled, device, control), labelled.labels.to(device)
    held_out = backbone_features(encoder, validation, device, control), validation.labels.to(device)
    fits = {"linear_probe": linear_probe, "k_nn": nearest_neighbours}
    return {name: fit(*features, *held_out, num_classes=len(data.classes)) for name, fit in fits.items()}


def tune(
    encoder: Encoder, data: RunData, config: Config, device: torch.device, *, control: JobControl, weights: Path
) -> dict[str, Any]:
    """Fine-tune the encoder in place with SuNCEt (``config.suncet``) and write its weights to the file ``weights``.

    Returns:
        Steps, first and last loss, and PAWS-NN on the local validation split before and after.
    """
    validation = data.validation_images(config)
    before = score_nearest_neighbours(encoder, data, validation, config, device, control=control)
    losses = fine_tune_with_suncet(
        encoder,
        data.labelled_images(config),
        config.suncet,
        temperature=config.objective.temperature,
        seed=config.seed,
        device=device,
        control=control,
    )
    after = score_nearest_neighbours(encoder, data, validation, config, device, control=control)
    control.fence()
    if distributed.is_main():
        save_tensors(weights, encoder.state_dict())
    return {
        "steps": len(losses),
        "loss": [losses[0], losses[-1]],
        "validation_accuracy": {"before": before.top1, "after": after.top1},
    }
