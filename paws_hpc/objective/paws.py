"""The PAWS objective: consistency between views plus mean-entropy maximisation (paper, equations 1 and 4).

Legend: n images of this rank, m small crops each, S supports, K classes, D features. Rows of unlabelled crops are
view-major: [large 1 (n); large 2 (n); small 1 (n); ...; small m (n)].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from paws_hpc import distributed
from paws_hpc.metrics import Metric
from paws_hpc.objective.labels import smooth_labels
from paws_hpc.objective.neighbours import (
    Labels,
    cross_entropy,
    full_precision,
    log_sharpen,
    log_soft_nearest_neighbours,
)

METRICS = [
    Metric("train/loss_consistency", "Consistency", "nats", "Loss", higher_is_better=False, when_uniform=1,
           description="Consistency is the cross-entropy between targets and predictions of other views."),
    Metric("train/loss_me_max", "Mean-entropy maximisation", "nats", "Loss", "me-max", False, when_uniform=-1,
           description="Me-max is minus the entropy of the mean prediction: at -log K all classes are predicted "
           "equally often.", from_zero=False),
    Metric("train/loss_entropy", "Entropy of predictions", "nats", "Loss", "entropy", False, when_uniform=1,
           description="Entropy is the mean of single predictions (D.2), before its weight."),
    Metric("train/loss_support_nce", "Support warm-up loss", "nats", "Loss", "support NCE", False,
           "Support NCE is added with a weight that falls to 0; it keeps runs with few labels from collapsing and is "
           "no part of the paper."),
    Metric("train/image_weight", "Weight of unlabelled images", "fraction",
           description="The mean weight of the unlabelled images in the loss."),
]  # fmt: skip


def support_warmup_weight(step: int, *, total_steps: int, fraction: float, weight: float) -> float:
    """Weight of the support loss: ``weight`` at step 0, falling linearly to 0 at step ``fraction * total_steps``."""
    duration = fraction * total_steps
    return weight * max(0.0, 1 - step / duration) if duration > 0 else 0.0


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
    target_floor: float = 1e-4,
    true_classes: TrueClasses | None = None,
    entropy_weight: float = 0.0,
    image_weights: Tensor | None = None,
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
            renormalising. The paper is silent about it; its code has 1e-4. 0 keeps every entry.
        true_classes: images whose class, as one-hot label, is the target of all their views (Appendix D.1).
        entropy_weight: of the mean entropy of predictions (Appendix D.2).
        image_weights: (n,) positive constants; every mean over rows, that of me-max included, becomes a weighted mean
            over the rows of all ranks. Only their ratios count. None: all images weigh the same.

    Returns:
        :class:`PawsLoss`, float32 (float64 for float64 features). No gradient flows to targets and target supports.

    Raises:
        ValueError: rows do not go with ``num_small_crops`` or with each other.
    """
    _check_rows(anchors, targets, num_small_crops)
    with full_precision(anchors):
        log_predictions = log_soft_nearest_neighbours(anchors, anchor_supports, support_labels, temperature=temperature)
        sharpened = _sharpened_targets(
            targets, target_supports, support_labels, temperature=temperature, sharpening=sharpening
        )
        wanted = _targets_of_views(sharpened, num_small_crops, target_floor)
        if true_classes is not None:
            wanted = _true_where_known(wanted, true_classes)
        shares = None if image_weights is None else _shares(image_weights, log_predictions)
        consistency = _mean_over_rows(cross_entropy(wanted, log_predictions), shares)
        if me_max:
            sharpened_predictions = log_sharpen(log_predictions, temperature=sharpening)
            mean_prediction = distributed.mean_over_ranks(_mean_over_rows(sharpened_predictions, shares))
            regulariser = -_entropy(mean_prediction)
        else:
            regulariser = torch.zeros_like(consistency)
        entropy, total = torch.zeros_like(consistency), consistency + regulariser
        if entropy_weight > 0:
            entropy = _mean_over_rows(cross_entropy(log_predictions.exp(), log_predictions), shares)
            total = total + entropy_weight * entropy
    return PawsLoss(total, consistency, regulariser, sharpened.amax(-1).mean(), entropy)


@torch.no_grad()
def _sharpened_targets(
    targets: Tensor, supports: Tensor, labels: Labels, *, temperature: float, sharpening: float
) -> Tensor:
    """(2n, K) sharpened predictions for the large crops, in their own order."""
    log_predictions = log_soft_nearest_neighbours(targets, supports, labels, temperature=temperature)
    return log_sharpen(log_predictions, temperature=sharpening)


def _targets_of_views(sharpened: Tensor, num_small_crops: int, floor: float) -> Tensor:
    """((2 + m) n, K): large crops get each other's target, small crops the mean of both; then the floor."""
    first, second = sharpened.chunk(2)
    wanted = torch.cat([second, first] + [(first + second) / 2] * num_small_crops)
    return wanted.masked_fill(wanted < floor, 0)


@torch.no_grad()
def _shares(image_weights: Tensor, rows: Tensor) -> Tensor:
    """(R,) weights of the rows whose mean over all ranks is 1; equal weights give 1 to the bit."""
    shares = image_weights.to(rows.dtype) / distributed.mean_over_ranks(image_weights.to(rows.dtype).mean())
    return shares.repeat(rows.shape[0] // len(shares))


def _mean_over_rows(values: Tensor, shares: Tensor | None) -> Tensor:
    """(R, ...) to (...): this rank's part of the weighted mean over all ranks, which is the mean of the parts."""
    if shares is None:
        return values.mean(0)
    return (values * shares.view(-1, *[1] * (values.ndim - 1))).mean(0)


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
