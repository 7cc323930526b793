"""Tensors on their way to the training device: copies, memory for them, and views made there ahead of their use."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy without making the host wait, which takes pinned memory."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    pinned = values if values.is_pinned() else values.pin_memory()
    return pinned.to(device, non_blocking=True)


class BufferPool:
    """Host memory for batches of about one size, which is used again once nothing refers to it.

    Batches of tens of megabytes come and go. Freed into the C library's heap they fragment it, and the memory of a
    process goes up and down by a fifth; new pages for each batch make cropping a tenth slower (docs/benchmarks.md).
    The pool keeps as many buffers as were ever in use at once, none larger than the largest that was taken.
    """

    def __init__(self, device: torch.device) -> None:
        """Prepare; memory that goes to a GPU is pinned, which torch keeps and uses again by itself."""
        self._pinned = device.type == "cuda"
        self._free: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()
        self._returned: deque[NDArray[np.uint8]] = deque()  # any thread may append at any time

    def take(self, *shape: int) -> Tensor:
        """A uint8 tensor of any content. Its memory comes back with the last tensor or array that shares it."""
        if self._pinned:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        size = math.prod(shape)
        memory = self._memory(size)
        lent = memory[:size]  # an object of its own, which lives as long as the tensor's memory is in use
        weakref.finalize(lent, self._returned.append, memory).atexit = False
        return torch.from_numpy(lent).view(shape)

    def _memory(self, size: int) -> NDArray[np.uint8]:
        """The smallest free memory that suffices; or new memory, in place of the largest free one."""
        with self._lock:
            while self._returned:
                self._free.append(self._returned.popleft())
            self._free.sort(key=len)
            for index, memory in enumerate(self._free):
                if len(memory) >= size:
                    return self._free.pop(index)
            if self._free:
                self._free.pop()
        return np.empty(size, np.uint8)


class PrefetchedViews:
    """Tensors that one thread makes on a device for another one to use.

    On a GPU they are made on a stream of their own, beside the step that is running.
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
    """A stream beside the current one, which begins after the work that is enqueued there now; None on a CPU."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
