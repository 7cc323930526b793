"""Which network to train. Without torch, so that a run can be described and submitted before it is loaded."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass, field

NETWORKS = ("resnet50", "resnet18", "wide_resnet", "small_resnet", "vit", "timm")


@dataclass
class VitConfig:
    """A vision transformer; the defaults are ViT-S/16.

    Attributes:
        image_size: pixels for which positions are learnt; those of crops of other sizes are interpolated.
        patch_size: pixels; crops and ``image_size`` are multiples of it.
        dim: D, a multiple of ``attention_heads``.
        blocks: how many.
        attention_heads: A.
    """

    image_size: int = 224
    patch_size: int = 16
    dim: int = 384
    blocks: int = 12
    attention_heads: int = 6

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"model.vit.{name}={value} must be at least 1.")
        for name, divisor in (("image_size", "patch_size"), ("dim", "attention_heads")):
            if getattr(self, name) % getattr(self, divisor):
                raise ValueError(
                    f"model.vit.{name}={getattr(self, name)} must be a multiple of model.vit.{divisor}="
                    f"{getattr(self, divisor)}."
                )


@dataclass
class ModelConfig:
    """Which network to train.

    Attributes:
        name: resnet50, resnet18, wide_resnet, small_resnet, vit or timm.
        timm: name of an image network of timm, such as ``resnet18d``; timm only (paws_hpc/models/timm_backbone.py).
        vit: sizes; vit only.
        width: not of vit and timm; multiplies all channels (ResNet-50 1x, 2x, 4x; the k of WRN-d-k).
        depth: the d of WRN-d-k, 6n + 4; wide_resnet only.
        channels, blocks: per layer, before ``width``; small_resnet only. Wide where the image is small: 16-48-128 costs
            half of 32-64-128.
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
    vit: VitConfig = field(default_factory=VitConfig)
    width: int = 1
    depth: int = 28
    channels: list[int] = field(default_factory=lambda: [16, 48, 128])
    blocks: list[int] = field(default_factory=lambda: [1, 1, 1])
    projection_hidden_dim: int | None = None
    projection_dim: int | None = None
    prediction_head: bool = False
    init: str | None = None
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        if self.name not in NETWORKS:
            near = difflib.get_close_matches(self.name, NETWORKS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"model.name={self.name!r} is no model. Did you mean {near!r}? Known are {', '.join(NETWORKS)}."
            )
        for key in ("width", "projection_hidden_dim", "projection_dim"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"model.{key}={value} must be at least 1.")
        if self.name == "vit" and self.width != 1:
            raise ValueError(f"model.width={self.width} does not apply to vit: choose model.vit.dim instead.")
        if (self.name == "timm") != (self.timm is not None):
            raise ValueError(
                f"model.name={self.name} and model.timm={self.timm}: model=timm model.timm=resnet18d, say, takes a "
                "network of timm, and only there is model.timm not null."
            )
        if self.name == "timm":
            if importlib.util.find_spec("timm") is None:
                raise ValueError("model=timm needs the package timm: pip install 'paws-hpc[timm]'.")
            if self.width != 1 or self.checkpoint_activations:
                raise ValueError(
                    f"model.width={self.width} and model.checkpoint_activations={self.checkpoint_activations} do not "
                    "apply to model=timm: leave them at 1 and false."
                )
        if self.name == "wide_resnet" and (self.depth < 10 or (self.depth - 4) % 6):
            near_depth = max(10, 4 + 6 * round((self.depth - 4) / 6))
            raise ValueError(f"model.depth={self.depth} is not 6n + 4, as WRN-d-k needs; the nearest is {near_depth}.")
        if not self.channels or len(self.channels) != len(self.blocks) or min(self.channels + self.blocks) < 1:
            raise ValueError(
                f"model.channels={self.channels} and model.blocks={self.blocks} need one positive number per layer."
            )
