"""A residual backbone small enough to pre-train on two CPU cores in minutes: the demo's network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paws_hpc.models.blocks import ResidualBlock
from paws_hpc.models.norm import GlobalBatchNorm2d


class SmallBlock(ResidualBlock):
    """Pre-activation block: bn-relu-conv-bn-relu-conv around a shortcut; the first convolution has the stride."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = GlobalBatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = GlobalBatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != channels:
            self.shortcut = nn.Conv2d(inputs, channels, 1, stride=stride, bias=False)

    def transform(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, channels, H/stride, W/stride)."""
        activated = F.relu(self.bn1(x), inplace=True)
        out = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        return out + self.shortcut(x)


class SmallResNet(nn.Module):
    """3x3 stem, a layer of pre-activation blocks per entry of ``channels``, normalisation, global average pooling.

    Args:
        channels: of each layer; the stem has the first layer's. All but the first layer halve the size.
        blocks: of each layer; as many as ``channels``.
        stem_stride: 2 halves the image at once, which quarters the cost.
    """

    def __init__(self, *, channels: Sequence[int], blocks: Sequence[int], stem_stride: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels[0], 3, stride=stem_stride, padding=1, bias=False)
        inputs = channels[0]
        layers: list[nn.Module] = []
        for layer, (outputs, count) in enumerate(zip(channels, blocks, strict=True)):
            for position in range(count):
                layers.append(SmallBlock(inputs, outputs, 2 if layer > 0 and position == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.norm = GlobalBatchNorm2d(inputs)
        self.feature_dim = inputs

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to features (B, ``feature_dim``)."""
        x = F.relu(self.norm(self.blocks(self.stem(images))), inplace=True)
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
