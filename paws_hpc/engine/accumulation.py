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
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from paws_hpc.models.norm import untracked_statistics

Encode = Callable[[nn.Module, int], tuple[Tensor, Tensor]]
"""(network, micro-batch) -> its (h, z), (R / A, D) each."""


def accumulate(
    model: nn.Module, *, encode: Encode, losses: Callable[[Tensor, Tensor], dict[str, Tensor]], rows: Tensor
) -> dict[str, Tensor]:
    """Add the gradient of the whole batch's loss to the parameters; one micro-batch's activations live at a time.

    Running statistics move in the second pass, once per micro-batch (:func:`spread_momentum`).

    Args:
        model: the network, or its DistributedDataParallel, whose ranks exchange gradients once.
        encode: runs a micro-batch through a network; the same rows to the bit at every call.
        losses: of all (h, z), (R, D) each, of which only z is to have a gradient; ``train/loss`` is differentiated.
        rows: (A, R / A) int64, the batch's row of each row of a micro-batch, as :func:`rows_of_parts` gives them.

    Returns:
        what ``losses`` returned.
    """
    network = model.module if isinstance(model, DistributedDataParallel) else model
    parts = range(len(rows))
    with torch.no_grad(), untracked_statistics(network):
        encoded = [encode(network, part) for part in parts]
    order = rows.flatten()
    h, z = (
        torch.empty_like(whole).index_copy_(0, order, whole) for whole in map(torch.cat, zip(*encoded, strict=True))
    )
    metrics = losses(h, z.requires_grad_())
    metrics["train/loss"].backward()
    assert z.grad is not None
    for part in parts:
        with _apart(model) if part < len(rows) - 1 else nullcontext():
            encode(model, part)[1].backward(z.grad[rows[part]])
    return metrics


def _apart(model: nn.Module) -> AbstractContextManager[None]:
    """Ranks keep their gradients for themselves."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def rows_of_parts(kinds: Sequence[tuple[int, int]], parts: int) -> Tensor:
    """Which row of the batch each row of a micro-batch is, if micro-batch a has image a, a + A, a + 2A, ...

    Args:
        kinds: (views, images) of each kind of crop, in the order of the rows, which are view-major in each.
        parts: A.

    Returns:
        (A, R / A) int64.
    """
    columns, first = [], 0
    for views, images in kinds:
        rows = torch.arange(first, first + views * images).view(views, images // parts, parts)
        columns.append(rows.permute(2, 0, 1).flatten(1))
        first += views * images
    return torch.cat(columns, 1)


def spread_momentum(network: nn.Module, parts: int) -> None:
    """Let the running statistics forget in ``parts`` updates what they would in one: m becomes 1 - (1 - m)^(1 / A)."""
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.momentum is not None and parts > 1:
            layer.momentum = 1 - (1 - layer.momentum) ** (1 / parts)
