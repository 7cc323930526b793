"""The PAWS objective, the contrastive losses around it, and what is watched while it trains."""

from __future__ import annotations

from paws_hpc.objective.diagnostics import CollapseMonitor, diagnose
from paws_hpc.objective.labels import ClassLabels, class_labels, smooth_labels
from paws_hpc.objective.nce import nt_xent, supervised_nce
from paws_hpc.objective.neighbours import (
    log_soft_nearest_neighbours,
    sharpen,
    soft_nearest_neighbours,
)
from paws_hpc.objective.paws import ObjectiveConfig, PawsLoss, TrueClasses, paws_loss, support_warmup_weight

__all__ = [
    "ClassLabels",
    "CollapseMonitor",
    "ObjectiveConfig",
    "PawsLoss",
    "TrueClasses",
    "class_labels",
    "diagnose",
    "log_soft_nearest_neighbours",
    "nt_xent",
    "paws_loss",
    "sharpen",
    "smooth_labels",
    "soft_nearest_neighbours",
    "supervised_nce",
    "support_warmup_weight",
]
