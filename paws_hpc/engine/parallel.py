"""One model on several ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from paws_hpc import distributed


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """Average gradients over ranks after backward; the model itself when alone.

    Buffers are not broadcast: batch statistics are either global, and so equal already, or meant to be local.
    """
    if distributed.world_size() == 1:
        return model
    return DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )  # fmt: skip
