"""Contrastive losses: supervised NCE over labelled rows, and NT-Xent over pairs of views.

Legend: R rows, K classes, D features, n images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from paws_hpc.objective.labels import ClassLabels, log_mixture
from paws_hpc.objective.neighbours import cosine_logits, full_precision


def supervised_nce(z: Tensor, labels: ClassLabels, *, temperature: float) -> Tensor:
    """Classify each labelled row by all the others, and take the mean cross-entropy (SuNCEt, arXiv:2006.10803).

    ``p_i = sum_{j != i} exp(cos_ij / tau) y_j / sum_{j != i} exp(cos_ij / tau)``; the loss is ``mean_i H(y_i, p_i)``.
    With several ranks, gather the rows first: every rank then computes the same loss, and the gradient that
    DistributedDataParallel averages equals that of one process.

    Args:
        z: (R, D) features of any norm, R >= 2.
        labels: of the R rows. Without smoothing every class needs two rows at least (for instance two views of an
            image): a class's only row has nothing to be classified by, and the loss is infinite.
        temperature: tau > 0.

    Returns:
        0-d loss in nats, float32 (float64 if z is), with gradients through both sides of the similarity.
    """
    assert len(z) == len(labels.classes) > 1
    with full_precision(z):
        logits = cosine_logits(z, z, temperature=temperature).fill_diagonal_(-math.inf)
        log_predictions = log_mixture(logits, labels)
        own = F.nll_loss(log_predictions, labels.classes)
        if labels.smoothing == 0:
            return own
        return (1 - labels.smoothing) * own - labels.smoothing * log_predictions.mean()


def nt_xent(z: Tensor, *, temperature: float) -> Tensor:
    """Find each row's other view among all other rows (normalised temperature-scaled cross-entropy, arXiv:2002.05709).

    ``z`` (2n, D) has n first views, then the n second views in the same order. Returns the mean over all rows in nats,
    float32 (float64 if z is), with gradients through both sides.
    """
    assert len(z) % 2 == 0
    with full_precision(z):
        logits = cosine_logits(z, z, temperature=temperature).fill_diagonal_(-math.inf)
        other_view = torch.arange(z.shape[0], device=z.device).roll(z.shape[0] // 2)
        return F.cross_entropy(logits, other_view)
