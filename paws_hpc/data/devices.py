"""Tensors on their way to the training device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy without making the host wait; that takes pinned memory."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    pinned = values if values.is_pinned() else values.pin_memory()
    return pinned.to(device, non_blocking=True)


def host_buffer(*shape: int, device: torch.device) -> Tensor:
    """An uninitialised uint8 tensor on the host, pinned if it is to go to a GPU."""
    return torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
