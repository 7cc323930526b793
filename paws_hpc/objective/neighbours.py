"""The similarity classifier: a query takes the labels of the supports that it resembles.

Paper, section 3: ``p = softmax(cos(z, z_S) / tau) @ y_S``.

Legend: Q queries, S supports, K classes, D features. Everything here is computed in float32, also under autocast
(float64 stays float64): bfloat16 cosines divided by a small temperature err by about 1 %. Losses carry probabilities as
logarithms, so that none overflows at small temperatures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from paws_hpc.objective.labels import ClassLabels, log_mixture


def soft_nearest_neighbours(queries: Tensor, supports: Tensor, support_labels: Tensor, *, temperature: float) -> Tensor:
    """Class probabilities (Q, K) of queries (Q, D): labels of supports (S, D), weighted by a softmax over cosines.

    ``support_labels`` (S, K) are any rows that sum to 1. The result is float32 (float64 if the features are).
    """
    with full_precision(queries):
        logits = cosine_logits(queries, supports, temperature=temperature)
        return F.softmax(logits, dim=-1) @ support_labels.to(logits.dtype)


def log_soft_nearest_neighbours(
    queries: Tensor, supports: Tensor, support_labels: ClassLabels, *, temperature: float
) -> Tensor:
    """The logarithm of :func:`soft_nearest_neighbours`, exact also where the probability itself underflows.

    Gradients flow to queries and supports. A class that no support bears is ``-inf``, with zero gradient.
    """
    with full_precision(queries):
        return log_mixture(cosine_logits(queries, supports, temperature=temperature), support_labels)


def sharpen(probabilities: Tensor, *, temperature: float) -> Tensor:
    """Make distributions (..., K) more confident: ``p_k^(1/T) / sum_j p_j^(1/T)`` (the paper's rho).

    T = 1 changes nothing. The result is float32 (float64 if the input is).
    """
    probabilities = at_least_float32(probabilities)
    # Relative to the row's largest entry: (1/1000)^(1/T) alone would underflow at small T. The factor cancels in the
    # quotient.
    powers = (probabilities / probabilities.detach().amax(-1, keepdim=True)) ** (1 / temperature)
    return powers / powers.sum(-1, keepdim=True)


def log_sharpen(log_probabilities: Tensor, *, temperature: float) -> Tensor:
    """:func:`sharpen` for log-probabilities: (..., K) to (..., K) probabilities."""
    return F.softmax(log_probabilities / temperature, dim=-1)


def cross_entropy(targets: Tensor, log_probabilities: Tensor) -> Tensor:
    """``-sum_k targets_k log p_k`` of each row, (R, K) to (R,), where 0 log 0 is 0; targets are constant."""
    return -(targets * log_probabilities.masked_fill(targets == 0, 0)).sum(-1)


class _Directions(torch.autograd.Function):
    """Rows of unit length, as ``F.normalize`` gives; the backward pass keeps them and not the rows they came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(1e-12)
        directions = rows / norms
        ctx.save_for_backward(directions, norms)
        return directions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        directions, norms = ctx.saved_tensors
        along = (directions * gradients[0]).sum(-1, keepdim=True)
        return (gradients[0] - directions * along) / norms


def cosine_logits(queries: Tensor, supports: Tensor, *, temperature: float) -> Tensor:
    """``cos(query, support) / temperature``: (Q, D) and (S, D) to (Q, S); the cosine with a zero vector is 0."""
    directions = _Directions.apply(at_least_float32(queries))
    support_directions = _Directions.apply(at_least_float32(supports))
    return (directions / temperature) @ support_directions.T


@contextmanager
def full_precision(like: Tensor) -> Iterator[None]:
    """Compute in float32 on the device of ``like``: autocast off, and no TF32 in matrix products of the forward pass.

    A run may allow TF32 elsewhere, by either of torch's interfaces; its setting is put back.
    """
    products = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # not in stubs
    before = [product.fp32_precision for product in products]
    for product in products:
        product.fp32_precision = "ieee"
    try:
        with torch.autocast(like.device.type, enabled=False):
            yield
    finally:
        for product, precision in zip(products, before, strict=True):
            product.fp32_precision = precision


def at_least_float32(values: Tensor) -> Tensor:
    """``values`` in float32, or as they are if they are float64."""
    return values if values.dtype == torch.float64 else values.float()
