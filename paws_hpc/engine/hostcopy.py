"""A state that training goes on changing, as it was at one moment, in host memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = (int, float, str, bytes, bool, type(None))


class HostCopy:
    """Copies a state into buffers on the host that are used again by the next copy of a like state.

    From a GPU the copies go to pinned memory in the order of the current stream: what that stream does afterwards, the
    next step for instance, cannot change them, and the host does not wait for them until they are read.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def take(self, state: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        """Begin a copy; the one before it must not be read any more.

        Args:
            state: tensors on any device, numbers, strings, bytes, None, and lists, tuples and dicts of them.

        Returns:
            waits until the copy is complete, on any thread, and returns it: containers like those of ``state``, tensors
            of the same dtypes and memory layouts on the host.

        Raises:
            TypeError: ``state`` holds anything else; where is said.
        """
        copied = self._copy(state, ())
        if not any(buffer.is_pinned() for buffer in self._buffers.values()):
            return lambda: copied
        complete = torch.cuda.Event()
        complete.record()

        def wait() -> dict[str, Any]:
            complete.synchronize()
            return copied

        return wait

    def _copy(self, value: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            return self._buffer(value, place).copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            copied = copy.copy(value)  # the versions of modules, which PyTorch keeps beside an OrderedDict, included
            for key, item in value.items():
                copied[key] = self._copy(item, (*place, key))
            return copied
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, (*place, index)) for index, item in enumerate(value))
        if isinstance(value, _PLAIN):
            return value
        raise TypeError(
            f"A checkpoint holds tensors, numbers, strings, lists and dicts, but the state's {list(place)} is a "
            f"{type(value).__name__}: leave it out, or keep it as one of them."
        )

    def _buffer(self, tensor: Tensor, place: tuple[Any, ...]) -> Tensor:
        """Of the tensor's shape, dtype and, unless it has holes or overlaps, strides."""
        buffer = self._buffers.get(place)
        if buffer is None or buffer.dtype != tensor.dtype or buffer.shape != tensor.shape:
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
            self._buffers[place] = buffer
        return buffer
