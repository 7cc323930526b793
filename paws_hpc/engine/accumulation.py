"""The gradient of a batch that is too large for one pass through the network.

The objective couples all rows: supports classify every image, and me-max is of the batch's mean prediction. So the
gradient is no mean over micro-batches. But it passes through the representations z, one row per crop, and the network
couples rows of one micro-batch only (batch normalisation). Hence, with L the loss of all rows and f the network,

    dL/dw = sum over micro-batches a of (dz_a/dw)^T dL/dz_a,    z_a = f(x_a; w)

takes all z first, without gradient, then dL/dz, then one backward pass per micro-batch.

Legend: R rows (crops) per rank, A micro-batches, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from paws_hpc.models.norm import untracked_statistics

Encode = Callable[[nn.Module, int], tuple[Tensor, Tensor]]
"""(network, number of the micro-batch) -> its (h, z), (R / A, D) each."""
Losses = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(h, z) of all rows -> the total, which is differentiated with respect to z, and other metrics."""


def accumulate(model: nn.Module, *, encode: Encode, losses: Losses, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradient of the whole batch's loss to the parameters; one micro-batch's activations live at a time.

    Running statistics move in the second pass, once per micro-batch (:func:`spread_momentum`).

    Args:
        model: the network, or its DistributedDataParallel, whose ranks exchange gradients once.
        encode: runs a micro-batch through a network; the same rows to the bit at every call.
        losses: of all rows.
        rows: (A, R / A) int64, the batch's row of each row of a micro-batch, see :func:`rows_of_micro_batches`.

    Returns:
        what ``losses`` returned.
    """
    network = model.module if isinstance(model, DistributedDataParallel) else model
    with torch.no_grad(), untracked_statistics(network):
        encoded = [encode(network, number) for number in range(len(rows))]
    order = rows.flatten()
    h, z = (
        torch.empty_like(whole).index_copy_(0, order, whole) for whole in map(torch.cat, zip(*encoded, strict=True))
    )
    total, metrics = losses(h, z.requires_grad_())
    total.backward()
    assert z.grad is not None
    for number in range(len(rows)):
        last = number == len(rows) - 1
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
            encode(model, number)[1].backward(z.grad[rows[number]])
    return total, metrics


def rows_of_micro_batches(groups: Sequence[tuple[int, int]], count: int) -> Tensor:
    """Which row of the batch each row of a micro-batch is, if micro-batch a has image a, a + A, a + 2A, ...

    Args:
        groups: (views, images) of each group of crops, in the order of the rows, which are view-major in each.
        count: A.

    Returns:
        (A, R / A) int64.
    """
    columns, first = [], 0
    for views, images in groups:
        rows = torch.arange(first, first + views * images).view(views, images // count, count)
        columns.append(rows.permute(2, 0, 1).flatten(1))
        first += views * images
    return torch.cat(columns, 1)


def spread_momentum(network: nn.Module, count: int) -> None:
    """Let running statistics forget in ``count`` updates what they would in one: m becomes 1 - (1 - m)^(1 / A)."""
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.momentum is not None and count > 1:
            layer.momentum = 1 - (1 - layer.momentum) ** (1 / count)
