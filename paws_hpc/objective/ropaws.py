"""RoPAWS (arXiv:2302.14483): PAWS whose targets know how likely an image is of any known class. docs/ropaws.md.

The similarity classifier is the posterior of a kernel density estimate over supports. RoPAWS estimates the density over
supports and unlabelled images together, so that the unlabelled images' posteriors depend on each other, and multiplies
them with a prior that an image is of a known class at all.

Legend: n images of this rank, M of all ranks, S supports, K classes, D features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from paws_hpc import distributed
from paws_hpc.objective.config import RopawsConfig
from paws_hpc.objective.labels import ClassLabels, smooth_labels
from paws_hpc.objective.neighbours import cosine_logits, full_precision, sharpen
from paws_hpc.objective.paws import Paws


@torch.no_grad()
def calibrated_posteriors(
    images: Tensor,
    supports: Tensor,
    support_labels: Tensor,
    *,
    temperature: float,
    prior_temperature: float,
    label_ratio: float,
) -> Tensor:
    """p with ``p = diag(prior) (C_S y + C_U p)``, where ``[C_S, C_U]`` are softmax weights and the prior is below 1.

    A row's weights are those of its kernel ``exp(cos / tau)`` with all supports and all other images; those with
    supports are multiplied by ``label_ratio M / S``. The prior of an image is ``exp((cos - 1) / T)`` of its nearest
    support.

    ``images`` (M, D), one view each, and ``supports`` (S, D) are h of all ranks; rows of ``support_labels`` (S, K) sum
    to 1. ``temperature`` is tau, ``prior_temperature`` T; ``label_ratio`` is in ``RopawsConfig``.

    Returns:
        (M, K). A row's sum is the probability that the image is of a known class.
    """
    with full_precision(images):
        to_supports = cosine_logits(images, supports, temperature=temperature)
        to_images = cosine_logits(images, images, temperature=temperature).fill_diagonal_(-math.inf)
        prior = ((to_supports.amax(1, keepdim=True) * temperature).clamp_max(1) - 1).div(prior_temperature).exp()
        scaled = to_supports + math.log(label_ratio * len(images) / len(supports))
        weights = prior * F.softmax(torch.cat([scaled, to_images], 1), dim=1)
        from_supports, from_images = weights.split([len(supports), len(images)], dim=1)
        identity = torch.eye(len(images), dtype=weights.dtype, device=weights.device)
        # Rows of C_U sum to less than 1, so the matrix is regular. The variant that checks it would wait for a GPU.
        solution, _ = torch.linalg.solve_ex(identity - from_images, from_supports @ support_labels.to(weights.dtype))
        return solution.clamp_min(0)


class Ropaws(Paws):
    """PAWS with calibrated targets, and images weighted by how likely they are of a known class."""

    config: RopawsConfig

    def targets(
        self, h: Tensor, supports: Tensor, labels: ClassLabels
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Each view is calibrated together with the same view of all ranks' images."""
        config = self.config
        matrix = smooth_labels(labels.classes, self.num_classes, smoothing=labels.smoothing, dtype=h.dtype)
        views = []
        for own in h.chunk(2):
            every = calibrated_posteriors(
                distributed.gather_rows(own), supports, matrix, temperature=config.temperature,
                prior_temperature=config.prior_temperature, label_ratio=config.label_ratio,
            )  # fmt: skip
            views.append(every[distributed.rank() * len(own) :][: len(own)])
        posteriors = torch.cat(views)
        in_domain = posteriors.sum(1).clamp_max(1)
        uniform = (1 - in_domain).unsqueeze(1) / self.num_classes  # what is of no known class is each of them alike
        weights = in_domain.view(2, -1).mean(0) ** config.weight_power
        sharpened = sharpen(posteriors + uniform, temperature=config.sharpening)
        return sharpened, weights, {"train/in_domain": in_domain.mean()}
