"""Labels of supports: as rows of probabilities, or as class numbers with smoothing.

Legend: S supports, K classes, M supports of one class, Q queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def smooth_labels(classes: Tensor, num_classes: int, *, smoothing: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Label rows (S, K) of supports: ``1 - s + s/K`` at the class and ``s/K`` elsewhere.

    Args:
        classes: (S,) integers in 0..K-1, numbered within the sampled support set (not in the data set).
        num_classes: K.
        smoothing: s in [0, 1); 0 gives one-hot rows.
        dtype: of the result.
    """
    off = smoothing / num_classes
    labels = torch.full((classes.shape[0], num_classes), off, dtype=dtype, device=classes.device)
    return labels.scatter_(1, classes.long().unsqueeze(1), 1 - smoothing + off)


@dataclass(frozen=True)
class ClassLabels:
    """The labels of :func:`smooth_labels` without their matrix; :func:`class_labels` makes them.

    The product of weights and such labels is a sum over the supports of each class, ``(1 - s) sum + s/K``.

    Attributes:
        classes: (S,) int64.
        rows: (M, K) int64, the supports of each class. Where a class has fewer than M, S stands for none.
        smoothing: s in [0, 1).
    """

    classes: Tensor
    rows: Tensor
    smoothing: float


def class_labels(classes: Tensor, num_classes: int, *, smoothing: float, device: torch.device) -> ClassLabels:
    """Sort supports by class on the host, and bring the result to the device without waiting for it.

    Args:
        classes: (S,) integers in 0..K-1 in host memory, as in :func:`smooth_labels`.
        num_classes: K.
        smoothing: s in [0, 1).
        device: of the result.
    """
    assert classes.device.type == "cpu", "the host would wait for the device"
    assert 0 <= classes.min() <= classes.max() < num_classes, "classes are numbered within the sampled support set"
    classes = classes.long()
    counts = classes.bincount(minlength=num_classes)
    order = classes.argsort(stable=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rows = torch.full((int(counts.max()), num_classes), len(classes))
    rows[torch.arange(len(classes)) - starts, classes[order]] = order
    together = on_device(torch.cat([classes, rows.flatten()]), device)
    return ClassLabels(together[: len(classes)], together[len(classes) :].view_as(rows), smoothing)


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy from host memory without making the host wait; that takes pinned memory."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def log_mixture(logits: Tensor, labels: ClassLabels) -> Tensor:
    """``log(softmax(logits) @ labels)``, exact at any temperature because sums are taken as logarithms throughout.

    Args:
        logits: (Q, S); entries may be masked with ``-inf``, though not a whole row.
        labels: of the S supports.

    Returns:
        (Q, K); without smoothing ``-inf``, with zero gradient, for a class that no unmasked support bears. The backward
        pass keeps ``logits`` and matrices of (Q, K).
    """
    log_shares = F.log_softmax(_LogSums.apply(logits, labels.classes, labels.rows), dim=-1)
    if labels.smoothing == 0:
        return log_shares
    floor = log_shares.new_full((), labels.smoothing / labels.rows.shape[1]).log()
    return torch.logaddexp(log_shares + math.log1p(-labels.smoothing), floor)


class _LogSums(torch.autograd.Function):
    """(Q, S) logits to the (Q, K) logarithms of each class's sum of exponentials."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor, rows: Tensor) -> Tensor:
        padded = logits if rows.numel() == logits.shape[1] else F.pad(logits, (0, 1), value=-math.inf)
        sums = padded.index_select(1, rows.flatten()).unflatten(1, rows.shape).logsumexp(1)
        ctx.save_for_backward(logits, classes, sums)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, classes, sums = ctx.saved_tensors
        finite = sums.masked_fill(sums == -math.inf, 0)  # -inf - -inf would be nan; such a class has no gradient
        weights = finite.index_select(1, classes).neg_().add_(logits).exp_()
        return weights.mul_(gradients[0].index_select(1, classes)), None, None
