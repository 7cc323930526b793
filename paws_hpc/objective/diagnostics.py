"""What is watched and never trained on: the curves of the paper's figure 4, and collapse to uniform predictions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paws_hpc.metrics import Metric
from paws_hpc.objective.config import ObjectiveConfig
from paws_hpc.objective.nce import nt_xent, supervised_nce
from paws_hpc.objective.neighbours import Labels
from paws_hpc.objective.paws import PawsLoss

METRICS = [
    Metric("train/confidence", "Confidence of the targets", "fraction", "Confidence", "confidence",
           description="Mean probability of a target's most likely class (Fig. 4 of the paper)."),
    Metric("train/instance_discrimination", "Instance discrimination", "nats", "Diagnostics", "instance discrimination",
           description="NT-Xent on the unlabelled rows (instance discrimination), never trained on (Fig. 4 of the "
           "paper)."),
    Metric("train/support_classification", "Support classification", "nats", "Diagnostics", "support classification",
           description="Supervised NCE on the supports (support classification), as a diagnostic never trained on."),
]  # fmt: skip


@torch.no_grad()
def diagnose(
    large_crops: Tensor, supports: Tensor, support_labels: Labels, loss: PawsLoss, objective: ObjectiveConfig
) -> dict[str, Tensor]:
    """Measure one step. Nothing is communicated: the values are this rank's, for the caller to average.

    Args:
        large_crops: (2n, D) z of this rank's large crops: n first views, then the n second views.
        supports: (S, D) z of the supports of all ranks.
        support_labels: (S, K), or class numbers with smoothing.
        loss: what :func:`paws_hpc.objective.paws_loss` returned for this step.
        objective: its temperature is that of both contrastive losses.

    Returns:
        0-d tensors without gradients. ``train/instance_discrimination``: NT-Xent in nats (figure 4b, top), among
        the 2n rows of a rank, so that its value depends on n; ``train/support_classification``: supervised NCE in
        nats (figure 4b, bottom); ``train/confidence``: largest entry of a sharpened target, in [1/K, 1] (figure
        4c). Figure 4a is ``loss.consistency``.
    """
    temperature = objective.temperature
    return {
        "train/instance_discrimination": nt_xent(large_crops, temperature=temperature),
        "train/support_classification": supervised_nce(supports, support_labels, temperature=temperature),
        "train/confidence": loss.confidence,
    }


class CollapseMonitor:
    """Notice that predictions have become uniform and stay so.

    At collapse every prediction is uniform: the consistency term is log K and the me-max term -log K, the total is 0
    and so are all gradients. A run passes close to this point in its first steps; only staying there is a collapse.
    """

    def __init__(self, num_classes: int, *, tolerance: float = 0.02, patience: int = 100) -> None:
        """Watch for ``patience`` consecutive steps with both terms within ``tolerance`` of their value at collapse.

        Args:
            num_classes: K, the number of classes in the sampled support set; 2 or more.
            tolerance: as a fraction of log K, in [0, 1).
            patience: consecutive steps that make a collapse; 1 or more.

        Raises:
            ValueError: an argument is out of its range.
        """
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: with fewer than two classes every prediction is uniform.")
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance={tolerance} is not in [0, 1).")
        if patience < 1:
            raise ValueError(f"patience={patience}: a collapse takes one step or more.")
        self.num_classes = num_classes
        self.tolerance = tolerance
        self.patience = patience
        self.steps = 0

    def update(self, consistency: float, me_max: float) -> bool:
        """Take one step's terms in nats, as means over all ranks so that every rank decides alike.

        Returns:
            Whether this and the ``patience - 1`` steps before it were all collapsed.
        """
        bound = (1 - self.tolerance) * math.log(self.num_classes)
        self.steps = self.steps + 1 if consistency >= bound and me_max <= -bound else 0
        return self.steps >= self.patience

    def state_dict(self) -> dict[str, int]:
        """The counter, for a checkpoint."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting where a checkpoint left off."""
        self.steps = state["steps"]
