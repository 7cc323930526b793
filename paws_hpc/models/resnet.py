"""Residual backbones: ResNet-18 and ResNet-50, wide ResNets for small images, and a small one for CPUs.

State-dict names of the first two are torchvision's without ``fc``, so that its weights load into a backbone of width 1
with ``strict``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paws_hpc.models.blocks import ResidualBlock
from paws_hpc.models.norm import CancelledBiasConv2d, GlobalBatchNorm2d, with_cancelled_biases


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), GlobalBatchNorm2d(outputs))


def _layer(block: type[_Block], number: int, count: int, inputs: int, channels: int) -> list[nn.Module]:
    """Blocks of one size; the first one halves it, but not in layer 0."""
    first = block(inputs, channels, 1 if number == 0 else 2)
    return [first, *(block(channels * block.expansion, channels, 1) for _ in range(count - 1))]


class _Block(ResidualBlock):
    """(B, inputs, H, W) to (B, channels * expansion, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()


class BasicBlock(_Block):
    """Two 3x3 convolutions around a shortcut (ResNet-18)."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__(inputs, channels, stride)
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


class Bottleneck(_Block):
    """1x1, 3x3 and 1x1 convolutions around a shortcut (ResNet-50); the 3x3 convolution has the stride."""

    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__(inputs, channels, stride)
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
            members = _layer(block, layer, count, inputs, channels * 2**layer)
            self.add_module(f"layer{layer + 1}", nn.Sequential(*members))
            inputs = channels * 2**layer * block.expansion
        self.layers = len(blocks)
        self.feature_dim = inputs

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to features (B, ``feature_dim``)."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        for layer in range(self.layers):
            x = self.get_submodule(f"layer{layer + 1}")(x)
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)


class _PreActivationBlock(_Block):
    """bn-relu-conv-bn-relu-conv around a shortcut from the raw input."""

    bn1: GlobalBatchNorm2d
    conv1: nn.Module
    bn2: GlobalBatchNorm2d
    conv2: nn.Module
    shortcut: nn.Module

    def transform(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, channels, H/stride, W/stride)."""
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        return out + self.shortcut(x)


class SmallBlock(_PreActivationBlock):
    """The first convolution has the stride."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__(inputs, channels, stride)
        self.bn1 = GlobalBatchNorm2d(inputs)
        self.conv1 = _conv(inputs, channels, 3, stride)
        self.bn2 = GlobalBatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3)
        changes = stride != 1 or inputs != channels
        self.shortcut = _conv(inputs, channels, 1, stride) if changes else nn.Identity()


class WideBlock(_PreActivationBlock):
    """As the CIFAR recipe has it, unlike the WRN paper: convolutions have biases, the second one has the stride."""

    conv1: CancelledBiasConv2d
    conv2: CancelledBiasConv2d
    shortcut: nn.Sequential

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__(inputs, channels, stride)
        self.bn1 = GlobalBatchNorm2d(inputs)
        self.conv1 = CancelledBiasConv2d(inputs, channels, 3, padding=1)
        self.bn2 = GlobalBatchNorm2d(channels)
        self.conv2 = CancelledBiasConv2d(channels, channels, 3, stride=stride, padding=1)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != channels:
            self.shortcut.append(CancelledBiasConv2d(inputs, channels, 1, stride=stride))

    def track_biases(self, shift: Tensor) -> Tensor:
        """Have the running means contain all biases, where x lacks those before, ``shift``: what the output lacks."""
        self.bn1.track_shift(shift)
        self.bn2.track_shift(self.conv1.bias)
        for conv in self.shortcut:
            assert isinstance(conv, CancelledBiasConv2d)
            shift = (conv.weight.flatten(1) * shift).sum(1) + conv.bias  # a product would be bfloat16 in autocast
        return shift + self.conv2.bias


class SmallResNet(nn.Module):
    """The demo's network: a 3x3 stem of stride 2, a block per entry of ``channels``, normalisation, pooling.

    The stem has the first block's channels. All blocks but the first halve the size.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.stem = _conv(3, channels[0], 3, 2)
        inputs = channels[0]
        blocks: list[nn.Module] = []
        for layer, outputs in enumerate(channels):
            blocks.append(SmallBlock(inputs, outputs, 1 if layer == 0 else 2))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = GlobalBatchNorm2d(inputs)
        self.feature_dim = inputs

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to features (B, ``feature_dim``)."""
        x = F.relu(self.norm(self.blocks(self.stem(images))), inplace=True)
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)


class WideResNet(nn.Module):
    """WRN-d-k (Zagoruyko and Komodakis 2016) without dropout; ``feature_dim`` is 64 times ``width``.

    The reference gives the last normalisation a momentum of 0.99: its running statistics are then those of the last
    pass alone, which during pre-training is one batch of *small* crops, and large crops are evaluated with them. Taken
    for a slip (0.99 where other libraries' convention means 0.01), it is not followed: all layers have 0.1.

    Args:
        depth: d = 6n + 4, for n blocks in each of three layers.
        width: k; multiplies the channels 16, 32, 64 of the layers; the stem keeps its 16.
    """

    def __init__(self, *, depth: int, width: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        assert depth == 6 * blocks + 4
        self.conv1 = CancelledBiasConv2d(3, 16, 3, padding=1)
        inputs = 16
        for layer in range(3):
            channels = 16 * width * 2**layer
            members = _layer(WideBlock, layer, blocks, inputs, channels)
            self.add_module(f"layer{layer + 1}", nn.Sequential(*members))
            inputs = channels
        self.bn1 = GlobalBatchNorm2d(inputs)
        self.feature_dim = inputs

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to features (B, ``feature_dim``)."""
        x = self.conv1(images)
        for layer in range(3):
            x = self.get_submodule(f"layer{layer + 1}")(x)
        features = torch.flatten(F.adaptive_avg_pool2d(F.relu(self.bn1(x), inplace=True), 1), 1)
        return self._with_biases(features) if self.bn1.by_batch else features

    def _with_biases(self, features: Tensor) -> Tensor:
        """The features; the running means and the graph now contain the biases that were left out."""
        with torch.no_grad():
            shift: Tensor = self.conv1.bias
            for block in self.modules():
                shift = block.track_biases(shift) if isinstance(block, WideBlock) else shift
            self.bn1.track_shift(shift)
        return with_cancelled_biases(features, self)
