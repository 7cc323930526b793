"""Weights of unlabelled images, for data sets where some are of no labelled class. Ours, not the paper's.

The similarity classifier divides by the sum of similarities: it tells which class an image resembles most and forgets
how much it resembles any. So an image of another class gets a confident target as soon as it is nearer to one class
than to the others, and training pulls it in. What the classifier forgets is kept here, and compared with how much
labelled images resemble their own class.

Legend: n images of this rank, S supports of all ranks, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paws_hpc.objective.neighbours import at_least_float32, full_precision

_LOWEST = -4.0  # deviations below the mean; a batch of nothing but strangers still has a weighted mean


@torch.no_grad()
def support_similarity_weights(
    targets: Tensor, supports: Tensor, support_classes: Tensor, support_images: Tensor
) -> Tensor:
    """How usual an image's similarity to its nearest support is among the supports themselves.

    ``w_i = Phi((s_i - mean r) / deviation r)``, where s_i is the largest cosine of an image's large crop with any
    support, the mean of both large crops, r_j the largest cosine of a support with another image of its own class, and
    Phi the normal distribution function: about 0.5 on average for images that lie as the labelled ones do.

    Args:
        targets: (2n, D) h of the large crops: n first views, then the n second views.
        supports: (S, D) h of the supports of all ranks, so that weights do not depend on the number of ranks.
        support_classes: (S,) integers.
        support_images: (S,) integers, equal for crops of one image, which say nothing about other images. A support
            without another image of its class in the step has no r_j.

    Returns:
        (n,) constants in (0, 1]; nan if no support has another image of its class.
    """
    with full_precision(targets):
        directions = F.normalize(at_least_float32(supports), dim=1)
        nearest = (F.normalize(at_least_float32(targets), dim=1) @ directions.T).amax(1)
        peers = (support_classes[:, None] == support_classes) & (support_images[:, None] != support_images)
        among = (directions @ directions.T).masked_fill(~peers, -1).amax(1)
        counted = peers.any(1).to(among.dtype)
        mean = (among * counted).sum() / counted.sum()
        deviation = (((among - mean) ** 2 * counted).sum() / counted.sum()).sqrt()
        score = (nearest.view(2, -1).mean(0) - mean) / deviation.clamp_min(torch.finfo(among.dtype).eps)
        return torch.special.ndtr(score.clamp_min(_LOWEST))
