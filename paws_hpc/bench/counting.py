"""What a training step costs that is counted, not timed: FLOPs, waits of the host, graph breaks, memory."""

from __future__ import annotations

import resource
import sys
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from paws_hpc.config import Config
from paws_hpc.models.encoder import Encoder

NO_GPU = "no GPU"
_META = torch.device("meta")


def training_flops(config: Config) -> int:
    """Floating-point operations of the encoder's forward and backward pass in one step, two per multiply-add.

    Of convolutions and matrix products, of all ranks; the loss is not among them. Nothing is computed for it.
    """
    with _META:
        encoder = Encoder(config.model)
    inputs = [torch.empty(rows, 3, size, size, device=_META) for rows, size in rows_of(config)]
    with FlopCounterMode(display=False) as counter:
        _, z = encoder(inputs)
        z.sum().backward()
    return counter.get_total_flops()


def rows_of(config: Config) -> list[tuple[int, int]]:
    """(rows, pixels of a side) per kind of crop in one step: supports, large and, if there are any, small ones."""
    views, support, n = config.views, config.pretrain.support, config.pretrain.batch_size
    kinds = [
        (support.classes * support.images_per_class * views.support_views, views.large.size),
        (n * views.large.count, views.large.size),
        (n * views.small.count, views.small.size),
    ]
    return [(rows, size) for rows, size in kinds if rows]


def forward_flops(model: nn.Module, size: int) -> int:
    """Of one image of ``size`` x ``size`` pixels, two per multiply-add."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.to(_META)(torch.empty(1, 3, size, size, device=_META))
    return counter.get_total_flops()


def plain_images(config: Config, *, size: int = 224) -> float:
    """How many images of plain ResNet-50 training an unlabelled image of this step is worth, by FLOPs.

    Its crops and its part of the supports, through torchvision's ResNet-50: 4.74 for the paper's ImageNet recipe.
    """
    import torchvision  # noqa: PLC0415 - takes seconds

    with _META:
        model = torchvision.models.resnet50().eval()
    whole = sum(rows * forward_flops(model, side) for rows, side in rows_of(config))
    return whole / config.pretrain.batch_size / forward_flops(model, size)


def host_waits(step: Callable[[], object], device: torch.device) -> int | None:
    """How often the host waits for the device in one step; None without a GPU, where the question has no meaning."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def graph_breaks() -> dict[str, int] | None:
    """Why torch.compile left graphs in this process, and how often; None where nothing was compiled."""
    compiler = sys.modules.get("torch._dynamo.utils")  # compiling imports it; here that would take seconds
    if compiler is None or not compiler.counters["stats"]["unique_graphs"]:
        return None
    return {str(reason).splitlines()[0]: int(count) for reason, count in compiler.counters["graph_break"].items()}


def peak_memory_gb(device: torch.device) -> float:
    """Greatest memory so far, GB (10^9 bytes): of torch on a GPU, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
