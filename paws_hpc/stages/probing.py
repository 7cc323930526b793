"""What a pre-trained encoder is worth without a new classifier on it: PAWS-NN, probes of its features, SuNCEt.

Legend: N images, M labelled images (supports), K classes, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paws_hpc import distributed
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.engine import probes
from paws_hpc.engine.checkpoint import save_tensors
from paws_hpc.engine.evaluate import Representation, forward_set, paws_nn, score
from paws_hpc.engine.preemption import UNATTENDED, JobControl
from paws_hpc.engine.suncet import fine_tune_with_suncet
from paws_hpc.models.encoder import Encoder
from paws_hpc.stages.run_data import RunData


@dataclass(frozen=True)
class NearestNeighbours:
    """PAWS-NN of N images with all labelled images as support, in the CPU's memory.

    Attributes:
        predictions: (N, K) probabilities.
        queries: (N, D) representations of the images.
        supports: (M, D) of the labelled images.
    """

    predictions: Tensor
    queries: Tensor
    supports: Tensor


def nearest_neighbours(
    encoder: Encoder, data: RunData, images: EvaluationSet, device: torch.device, control: JobControl = UNATTENDED
) -> NearestNeighbours:
    """PAWS-NN on ``images``; ``control`` may interrupt."""
    network, labelled = Representation(encoder), data.labelled_images()
    queries = forward_set(network, images, device, control)
    supports = forward_set(network, labelled, device, control)
    temperature = data.config.objective.temperature
    labels = labelled.labels.to(device)
    predictions = paws_nn(queries, supports, labels, num_classes=len(data.classes), temperature=temperature)
    return NearestNeighbours(predictions.cpu(), queries.cpu(), supports.cpu())


def validation_accuracy(
    encoder: Encoder, data: RunData, device: torch.device, control: JobControl = UNATTENDED
) -> float | None:
    """PAWS-NN's accuracy on the local validation split, a fraction, or None without one; ``control`` may interrupt.

    The labelled images are no substitute: the encoder was trained to classify them.
    """
    images = data.validation_images()
    if images is None:
        return None
    return score(nearest_neighbours(encoder, data, images, device, control).predictions, images.labels).top1


def fit_probes(encoder: Encoder, data: RunData, device: torch.device, control: JobControl) -> dict[str, probes.Probe]:
    """Linear probe and k nearest neighbours on the labelled images, chosen by validation."""
    labelled, validation = data.labelled_images(), data.validation_images()
    features = forward_set(encoder.backbone, labelled, device, control), labelled.labels.to(device)
    fits = {"linear_probe": probes.linear_probes, "k_nn": probes.nearest_neighbours}
    if validation is None:
        masks = [torch.from_numpy(mask).to(device) for mask in data.folds()]
        chosen = partial(probes.cross_validated, folds=masks, num_classes=len(data.classes))
        return {name: chosen(fit, *features) for name, fit in fits.items()}
    held_out = forward_set(encoder.backbone, validation, device, control), validation.labels.to(device)
    return {name: probes.best(fit(*features, num_classes=len(data.classes)), *held_out) for name, fit in fits.items()}


def tune(
    encoder: Encoder, data: RunData, device: torch.device, control: JobControl, *, weights: Path
) -> dict[str, Any]:
    """Fine-tune the encoder in place with SuNCEt (``suncet``) and write its weights to the file ``weights``.

    Returns:
        Steps, first and last loss, and PAWS-NN on the local validation split before and after.
    """
    before = validation_accuracy(encoder, data, device, control)
    losses = fine_tune_with_suncet(
        encoder,
        data.labelled_images(),
        data.config.suncet,
        temperature=data.config.objective.temperature,
        seed=data.config.seed,
        device=device,
        control=control,
    )
    after = validation_accuracy(encoder, data, device, control)
    control.fence()
    if distributed.is_main():
        save_tensors(weights, encoder.state_dict())
    return {
        "steps": len(losses),
        "loss": [losses[0], losses[-1]],
        "validation_accuracy": {"before": before, "after": after},
    }
