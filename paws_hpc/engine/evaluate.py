"""Networks in evaluation mode, PAWS-NN, and accuracy with its confusion matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paws_hpc import distributed
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.engine.preemption import UNATTENDED, JobControl
from paws_hpc.objective.neighbours import soft_nearest_neighbours

_TOP = 5
_QUERIES_AT_ONCE = 1024  # bounds the (queries, supports) similarity matrix: 128,000 supports take 0.5 GB in fp32


@dataclass(frozen=True)
class Scores:
    """How well N images were classified into K classes.

    Attributes:
        top1: fraction of images whose most probable class is right.
        top5: fraction whose class is among the five most probable; None with fewer than six classes.
        confusion: (K, K) counts, rows the true classes, columns the predicted.
    """

    top1: float
    top5: float | None
    confusion: list[list[int]]


def score(predictions: Tensor, labels: Tensor) -> Scores:
    """Compare (N, K) probabilities or logits with (N,) classes."""
    classes = predictions.shape[1]
    ranked = predictions.topk(min(_TOP, classes), dim=1).indices
    hits = ranked == labels[:, None]
    pairs = labels * classes + ranked[:, 0]
    return Scores(
        top1=hits[:, 0].double().mean().item(),
        top5=hits.any(1).double().mean().item() if classes > _TOP else None,
        confusion=torch.bincount(pairs, minlength=classes**2).reshape(classes, classes).tolist(),
    )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients, and back to what each submodule was in."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training


def forward_set(
    module: nn.Module, images: EvaluationSet, device: torch.device, control: JobControl = UNATTENDED
) -> Tensor:
    """Run a network, (n, 3, H, W) → (n, D), over N images in evaluation mode, each rank over its share.

    ``module`` is on ``device``, and images come in its dtype. Returns (N, D) on every rank, in the order of the set.

    Raises:
        Interrupted: by ``control``, before a batch; the module is as it was before.
    """
    rows = []
    with evaluation_mode(module):
        for batch in images.batches(device, next(module.parameters()).dtype):
            control.check()
            rows.append(module(batch))
    return distributed.concatenate_rows(torch.cat(rows), len(images))


class Representation(nn.Module):
    """An encoder as a map from images to ``h``, the representation before the prediction head that PAWS-NN compares."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) → (n, D)."""
        h: Tensor = self.encoder([images])[0]
        return h


def paws_nn(
    queries: Tensor, supports: Tensor, support_labels: Tensor, *, num_classes: int, temperature: float
) -> Tensor:
    """PAWS-NN (Appendix A): soft nearest neighbours with all labelled images as one-hot support.

    Representations of queries (N, D) and of the labelled images (M, D), and their classes (M,), give (N, K)
    probabilities.
    """
    one_hot = nn.functional.one_hot(support_labels, num_classes).to(supports.dtype)
    several = queries.split(_QUERIES_AT_ONCE)
    return torch.cat([soft_nearest_neighbours(rows, supports, one_hot, temperature=temperature) for rows in several])
