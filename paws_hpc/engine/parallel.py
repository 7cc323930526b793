"""One model on its device and on several ranks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from paws_hpc import distributed

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def move(model: ModuleT, device: torch.device, dtype: torch.dtype) -> ModuleT:
    """Move a model; convolutions are channels-last on CUDA, as tensor cores want them.

    On CPUs that layout would save a sixth of a step, but torch's batch normalisation then sums naively: its fp32
    statistics err by 1e-5 where contiguous ones err by 1e-7, and runs on one rank and on several drift apart.
    """
    model = model.to(device, dtype)
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model  # type: ignore[call-overload]


def replicate(model: nn.Module, device: torch.device, *, stream: torch.cuda.Stream | None = None) -> nn.Module:
    """Average gradients over ranks after backward; the model itself when alone. ``stream`` is that of captures.

    Buffers are not broadcast: batch statistics are either global, and so equal already, or meant to be local.

    After its first step DistributedDataParallel would sort gradients into other buckets, by the order in which they
    came. From three ranks on sums then round differently in the first step of every attempt, and a resumed run would
    differ from one that was not interrupted. Looking for unused parameters keeps the first buckets. That walk over the
    graph costs a per cent or so of a step on CPUs; on GPUs speed wins, unless kernels are to promise equal bits.
    """
    if distributed.world_size() == 1:
        return model
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        replica = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=device.type == "cpu" or torch.are_deterministic_algorithms_enabled(),
        )
    if stream is not None:
        torch.cuda.current_stream(device).wait_stream(stream)
    return replica


def synchronise_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's buffers, where ranks kept their own batch statistics, before they are used or saved."""
    if distributed.world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
