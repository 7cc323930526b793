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

    Batches of tens of megabytes fragment the C library's heap, and new pages for each make cropping a tenth slower
    (docs/benchmarks.md). The pool keeps as many buffers as were ever in use at once, none larger than was needed.
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
        """The smallest free buffer that suffices; or a new one, which replaces the largest free one."""
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
    """Tensors that one thread makes on a device for another; on a GPU beside the step that is running."""

    def __init__(self, make: Callable[[], list[Tensor]], stream: torch.cuda.Stream | None) -> None:
        """Enqueue their making on a stream of :func:`side_stream`; on a CPU they are complete when this returns."""
        self._made: torch.cuda.Event | None = None
        if stream is None:
            self._tensors = make()
            return
        with torch.cuda.stream(stream):
            self._tensors = make()
            self._made = stream.record_event()

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
