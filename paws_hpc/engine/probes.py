"""Classifiers of frozen features: a linear probe and k nearest neighbours, each chosen on the local validation split.

Legend: M labelled images, N others, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Of the linear probe, in the order of the fits; each fit starts from the weights of the one before."""
NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100, 200)
"""Numbers of voters to try, as far as there are labelled images."""
_VOTE_TEMPERATURE = 0.07  # of a vote's weight exp(cos / T), as in instance discrimination (arXiv:1805.01978)
_ITERATIONS = 200
_AT_ONCE = 1024

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Probe:
    """A classifier of features, with the setting that validation chose.

    Attributes:
        predict: (N, D) features to (N, K) scores.
        setting: ``{"penalty": …}`` or ``{"k": …}``.
        validation_accuracy: of that setting, a fraction.
    """

    predict: Predict
    setting: dict[str, float]
    validation_accuracy: float

    def as_dict(self) -> dict[str, float]:
        """For ``selected.json``."""
        return self.setting | {"validation_accuracy": self.validation_accuracy}


def linear_probe(
    features: Tensor, labels: Tensor, validation: Tensor, validation_labels: Tensor, *, num_classes: int
) -> Probe:
    """Multinomial logistic regression on standardised features, fitted by L-BFGS, its L2 penalty chosen by validation.

    It minimises ``mean cross-entropy + penalty / 2 * |W|^2``. Features are (M, D) of the labelled images and (N, D) of
    the local validation split.
    """
    mean, deviation = features.mean(0), features.std(0, unbiased=False)
    scale = torch.where(deviation > 0, deviation, 1.0)

    def logits(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear((rows - mean) / scale, weight, bias)

    inputs = (features - mean) / scale
    weight = inputs.new_zeros(num_classes, inputs.shape[1], requires_grad=True)
    bias = inputs.new_zeros(num_classes, requires_grad=True)
    candidates: list[tuple[dict[str, float], Predict]] = []
    for penalty in PENALTIES:
        _fit(weight, bias, inputs, labels, penalty)
        fitted = partial(logits, weight=weight.detach().clone(), bias=bias.detach().clone())
        candidates.append(({"penalty": penalty}, fitted))
    return _best(candidates, validation, validation_labels)


def _fit(weight: Tensor, bias: Tensor, inputs: Tensor, labels: Tensor, penalty: float) -> None:
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def nearest_neighbours(
    features: Tensor, labels: Tensor, validation: Tensor, validation_labels: Tensor, *, num_classes: int
) -> Probe:
    """The k most similar labelled images vote for their classes, weighted by ``exp(cos / 0.07)``; k by validation."""
    supports = F.normalize(features, dim=1)

    def votes(rows: Tensor, *, k: int) -> Tensor:
        scores = []
        for queries in F.normalize(rows, dim=1).split(_AT_ONCE):
            similarity, nearest = (queries @ supports.T).topk(k, dim=1)
            zeros = similarity.new_zeros(len(queries), num_classes)
            scores.append(zeros.scatter_add_(1, labels[nearest], torch.exp(similarity / _VOTE_TEMPERATURE)))
        return torch.cat(scores)

    counts = [k for k in NEIGHBOURS if k <= len(features)]
    return _best([({"k": k}, partial(votes, k=k)) for k in counts], validation, validation_labels)


def _best(candidates: Sequence[tuple[dict[str, float], Predict]], validation: Tensor, labels: Tensor) -> Probe:
    """The candidate with the best validation accuracy; of equals the first."""
    probes = [
        Probe(predict, setting, (predict(validation).argmax(1) == labels).double().mean().item())
        for setting, predict in candidates
    ]
    return max(probes, key=lambda probe: probe.validation_accuracy)
