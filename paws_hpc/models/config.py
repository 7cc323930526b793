"""Which network to train. Without torch, so that a run can be described and submitted before it is loaded."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

NETWORKS = ("resnet50", "resnet18", "wide_resnet", "small_resnet")
_STATISTICS = ("global", "sync", "local")


@dataclass
class ModelConfig:
    """Which network to train.

    Attributes:
        name: resnet50, resnet18, wide_resnet or small_resnet.
        width: multiplies all channels (ResNet-50 1x, 2x, 4x; the k of WRN-d-k).
        depth: the d of WRN-d-k, 6n + 4; wide_resnet only.
        channels, blocks: per stage, before ``width``; small_resnet only. Wide where the image is small: 16-48-128 costs
            half of 32-64-128.
        stem_stride: of the first convolution, 1 or 2; small_resnet only.
        projection_hidden_dim: default: the feature dimension (2048 times ``width`` for ResNet-50).
        projection_dim: default: the feature dimension at width 1 for a ResNet (2048 for ResNet-50 1x, 2x and 4x), else
            the feature dimension.
        prediction_head: whether z has its own head. The paper trains ImageNet with one and finds it slightly better
            without (Table 5); CIFAR without.
        prediction_hidden_dim: default: a quarter of the projection's output (512 for ResNet-50).
        batch_norm: where statistics come from in training: ``global``, all ranks' images; ``sync``, the same by
            torch.nn.SyncBatchNorm, on CUDA only; ``local``, each rank's own.
        checkpoint_activations: keep only the inputs of residual blocks and run each block again in the backward pass:
            a third more computing, for networks too wide for the memory otherwise. Results are the same to the bit.

    Raises:
        ValueError: an unknown name (the nearest is suggested), or a size that no network has.
    """

    name: str = "resnet50"
    width: int = 1
    depth: int = 28
    channels: list[int] = field(default_factory=lambda: [16, 48, 128])
    blocks: list[int] = field(default_factory=lambda: [1, 1, 1])
    stem_stride: int = 2
    projection_hidden_dim: int | None = None
    projection_dim: int | None = None
    prediction_head: bool = False
    prediction_hidden_dim: int | None = None
    batch_norm: str = "global"
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        if self.name not in NETWORKS:
            near = difflib.get_close_matches(self.name, NETWORKS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"model.name={self.name!r} is no model. Did you mean {near!r}? Known are {', '.join(NETWORKS)}."
            )
        for key in ("width", "stem_stride", "projection_hidden_dim", "projection_dim", "prediction_hidden_dim"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"model.{key}={value} must be at least 1.")
        if self.batch_norm not in _STATISTICS:
            raise ValueError(f"model.batch_norm={self.batch_norm!r} must be one of {', '.join(_STATISTICS)}.")
        if self.batch_norm == "sync" and self.checkpoint_activations:
            raise ValueError(
                "model.checkpoint_activations=true does not go with model.batch_norm=sync, whose layers would "
                "communicate again when blocks are recomputed. model.batch_norm=global computes the same and does not."
            )
        if self.name == "wide_resnet" and (self.depth < 10 or (self.depth - 4) % 6):
            near_depth = max(10, 4 + 6 * round((self.depth - 4) / 6))
            raise ValueError(f"model.depth={self.depth} is not 6n + 4, as WRN-d-k needs; the nearest is {near_depth}.")
        if not self.channels or len(self.channels) != len(self.blocks) or min(self.channels + self.blocks) < 1:
            raise ValueError(
                f"model.channels={self.channels} and model.blocks={self.blocks} need one positive number per stage."
            )
