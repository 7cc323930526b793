"""Scores: embeddings in evaluation mode, PAWS-NN, and accuracy with its confusion matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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

    def as_dict(self) -> dict[str, Any]:
        """For ``result.json``."""
        return {"top1": self.top1, "top5": self.top5, "confusion": self.confusion}


def score(predictions: Tensor, labels: Tensor) -> Scores:
    """Compare predictions with the truth.

    Args:
        predictions: (N, K) probabilities or logits.
        labels: (N,) integer classes.
    """
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


def forward_all(module: nn.Module, batches: Iterable[Tensor], total: int, control: JobControl = UNATTENDED) -> Tensor:
    """Run a network over an evaluation set, each rank over its share.

    Args:
        module: (n, 3, H, W) → (n, D).
        batches: this rank's images, in order; equally many batches on every rank and at least one; they may be empty.
        total: images over all ranks, N.
        control: asked before every batch.

    Returns:
        (N, D) on every rank, in the order of the set.

    Raises:
        Interrupted: by ``control``; the module is as it was before.
    """
    parts = []
    with evaluation_mode(module):
        for batch in batches:
            control.check()
            parts.append(module(batch))
    return distributed.concatenate_rows(torch.cat(parts), total)


def forward_set(
    module: nn.Module, images: EvaluationSet, device: torch.device, control: JobControl = UNATTENDED
) -> Tensor:
    """:func:`forward_all` over an evaluation set, in the dtype of the module's parameters, which are on ``device``."""
    dtype = next(module.parameters()).dtype
    return forward_all(module, images.batches(device, dtype), len(images), control)


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

    Args:
        queries: (N, D) representations.
        supports: (M, D) representations of the labelled images.
        support_labels: (M,) classes.
        num_classes: K.
        temperature: tau, of the cosine similarities.

    Returns:
        (N, K) probabilities.
    """
    one_hot = nn.functional.one_hot(support_labels, num_classes).to(supports.dtype)
    return torch.cat(
        [
            soft_nearest_neighbours(part, supports, one_hot, temperature=temperature)
            for part in queries.split(_QUERIES_AT_ONCE)
        ]
    )
