"""Ranks, and the collectives that training needs. Alone, every one of them is the identity.

The backward pass of a gathering adds the losses of all ranks, and gradients are averaged over ranks afterwards (as
DistributedDataParallel does), so that the gradient equals that of one process on the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paws_hpc.sizes import check_divides

_MESSAGE_BYTES = 2048


class OtherRankError(RuntimeError):
    """Another rank failed, so that this one cannot go on."""


def rank() -> int:
    """This process's index, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes that train together, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and logs."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def failing_together(device: torch.device) -> Iterator[None]:
    """A block that all ranks enter, that may fail on some of them only, and at whose end they meet.

    Without it those that succeed would wait for the others in the next collective, until that runs out of time.

    Raises:
        Exception: what this rank's block raised.
        OtherRankError: it succeeded here and failed on another rank, whose error is quoted.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised again once the others know
        own = error
    if world_size() > 1:
        text = b"" if own is None else f"{type(own).__name__}: {own}".encode()[:_MESSAGE_BYTES]
        row = torch.tensor([list(text.ljust(_MESSAGE_BYTES, b"\0"))], dtype=torch.uint8, device=device)
        errors = [bytes(text).rstrip(b"\0").decode(errors="replace") for text in _all_gather(row).tolist()]
        failed = [number for number, text in enumerate(errors) if text]
        if failed and own is None:
            raise OtherRankError(f"rank {failed[0]} failed, and no rank goes on without it: {errors[failed[0]]}")
    if own is not None:
        raise own


def per_rank(total: int, *, name: str, accumulate_steps: int = 1) -> int:
    """The share of a global size that one rank holds; ValueError if it does not divide."""
    check_divides(total, world_size(), name=name, accumulate_steps=accumulate_steps)
    return total // world_size()


def share(total: int) -> slice:
    """The contiguous slice of ``range(total)`` that is this rank's; the first ranks hold one more if it is uneven."""
    world, me = world_size(), rank()
    base, extra = divmod(total, world)
    start = me * base + min(me, extra)
    return slice(start, start + base + (me < extra))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return _all_gather(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _reduce_scatter(gradients[0])


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate every rank's rows in rank order, with gradients.

    Args:
        rows: (R, ...), the same shape on every rank.

    Returns:
        (world * R, ...). Backward: the gradients of all ranks' losses with respect to this rank's rows are summed.
    """
    return rows if world_size() == 1 else _Gather.apply(rows)


class _GatherPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, constants: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.dtype = rows.dtype
        gathered, others = (
            _all_gather(torch.cat([rows, constants], 1)).to(dtype).split([rows.shape[1], constants.shape[1]], 1)
        )
        ctx.mark_non_differentiable(others)
        return gathered, others

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(gradients[0]).to(ctx.dtype), None, None


def gather_rows_and_constants(rows: Tensor, constants: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`gather_rows` of two matrices in one collective, of which the second has no gradient.

    Args:
        rows: (R, D), the same shape on every rank. They travel as they are; their gradients are summed in ``dtype``.
        constants: (R, E), of the same dtype as ``rows``.
        dtype: of the result, at least as wide as that of ``rows``.

    Returns:
        (world * R, D) with gradients, and (world * R, E) without.
    """
    if world_size() == 1:
        return rows.to(dtype), constants.detach().to(dtype)
    return _GatherPair.apply(rows, constants.detach(), dtype)


def _all_gather(rows: Tensor) -> Tensor:
    every = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(every, rows.contiguous())
    return every


def _reduce_scatter(rows: Tensor) -> Tensor:
    own = rows.new_empty(rows.shape[0] // world_size(), *rows.shape[1:])
    dist.reduce_scatter_tensor(own, rows.contiguous())
    return own


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        mean = value.clone()
        dist.all_reduce(mean)
        return mean / world_size()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of ``value`` over ranks, with gradients where **every rank's loss takes the mean in the same way**.

    Then the gradient with respect to the mean is the same on every rank, and so equals the mean of the ranks'
    gradients: the backward pass hands it on and communicates nothing.
    """
    return value if world_size() == 1 else _Mean.apply(value)


def concatenate_rows(rows: Tensor, total: int) -> Tensor:
    """Put together the rows (len(share), ...) that each rank computed for its :func:`share` of ``total``; no gradient.

    The result (total, ...) is the same on every rank.
    """
    if world_size() == 1:
        return rows
    longest = -(-total // world_size())
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: rows.shape[0]] = rows.detach()
    base, extra = divmod(total, world_size())
    return torch.cat([own[: base + (r < extra)] for r, own in enumerate(_all_gather(padded).chunk(world_size()))])
