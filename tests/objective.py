"""A step's loss of PAWS from its representations alone, labels in the objective's form, and golden files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paws_hpc.objective.labels import ClassLabels, class_labels
from paws_hpc.objective.paws import PawsLoss, paws_loss, paws_targets

GOLDEN = Path(__file__).parent / "golden"


def load_golden(name: str) -> dict[str, Tensor]:
    """A file of tests/golden."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def labels_for(classes: Tensor, num_classes: int, smoothing: float) -> ClassLabels:
    return class_labels(classes, num_classes, smoothing=smoothing, device=torch.device("cpu"))


def as_class_labels(matrix: Tensor) -> ClassLabels:
    """Of one-hot or smoothed rows (S, K)."""
    return labels_for(matrix.argmax(1), matrix.shape[1], matrix.min().item() * matrix.shape[1])


def step_loss(
    anchors: Tensor, supports: Tensor, h: Tensor, h_supports: Tensor, labels: ClassLabels,
    *, temperature: float = 0.1, sharpening: float = 0.25, **options: Any,
) -> PawsLoss:  # fmt: skip
    """z and h of crops and supports to the loss."""
    rates = {"temperature": temperature, "sharpening": sharpening}
    return paws_loss(anchors, supports, paws_targets(h, h_supports, labels, **rates), labels, **rates, **options)
