"""Which network to train. Without torch, so that a run can be described and submitted before it is loaded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

from paws_hpc.renamed import did_you_mean
from paws_hpc.sizes import check_ranges

NETWORKS = ("resnet50", "resnet18", "wide_resnet", "small_resnet", "vit_s16", "timm")
VIT_PATCH_SIZE = 16
"""Pixels. The crops of a run with ``model.name=vit_s16`` are multiples of it."""


@dataclass
class ModelConfig:
    """Which network to train.

    Attributes:
        name: resnet50, resnet18, wide_resnet, small_resnet, vit_s16 or timm.
        timm: name of an image network of timm, such as ``resnet18d``; timm only (paws_hpc/models/timm_backbone.py).
        width: not of vit_s16 and timm; multiplies all channels (ResNet-50 1x, 2x, 4x; the k of WRN-d-k).
        depth: the d of WRN-d-k, 6n + 4; wide_resnet only.
        channels: of each layer, before ``width``; small_resnet only. Wide where the image is small: 16-48-128
            costs half of 32-64-128.
        projection_hidden_dim: default: the feature dimension (2048 times ``width`` for ResNet-50).
        projection_dim: default: the feature dimension at width 1 for a ResNet (2048 for ResNet-50 1x, 2x and 4x), else
            the feature dimension.
        prediction_head: whether z has its own head. The paper trains ImageNet with one and finds it slightly better
            without (Table 5); CIFAR without. Its hidden layer has a quarter of the projection's output.
        init: file whose backbone training begins from instead of random weights, the baseline's too: torchvision's or
            timm's state dict, or a checkpoint of ours, as ``.pt``, ``.pth`` or ``.safetensors``. Heads stay random.
            Images are normalised by their own data set's statistics all the same.
        checkpoint_activations: keep only the inputs of residual blocks and run each block again in the backward pass:
            a third more computing, for networks too wide for the memory otherwise. Results are the same to the bit.

    Raises:
        ValueError: an unknown name (the nearest is suggested), or a size that no network has.
    """

    name: str = "resnet50"
    timm: str | None = None
    width: int = 1
    depth: int = 28
    channels: list[int] = field(default_factory=lambda: [16, 48, 128])
    projection_hidden_dim: int | None = None
    projection_dim: int | None = None
    prediction_head: bool = False
    init: str | None = None
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        if self.name not in NETWORKS:
            meant = did_you_mean(self.name, NETWORKS)
            raise ValueError(f"model.name={self.name!r} is no model. {meant}Known are {', '.join(NETWORKS)}.")
        check_ranges("model", self, **dict.fromkeys(("width", "projection_hidden_dim", "projection_dim"), "[1, inf)"))
        if (self.name == "timm") != (self.timm is not None):
            raise ValueError(
                f"model.name={self.name} and model.timm={self.timm}: model=timm model.timm=resnet18d, say, takes a "
                "network of timm, and only there is model.timm not null."
            )
        if self.name == "timm":
            if importlib.util.find_spec("timm") is None:
                raise ValueError("model=timm needs the package timm: pip install 'paws-hpc[timm]'.")
            if self.checkpoint_activations:
                raise ValueError("model.checkpoint_activations=true does not apply to model=timm: leave it false.")
        if self.name in ("vit_s16", "timm") and self.width != 1:
            raise ValueError(f"model.width={self.width} does not apply to model.name={self.name}: leave it at 1.")
        if self.name == "wide_resnet" and (self.depth < 10 or (self.depth - 4) % 6):
            near_depth = max(10, 4 + 6 * round((self.depth - 4) / 6))
            raise ValueError(f"model.depth={self.depth} is not 6n + 4, as WRN-d-k needs; the nearest is {near_depth}.")
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"model.channels={self.channels} needs one positive number per layer.")
