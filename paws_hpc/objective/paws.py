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
from paws_hpc.objective.labels import class_labels, on_device, smooth_labels
from paws_hpc.objective.nce import nt_xent, supervised_nce
from paws_hpc.objective.neighbours import (
    Labels,
    cross_entropy,
    full_precision,
    log_sharpen,
    log_soft_nearest_neighbours,
)


class TrueClasses(NamedTuple):
    """What is known of the n images' own labels (paper, Appendix D.1).

    Attributes:
        known: (n,) bool.
        classes: (n,) int64 places among the K classes of the supports; read where ``known``.
    """

    known: Tensor
    classes: Tensor


class PawsLoss(NamedTuple):
    """The objective and its parts: 0-d tensors in nats.

    Attributes:
        total: ``consistency + me_max + entropy_weight * entropy``, to be minimised. It may be negative; ``total +
            log K`` is not.
        consistency: cross-entropy between targets and predictions, the mean over this rank's rows.
        me_max: minus the entropy of the mean sharpened prediction over all ranks, in [-log K, 0]; 0 if turned off.
        confidence: largest entry of a sharpened target, the mean over this rank's large crops; no gradient.
        entropy: of predictions, before sharpening, the mean over this rank's rows, in [0, log K]; 0 if turned off.
    """

    total: Tensor
    consistency: Tensor
    me_max: Tensor
    confidence: Tensor
    entropy: Tensor


def paws_loss(
    anchors: Tensor,
    anchor_supports: Tensor,
    targets: Tensor,
    target_supports: Tensor,
    support_labels: Labels,
    *,
    temperature: float = 0.1,
    sharpening: float = 0.25,
    num_small_crops: int = 6,
    me_max: bool = True,
    target_floor: float = TARGET_FLOOR,
    true_classes: TrueClasses | None = None,
    entropy_weight: float = 0.0,
) -> PawsLoss:
    """The loss of this rank's images against the supports of all ranks.

    The supports and their labels arrive complete: with several ranks, gather z and h with
    :func:`paws_hpc.distributed.gather_rows_and_constants` first. The consistency term is the mean over this rank's
    rows, the mean prediction is taken over all ranks here; the gradient averaged over ranks (as DistributedDataParallel
    does) then equals that of one process on the whole batch. Every rank must hold the same n.

    Args:
        anchors: ((2 + m) n, D) view-major z, the output of the prediction head, for all crops.
        anchor_supports: (S, D) z of the supports.
        targets: (2n, D) h, the input of the prediction head, for the large crops **in the anchors' order**. A large
            crop is compared with the target of the *other* one; the exchange happens here.
        target_supports: (S, D) h of the supports.
        support_labels: (S, K), :func:`paws_hpc.objective.smooth_labels` or any soft labels; or, cheaper, class numbers
            with smoothing, :func:`paws_hpc.objective.class_labels`.
        temperature: tau of the similarity classifier.
        sharpening: T of targets and mean entropy.
        num_small_crops: m.
        me_max: whether to maximise the mean entropy.
        target_floor: target entries below it are set to 0 after small crops' targets are averaged, without
            renormalising. 0 keeps every entry.
        true_classes: images whose class, as one-hot label, is the target of all their views (Appendix D.1).
        entropy_weight: of the mean entropy of predictions (Appendix D.2).

    Returns:
        :class:`PawsLoss`, float32 (float64 for float64 features). No gradient flows to targets and target supports.

    Raises:
        ValueError: rows do not go with ``num_small_crops`` or with each other.
    """
    _check_rows(anchors, targets, num_small_crops)
    with full_precision(anchors):
        with torch.no_grad():
            log_targets = log_soft_nearest_neighbours(targets, target_supports, support_labels, temperature=temperature)
            sharpened = log_sharpen(log_targets, temperature=sharpening)
        return view_loss(
            log_soft_nearest_neighbours(anchors, anchor_supports, support_labels, temperature=temperature),
            sharpened,
            sharpening=sharpening,
            num_small_crops=num_small_crops,
            me_max=me_max,
            target_floor=target_floor,
            true_classes=true_classes,
            entropy_weight=entropy_weight,
        )


def view_loss(
    log_predictions: Tensor,
    sharpened: Tensor,
    *,
    sharpening: float,
    num_small_crops: int,
    me_max: bool,
    target_floor: float = TARGET_FLOOR,
    true_classes: TrueClasses | None = None,
    entropy_weight: float = 0.0,
    image_weights: Tensor | None = None,
) -> PawsLoss:
    """:func:`paws_loss` of predictions ((2 + m) n, K), as logarithms, and sharpened targets (2n, K).

    ``image_weights`` (n,) multiply each image's part of the consistency.
    """
    first, second = sharpened.chunk(2)  # a large crop's target is the other one's, a small crop's their mean
    wanted = torch.cat([second, first] + [(first + second) / 2] * num_small_crops)
    wanted = wanted.masked_fill(wanted < target_floor, 0)
    if true_classes is not None:
        wanted = _true_where_known(wanted, true_classes)
    distances = cross_entropy(wanted, log_predictions)
    if image_weights is not None:
        distances = distances * image_weights.repeat(2 + num_small_crops)
    total = consistency = distances.mean()
    regulariser = entropy = torch.zeros_like(consistency)
    if me_max:
        mean_prediction = log_sharpen(log_predictions, temperature=sharpening).mean(0)
        regulariser = -_entropy(distributed.mean_over_ranks(mean_prediction))
        total = total + regulariser
    if entropy_weight > 0:
        entropy = cross_entropy(log_predictions.exp(), log_predictions).mean()
        total = total + entropy_weight * entropy
    return PawsLoss(total, consistency, regulariser, sharpened.amax(-1).mean(), entropy)


def _true_where_known(wanted: Tensor, true: TrueClasses) -> Tensor:
    """((2 + m) n, K): one-hot rows for all views of images whose class is known, ``wanted`` for the others."""
    labels = smooth_labels(true.classes, wanted.shape[1], smoothing=0.0, dtype=wanted.dtype)
    views = wanted.shape[0] // labels.shape[0]
    return torch.where(true.known.repeat(views).unsqueeze(1), labels.repeat(views, 1), wanted)


def _entropy(probabilities: Tensor) -> Tensor:
    """Entropy of (K,) in nats; an entry that underflowed to 0 adds 0 and has a finite gradient."""
    smallest = torch.finfo(probabilities.dtype).tiny
    return -(probabilities * probabilities.clamp_min(smallest).log()).sum()


def _check_rows(anchors: Tensor, targets: Tensor, num_small_crops: int) -> None:
    if num_small_crops < 0:
        raise ValueError(f"num_small_crops={num_small_crops} is negative.")
    images, rest = divmod(anchors.shape[0], 2 + num_small_crops)
    if rest or images == 0:
        raise ValueError(
            f"{anchors.shape[0]} anchor rows are not 2 large and num_small_crops={num_small_crops} small crops of n "
            "images each."
        )
    if targets.shape[0] != 2 * images:
        raise ValueError(
            f"{targets.shape[0]} target rows: {anchors.shape[0]} anchor rows with num_small_crops={num_small_crops} "
            f"need {2 * images}, one for each large crop."
        )


_COLLAPSE_TOLERANCE = 0.02  # of log K


class Paws(Objective):
    """PAWS with the options of its config."""

    def __init__(self, config: PawsConfig, *, num_classes: int, total_steps: int) -> None:
        self.config, self.num_classes, self.total_steps = config, num_classes, total_steps

    def __call__(self, batch: Step, h: Tensor, z: Tensor, *, diagnosed: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one step, see :class:`Objective`."""
        config, rows, images = self.config, batch.num_support_rows, len(batch.records)
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        supports, target_supports = distributed.gather_rows_and_constants(z[:rows], h[:rows], dtype=wide)
        labels = class_labels(
            batch.support_classes, self.num_classes, smoothing=config.label_smoothing, device=z.device
        )
        anchors, targets = z[rows:].to(wide), h[rows : rows + 2 * images].detach().to(wide)
        true_classes = None
        if config.true_label_targets:
            true_classes = TrueClasses(on_device(batch.known, z.device), on_device(batch.known_classes, z.device))
        loss, metrics = self.loss(anchors, supports, targets, target_supports, labels, true_classes=true_classes)
        total, metrics["train/loss_consistency"] = loss.total, loss.consistency
        if config.me_max:
            metrics["train/loss_me_max"] = loss.me_max
        if config.entropy_weight > 0:
            metrics["train/loss_entropy"] = loss.entropy
        warmup = support_warmup_weight(
            batch.step, total_steps=self.total_steps, fraction=config.support_warmup_fraction
        )
        if warmup > 0:  # ours, not the paper's: keeps few-label runs from collapsing in their first epochs
            hard = replace(labels, smoothing=0.0)
            metrics["train/loss_support_nce"] = supervised_nce(supports, hard, temperature=config.temperature)
            total = total + warmup * metrics["train/loss_support_nce"]
        if diagnosed:
            metrics |= diagnose(anchors[: 2 * images], supports, labels, temperature=config.temperature)
            metrics["train/confidence"] = loss.confidence
        return total, metrics

    def loss(
        self,
        anchors: Tensor,
        supports: Tensor,
        targets: Tensor,
        target_supports: Tensor,
        labels: Labels,
        *,
        true_classes: TrueClasses | None,
    ) -> tuple[PawsLoss, dict[str, Tensor]]:
        """:func:`paws_loss`, and metrics of this objective alone."""
        config = self.config
        loss = paws_loss(
            anchors,
            supports,
            targets,
            target_supports,
            labels,
            temperature=config.temperature,
            sharpening=config.sharpening,
            num_small_crops=2 * len(anchors) // len(targets) - 2,
            me_max=config.me_max,
            true_classes=true_classes,
            entropy_weight=config.entropy_weight,
        )
        return loss, {}

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


@torch.no_grad()
def diagnose(large_crops: Tensor, supports: Tensor, labels: Labels, *, temperature: float) -> dict[str, Tensor]:
    """The paper's figure 4b, in nats; nothing is communicated.

    Args:
        large_crops: (2n, D) z of this rank's large crops: n first views, then the n second views.
        supports: (S, D) z of the supports of all ranks.
        labels: of the supports.
        temperature: of both contrastive losses.

    Returns:
        0-dimensional: NT-Xent among the 2n rows of a rank (so that its value depends on n), and supervised NCE.
    """
    return {
        "train/instance_discrimination": nt_xent(large_crops, temperature=temperature),
        "train/support_classification": supervised_nce(supports, labels, temperature=temperature),
    }
