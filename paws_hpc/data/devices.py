"""Tensors on their way to the training device, and work that runs there ahead of its use."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy without making the host wait; that takes pinned memory."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    pinned = values if values.is_pinned() else values.pin_memory()
    return pinned.to(device, non_blocking=True)


def host_buffer(*shape: int, device: torch.device) -> Tensor:
    """A uint8 tensor on the host, of any content; pinned if it is to go to a GPU.

    Else in pages of its own, which the system has back with the tensor: freed into the C library's heap, batches of
    tens of MB left it in pieces, and the memory of a process grew and shrank by a third.
    """
    if device.type == "cuda" or not math.prod(shape):
        return torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    pages = mmap.mmap(-1, math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8).view(shape)


class Ahead:
    """Tensors that one thread makes on a device for another one to use.

    On a GPU they are made on a stream of their own, beside the step that is running; see :meth:`take`.
    """

    def __init__(self, make: Callable[[], list[Tensor]], stream: torch.cuda.Stream | None) -> None:
        """Make them.

        Args:
            make: enqueues the work.
            stream: to enqueue it on; None for a CPU, where it is done when this returns.
        """
        self._made: torch.cuda.Event | None = None
        if stream is None:
            self._tensors = make()
            return
        with torch.cuda.stream(stream):
            self._tensors = make()
            self._made = stream.record_event()

    @property
    def nbytes(self) -> int:
        """Memory of the tensors, wherever they are."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def take(self) -> list[Tensor]:
        """The tensors, for use on the current stream; the host does not wait."""
        if self._made is not None:
            current = torch.cuda.current_stream(self._tensors[0].device)
            current.wait_event(self._made)
            for tensor in self._tensors:
                tensor.record_stream(current)  # else its memory could be given to the next batch while this one reads
        return self._tensors


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream beside the current one, which begins when that has done what it was given; None on a CPU."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
