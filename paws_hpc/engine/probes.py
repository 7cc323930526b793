"""Classifiers of frozen features: a linear probe and k nearest neighbours, each chosen by validation.

Legend: M labelled images, N others, D features, K classes.
"""

from __future__ import annotations

from collections import Counter
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
Candidate = tuple[dict[str, float], Predict]
"""A setting, and the classifier that was fitted with it."""


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


def linear_probes(features: Tensor, labels: Tensor, *, num_classes: int) -> list[Candidate]:
    """Multinomial logistic regression on standardised features (M, D), fitted by L-BFGS, for each L2 penalty.

    It minimises ``mean cross-entropy + penalty / 2 * |W|^2``.
    """
    mean, deviation = features.mean(0), features.std(0, unbiased=False)
    scale = torch.where(deviation > 0, deviation, 1.0)

    def logits(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear((rows - mean) / scale, weight, bias)

    inputs = (features - mean) / scale
    weight = inputs.new_zeros(num_classes, inputs.shape[1], requires_grad=True)
    bias = inputs.new_zeros(num_classes, requires_grad=True)
    candidates: list[Candidate] = []
    for penalty in PENALTIES:
        _fit(weight, bias, inputs, labels, penalty)
        fitted = partial(logits, weight=weight.detach().clone(), bias=bias.detach().clone())
        candidates.append(({"penalty": penalty}, fitted))
    return candidates


def _fit(weight: Tensor, bias: Tensor, inputs: Tensor, labels: Tensor, penalty: float) -> None:
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def nearest_neighbours(features: Tensor, labels: Tensor, *, num_classes: int) -> list[Candidate]:
    """The k most similar labelled images vote for their classes, weighted by ``exp(cos / 0.07)``, for each k."""
    supports = F.normalize(features, dim=1)

    def votes(rows: Tensor, *, k: int) -> Tensor:
        scores = []
        for queries in F.normalize(rows, dim=1).split(_AT_ONCE):
            similarity, nearest = (queries @ supports.T).topk(k, dim=1)
            zeros = similarity.new_zeros(len(queries), num_classes)
            scores.append(zeros.scatter_add_(1, labels[nearest], torch.exp(similarity / _VOTE_TEMPERATURE)))
        return torch.cat(scores)

    counts = [k for k in NEIGHBOURS if k <= len(features)]
    return [({"k": k}, partial(votes, k=k)) for k in counts]


def cross_validated(
    fit: Callable[..., list[Candidate]], features: Tensor, labels: Tensor, folds: Sequence[Tensor], *, num_classes: int
) -> Probe:
    """Fitted to all M labelled images, with the setting that classifies most of them while its fold is held out.

    ``folds`` are masks (M,) of the images that each holds out. Of equals the first.
    """
    right: Counter[tuple[tuple[str, float], ...]] = Counter()
    for held_out in folds:
        for setting, predict in fit(features[~held_out], labels[~held_out], num_classes=num_classes):
            right[tuple(setting.items())] += int((predict(features[held_out]).argmax(1) == labels[held_out]).sum())
    candidates = fit(features, labels, num_classes=num_classes)
    setting, predict = max(candidates, key=lambda candidate: right[tuple(candidate[0].items())])
    return Probe(predict, setting, right[tuple(setting.items())] / len(labels))


def best(candidates: Sequence[Candidate], validation: Tensor, labels: Tensor) -> Probe:
    """The candidate with the best accuracy on (N, D) validation images; of equals the first."""
    probes = [
        Probe(predict, setting, (predict(validation).argmax(1) == labels).double().mean().item())
        for setting, predict in candidates
    ]
    return max(probes, key=lambda probe: probe.validation_accuracy)
