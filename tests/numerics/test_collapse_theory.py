"""Appendix D's alternatives are their equations, and what Propositions 1 and 2 and D.2 guarantee, and what they do not.

The paper argues that predictions at collapse (all representations equal) are uniform and the targets are not, so that
the gradient is not zero. But predictions depend on representations through cosines, and a cosine of equal directions is
at its maximum: its gradient vanishes whatever the target. At collapse the gradient is zero with sharpened targets, with
true labels and with entropy minimisation alike. What differs is how fast it grows with the distance from collapse:
proportionally with true labels, with the cube of the distance for the other two and for me-max.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from paws_hpc.objective.paws import PawsLoss
from tests.objective import labels_for, step_loss

K, PER_CLASS, N, D, SMALL = 4, 3, 5, 6, 2
S, TAU, T = K * PER_CLASS, 0.1, 0.25
CLASSES = torch.arange(K).repeat(PER_CLASS)
TrueClasses = tuple[Tensor, Tensor]
KNOWN = torch.tensor([True, False, False, True, False]), torch.tensor([2, 0, 0, 1, 0])
NONE = torch.zeros(N, dtype=torch.bool), torch.zeros(N, dtype=torch.int64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(z: Tensor, h: Tensor, *, smoothing: float = 0.1, small: int = SMALL, **options: object) -> PawsLoss:
    """Of rows [supports; large 1; large 2; small ...]."""
    anchors, targets = z[S : S + (2 + small) * N], h[S : S + 2 * N]
    return step_loss(anchors, z[:S], targets, h[:S], labels_for(CLASSES, K, smoothing), target_floor=0.0, **options)


# --- D.1 and D.2 against NumPy ----------------------------------------------------------------------------------------


def predictions(rows: np.ndarray, supports: np.ndarray, labels: np.ndarray) -> np.ndarray:
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in (rows, supports)]
    weights = np.exp(unit[0] @ unit[1].T / TAU)
    return weights / weights.sum(1, keepdims=True) @ labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("known", [KNOWN, NONE])
def test_targets_of_labelled_images_are_their_labels_and_entropy_is_of_predictions(
    smoothing: float, known: TrueClasses
) -> None:
    z, h = draw(S + (2 + SMALL) * N, D), draw(S + 2 * N, D, seed=1)
    loss = loss_of(z, h, smoothing=smoothing, true_classes=known, entropy_weight=0.7)
    labels = (1 - smoothing) * np.eye(K)[CLASSES.numpy()] + smoothing / K
    p = predictions(z[S:].numpy(), z[:S].numpy(), labels)
    sharp = predictions(h[S:].numpy(), h[:S].numpy(), labels) ** (1 / T)
    sharp /= sharp.sum(1, keepdims=True)
    total, entropy, mean = 0.0, 0.0, np.zeros(K)
    for view in range(2 + SMALL):
        for image in range(N):
            row = p[view * N + image]
            target = {0: sharp[N + image], 1: sharp[image]}.get(view, (sharp[image] + sharp[N + image]) / 2)
            if known[0][image]:
                target = np.eye(K)[int(known[1][image])]
            total -= (target * np.log(row)).sum()
            entropy -= (row * np.log(row)).sum()
            mean += row ** (1 / T) / (row ** (1 / T)).sum()
    count = (2 + SMALL) * N
    mean /= count
    expected = (total / count, (mean * np.log(mean)).sum(), entropy / count)
    np.testing.assert_allclose([loss.consistency, loss.me_max, loss.entropy], expected, rtol=1e-12)
    np.testing.assert_allclose(loss.total, expected[0] + expected[1] + 0.7 * expected[2], rtol=1e-12)


def test_both_are_off_by_default() -> None:
    z, h = draw(S + (2 + SMALL) * N, D), draw(S + 2 * N, D, seed=1)
    plain = loss_of(z, h)
    assert plain.entropy == 0
    assert torch.equal(plain.total, plain.consistency + plain.me_max)
    assert torch.equal(loss_of(z, h, true_classes=NONE).total, plain.total)


def test_their_gradients_are_those_of_their_values() -> None:
    """With predictions of exactly 0 too, which labels without smoothing give where cosines are far apart."""
    h = draw(S + 2 * N, D, seed=1)

    def total(z: Tensor) -> Tensor:
        return loss_of(z, h, true_classes=KNOWN, entropy_weight=0.7).total

    assert torch.autograd.gradcheck(total, draw(S + (2 + SMALL) * N, D).requires_grad_())
    far = torch.eye(6, dtype=torch.float64)[[0, 1, 2, 3] * PER_CLASS + [0, 1, 2, 3, 0] * (2 + SMALL)].requires_grad_()
    labels = labels_for(CLASSES, K, 0.0)
    loss = step_loss(far[S:], far[:S], h[S:], h[:S], labels, temperature=0.001, entropy_weight=0.7)
    (gradient,) = torch.autograd.grad(loss.entropy, far)
    assert loss.entropy == 0
    assert torch.isfinite(gradient).all()


# --- the propositions -------------------------------------------------------------------------------------------------

TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sharpened targets": lambda z: loss_of(z, z.detach(), small=0).consistency,
    "true labels": lambda z: loss_of(z, z.detach(), small=0, true_classes=KNOWN).consistency,
    "entropy": lambda z: loss_of(z, z.detach(), small=0, entropy_weight=1.0).entropy,
    "me-max": lambda z: loss_of(z, z.detach(), small=0).me_max,
}
EXPONENT = {"sharpened targets": 3, "true labels": 1, "entropy": 3, "me-max": 3}


def near_collapse(distance: float, seed: int = 0) -> Tensor:
    """Rows of unit length about one direction, each a random vector of that length away."""
    common = torch.nn.functional.normalize(draw(1, D, seed=seed + 50))
    return (common + distance * torch.nn.functional.normalize(draw(S + 2 * N, D, seed=seed))).requires_grad_()


def gradient_norm(term: str, distance: float, seed: int = 0) -> float:
    z = near_collapse(distance, seed)
    return torch.autograd.grad(TERMS[term](z), z)[0].norm().item()


@pytest.mark.parametrize("term", TERMS)
def test_at_exact_collapse_every_gradient_vanishes_whatever_the_targets(term: str) -> None:
    """Against the letter of Proposition 1, Proposition 2 and D.2; with true labels the loss itself is log K."""
    assert gradient_norm(term, 0.0) < 1e-14
    loss = loss_of(z := near_collapse(0.0), z.detach(), small=0, true_classes=KNOWN, entropy_weight=1.0)
    np.testing.assert_allclose([loss.consistency.item(), loss.entropy.item()], math.log(K), rtol=1e-12)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_near_collapse_the_gradient_grows_with_this_power_of_the_distance(term: str, seed: int) -> None:
    norms = [gradient_norm(term, distance, seed) for distance in (1e-2, 5e-3, 2.5e-3)]
    exponents = [math.log2(larger / smaller) for larger, smaller in pairwise(norms)]
    assert exponents == pytest.approx([EXPONENT[term]] * 2, abs=0.1)


def spread_after(distance: float, steps: int, rate: float, known: TrueClasses, weight: float) -> float:
    """By which factor gradient descent moves rows from their common direction."""
    z = near_collapse(distance)

    def spread() -> float:
        unit = torch.nn.functional.normalize(z.detach())
        return (unit - unit.mean(0)).norm().item()

    before = spread()
    for _ in range(steps):
        loss = loss_of(z, z.detach(), small=0, true_classes=known, entropy_weight=weight)
        with torch.no_grad():
            z -= rate * torch.autograd.grad(loss.total, z)[0]
    return spread() / before


def test_true_labels_leave_collapse_at_a_rate_that_does_not_depend_on_how_near_it_is() -> None:
    """Exponential growth: what the proposition means in practice. The others' rate falls with the distance squared."""
    with_labels = [spread_after(distance, 20, 0.2, KNOWN, 0.0) for distance in (1e-3, 1e-5, 1e-7)]
    assert min(with_labels) > 2
    assert with_labels == pytest.approx([with_labels[-1]] * 3, rel=0.05)
    for weight in (0.0, 1.0):  # of the entropy
        growth = [abs(spread_after(distance, 40, 0.2, NONE, weight) - 1) for distance in (1e-2, 1e-3)]
        assert growth[0] < 0.2
        assert growth[0] / growth[1] == pytest.approx(100, rel=0.2)
