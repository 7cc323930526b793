"""ResNet-18 and ResNet-50 backbones, at any width.

State-dict names are torchvision's without ``fc``, so that its weights load into a backbone of width 1 with ``strict``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paws_hpc.models.blocks import ResidualBlock
from paws_hpc.models.norm import GlobalBatchNorm2d


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), GlobalBatchNorm2d(outputs))


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions around a shortcut (ResNet-18)."""

    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, channels, 3, stride)
        self.bn1 = GlobalBatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = GlobalBatchNorm2d(channels)
        self.downsample = _downsample(inputs, channels, stride)

    def transform(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, channels, H/stride, W/stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + shortcut, inplace=True)


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions around a shortcut (ResNet-50); the 3x3 convolution has the stride."""

    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = channels * self.expansion
        self.conv1 = _conv(inputs, channels, 1)
        self.bn1 = GlobalBatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3, stride)
        self.bn2 = GlobalBatchNorm2d(channels)
        self.conv3 = _conv(channels, outputs, 1)
        self.bn3 = GlobalBatchNorm2d(outputs)
        self.downsample = _downsample(inputs, outputs, stride)

    def transform(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 4 channels, H/stride, W/stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)) + shortcut, inplace=True)


class ResNet(nn.Module):
    """Residual backbone: 7x7 stem, four layers of blocks, global average pooling.

    Args:
        block: the kind of block.
        blocks: how many of them in each of the four layers.
        width: multiplies **all** channels, the stem and the blocks' inner ones included. (torchvision's
            ``wide_resnet50_2`` widens the inner ones only.)
    """

    def __init__(self, block: type[BasicBlock | Bottleneck], blocks: Sequence[int], *, width: int = 1) -> None:
        super().__init__()
        channels = 64 * width
        self.conv1 = _conv(3, channels, 7, 2)
        self.bn1 = GlobalBatchNorm2d(channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = channels
        for layer, count in enumerate(blocks):
            members: list[nn.Module] = []
            for position in range(count):
                members.append(block(inputs, channels * 2**layer, 2 if layer > 0 and position == 0 else 1))
                inputs = channels * 2**layer * block.expansion
            self.add_module(f"layer{layer + 1}", nn.Sequential(*members))
        self.layers = len(blocks)
        self.feature_dim = inputs

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to features (B, ``feature_dim``)."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        for layer in range(self.layers):
            x = self.get_submodule(f"layer{layer + 1}")(x)
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)


def resnet18(*, width: int = 1) -> ResNet:
    """ResNet-18; ``feature_dim`` is 512 times ``width``."""
    return ResNet(BasicBlock, [2, 2, 2, 2], width=width)


def resnet50(*, width: int = 1) -> ResNet:
    """ResNet-50; ``feature_dim`` is 2048 times ``width``."""
    return ResNet(Bottleneck, [3, 4, 6, 3], width=width)
