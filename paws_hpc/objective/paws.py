"""The PAWS objective: consistency between views plus mean-entropy maximisation (paper, equations 1 and 4).

Legend: n images of this rank, m small crops each, S supports, K classes, D features. Rows of unlabelled crops are
view-major: [large 1 (n); large 2 (n); small 1 (n); ...; small m (n)].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from paws_hpc import distributed
from paws_hpc.objective.base import Objective, Step
from paws_hpc.objective.config import TARGET_FLOOR, PawsConfig
from paws_hpc.objective.labels import ClassLabels, class_labels, smooth_labels
from paws_hpc.objective.nce import nt_xent, supervised_nce
from paws_hpc.objective.neighbours import (
    cross_entropy,
    full_precision,
    log_sharpen,
    log_soft_nearest_neighbours,
)


class PawsLoss(NamedTuple):
    """The objective and its terms: 0-d tensors in nats.

    Attributes:
        total: ``consistency + me_max + entropy_weight * entropy``, to be minimised. It may be negative; ``total +
            log K`` is not.
        consistency: cross-entropy between targets and predictions, the mean over this rank's rows.
        me_max: minus the entropy of the mean sharpened prediction over all ranks, in [-log K, 0]; 0 if turned off.
        entropy: of predictions, before sharpening, the mean over this rank's rows, in [0, log K]; 0 if turned off.
    """

    total: Tensor
    consistency: Tensor
    me_max: Tensor
    entropy: Tensor


def paws_loss(
    anchors: Tensor,
    supports: Tensor,
    targets: Tensor,
    labels: ClassLabels,
    *,
    temperature: float,
    sharpening: float,
    me_max: bool = True,
    target_floor: float = TARGET_FLOOR,
    true_classes: tuple[Tensor, Tensor] | None = None,
    entropy_weight: float = 0.0,
    image_weights: Tensor | None = None,
) -> PawsLoss:
    """The loss of this rank's images against the supports of all ranks, in float32 or float64.

    With several ranks, gather the supports' z first. The consistency term is the mean over this rank's rows, the mean
    prediction is taken over all ranks here; the gradient averaged over ranks (as DistributedDataParallel does) then
    equals that of one process on the whole batch. Every rank must hold the same n.

    Args:
        anchors: ((2 + m) n, D) view-major z of all crops.
        supports: (S, D) z of the supports.
        targets: (2n, K) sharpened predictions of the large crops **in the anchors' order**. A large crop is compared
            with the target of the *other* one; the exchange happens here. No gradient flows to them.
        labels: of the supports.
        temperature, sharpening, me_max, entropy_weight: see :class:`PawsConfig`.
        target_floor: target entries below it are set to 0 after small crops' targets are averaged, without
            renormalising. 0 keeps every entry.
        true_classes: which images have their own class, as one-hot label, as target of all views (Appendix D.1), (n,)
            bool; and these classes' positions among the K, (n,) int64.
        image_weights: (n,), which multiply each image's share of the consistency.
    """
    views, rest = divmod(2 * len(anchors), len(targets))
    assert rest == 0, "anchors are (2 + m) n rows, and targets 2n"
    with full_precision(anchors):
        log_predictions = log_soft_nearest_neighbours(anchors, supports, labels, temperature=temperature)
        first, second = targets.detach().chunk(2)  # a large crop's target is the other one's, a small crop's their mean
        wanted = torch.cat([second, first] + [(first + second) / 2] * (views - 2))
        wanted = wanted.masked_fill(wanted < target_floor, 0)
        if true_classes is not None:
            known, classes = true_classes
            one_hot = smooth_labels(classes, wanted.shape[1], smoothing=0.0, dtype=wanted.dtype)
            wanted = torch.where(known.repeat(views).unsqueeze(1), one_hot.repeat(views, 1), wanted)
        distances = cross_entropy(wanted, log_predictions)
        if image_weights is not None:
            distances = distances * image_weights.repeat(views)
        total = consistency = distances.mean()
        regulariser = entropy = torch.zeros_like(consistency)
        if me_max:
            mean = distributed.mean_over_ranks(log_sharpen(log_predictions, temperature=sharpening).mean(0))
            # An entry that underflowed to 0 adds 0 and has a finite gradient.
            regulariser = (mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()
            total = total + regulariser
        if entropy_weight > 0:
            entropy = cross_entropy(log_predictions.exp(), log_predictions).mean()
            total = total + entropy_weight * entropy
        return PawsLoss(total, consistency, regulariser, entropy)


@torch.no_grad()
def paws_targets(h: Tensor, supports: Tensor, labels: ClassLabels, *, temperature: float, sharpening: float) -> Tensor:
    """Sharpened predictions (2n, K) of the large crops from their h (2n, D) and the supports' (S, D)."""
    with full_precision(h):
        return log_sharpen(
            log_soft_nearest_neighbours(h, supports, labels, temperature=temperature), temperature=sharpening
        )


def loss(
    views: Tensor,
    supports: Tensor,
    classes: Tensor,
    *,
    target_views: Tensor | None = None,
    target_supports: Tensor | None = None,
    temperature: float = PawsConfig.temperature,
    sharpening: float = PawsConfig.sharpening,
    label_smoothing: float = PawsConfig.label_smoothing,
    me_max: bool = PawsConfig.me_max,
) -> PawsLoss:
    """PAWS as a function of plain tensors: ``loss(views, supports, classes).total.backward()`` in any training loop.

    Args:
        views: (2 + m, n, D) z of n images: two large crops and m small ones of each. Gradients flow here.
        supports: (S, D) z of labelled images; gradients flow here, too. With several ranks, gather them first.
        classes: (S,) integers, their classes, on the same device. K are the different ones among them.
        target_views: (2, n, D') h of the large crops and
        target_supports: (S, D') of the supports, where z has a prediction head more; without them z makes the targets.
        temperature, sharpening, label_smoothing, me_max: see :class:`PawsConfig`.

    Raises:
        ValueError: shapes do not go together, or a number is out of its range.
    """
    PawsConfig(temperature=temperature, sharpening=sharpening, label_smoothing=label_smoothing)  # checks their ranges
    h = views[:2] if target_views is None else target_views
    h_supports = supports if target_supports is None else target_supports
    count = len(supports)
    if (
        views.ndim != 3 or len(views) < 2 or supports.shape != (count, views.shape[2]) or classes.shape != (count,)
        or classes.is_floating_point() or h.shape[:2] != (2, views.shape[1]) or h_supports.shape != (count, h.shape[2])
    ):  # fmt: skip
        given = [tuple(each.shape) for each in (views, supports, classes, h, h_supports)]
        raise ValueError(
            "views, supports, classes, target_views and target_supports have the shapes "
            f"{', '.join(map(str, given))}: give (2 + m, n, D), (S, D), integers (S,), (2, n, E) and (S, E)."
        )
    known, numbers = classes.cpu().unique(return_inverse=True)
    labels = class_labels(numbers, len(known), smoothing=label_smoothing, device=views.device)
    targets = paws_targets(h.flatten(0, 1), h_supports, labels, temperature=temperature, sharpening=sharpening)
    return paws_loss(
        views.flatten(0, 1), supports, targets, labels, temperature=temperature, sharpening=sharpening, me_max=me_max
    )


_COLLAPSE_TOLERANCE = 0.02  # of log K


class Paws(Objective):
    """PAWS with the options of its config."""

    def __init__(self, config: PawsConfig, *, num_classes: int, total_steps: int) -> None:
        self.config, self.num_classes, self.total_steps = config, num_classes, total_steps

    def inputs(self, batch: Step) -> dict[str, Tensor]:
        """Classes of supports, known ones of images, the weight of the support loss; see :class:`Objective`."""
        labels = class_labels(batch.support_classes, self.num_classes, smoothing=0.0, device=torch.device("cpu"))
        inputs = {"support_classes": labels.classes, "support_rows": labels.rows}
        if self.config.true_label_targets:
            inputs |= {"known": batch.known, "known_classes": batch.known_classes}
        warmup = support_warmup_weight(
            batch.step, total_steps=self.total_steps, fraction=self.config.support_warmup_fraction
        )
        if warmup > 0:
            inputs["support_warmup"] = torch.tensor(warmup, dtype=torch.float64)
        return inputs

    def __call__(
        self, inputs: Mapping[str, Tensor], h: Tensor, z: Tensor, *, images: int, diagnosed: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one step, see :class:`Objective`."""
        config, rows = self.config, len(inputs["support_classes"]) // distributed.world_size()
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        supports, target_supports = distributed.gather_rows_and_constants(z[:rows], h[:rows], dtype=wide)
        labels = ClassLabels(inputs["support_classes"], inputs["support_rows"], config.label_smoothing)
        anchors, h_large = z[rows:].to(wide), h[rows : rows + 2 * images].detach().to(wide)
        true_classes = (inputs["known"], inputs["known_classes"]) if config.true_label_targets else None
        targets, weights, metrics = self.targets(h_large, target_supports, labels)
        loss = paws_loss(
            anchors, supports, targets, labels, temperature=config.temperature, sharpening=config.sharpening,
            me_max=config.me_max, true_classes=true_classes, entropy_weight=config.entropy_weight,
            image_weights=weights,
        )  # fmt: skip
        total, metrics["train/loss_consistency"] = loss.total, loss.consistency
        if config.me_max:
            metrics["train/loss_me_max"] = loss.me_max
        if config.entropy_weight > 0:
            metrics["train/loss_entropy"] = loss.entropy
        if "support_warmup" in inputs:
            # Ours, not the paper's: it keeps few-label runs from collapsing in their first epochs.
            hard = replace(labels, smoothing=0.0)
            metrics["train/loss_support_nce"] = supervised_nce(supports, hard, temperature=config.temperature)
            total = total + inputs["support_warmup"].to(total.dtype) * metrics["train/loss_support_nce"]
        if diagnosed:  # figure 4 of the paper; nothing is communicated, and NT-Xent's value depends on n
            with torch.no_grad():
                contrast = nt_xent(anchors[: 2 * images], temperature=config.temperature)
                metrics["train/instance_discrimination"] = contrast
                classified = supervised_nce(supports, labels, temperature=config.temperature)
                metrics["train/support_classification"] = classified
            metrics["train/confidence"] = targets.amax(-1).mean()
        return total, metrics

    def targets(
        self, h: Tensor, supports: Tensor, labels: ClassLabels
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Sharpened targets (2n, K) of the large crops, weights (n,) of images or None, and further metrics."""
        config = self.config
        sharpened = paws_targets(h, supports, labels, temperature=config.temperature, sharpening=config.sharpening)
        return sharpened, None, {}

    def collapsed(self, metrics: Mapping[str, float]) -> bool:
        """Whether predictions are uniform.

        Then consistency is log K and me-max -log K, the total is 0 and so are all gradients. A run passes close to this
        point in its first steps; only staying there is a collapse. Without me-max, consistency alone says it.
        """
        bound = (1 - _COLLAPSE_TOLERANCE) * math.log(self.num_classes)
        return metrics["train/loss_consistency"] >= bound and (
            not self.config.me_max or metrics["train/loss_me_max"] <= -bound
        )

    def collapse_message(self, step: int, steps: int) -> str:
        """What happened and what helps."""
        return (
            f"predictions have been uniform over {self.num_classes} classes for {steps} steps (step {step}: "
            "consistency near log K, me-max near -log K), where every gradient vanishes. With few labels set "
            "objective.support_warmup_fraction=0.33, use more labels, or try another seed."
        )


def support_warmup_weight(step: int, *, total_steps: int, fraction: float) -> float:
    """Weight of the support loss: 1 at step 0, falling linearly to 0 at step ``fraction * total_steps``."""
    duration = fraction * total_steps
    return max(0.0, 1 - step / duration) if duration > 0 else 0.0
