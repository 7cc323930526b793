"""Wide residual backbones WRN-d-k for small images (Zagoruyko and Komodakis 2016), in the variant of the CIFAR recipe.

Its deviations from the WRN paper are the recipe's: convolutions have biases, a block's stride is on its second
convolution, and the shortcut takes the raw input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paws_hpc.models.blocks import ResidualBlock
from paws_hpc.models.norm import GlobalBatchNorm2d


class WideBlock(ResidualBlock):
    """Pre-activation block: bn-relu-conv-bn-relu-conv around a shortcut."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = GlobalBatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1)
        self.bn2 = GlobalBatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != channels:
            self.shortcut.append(nn.Conv2d(inputs, channels, 1, stride=stride))

    def transform(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, channels, H/stride, W/stride)."""
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        return out + self.shortcut(x)


class WideResNet(nn.Module):
    """WRN-``depth``-``width`` without dropout; ``feature_dim`` is 64 times ``width``.

    The reference gives the last normalisation a momentum of 0.99: its running statistics are then those of the last
    pass alone, which during pre-training is one batch of *small* crops, and large crops are evaluated with them. Taken
    for a slip (0.99 where other libraries' convention means 0.01), it is not followed: all layers have 0.1.

    Args:
        depth: 6n + 4, for n blocks in each of three layers (:class:`~paws_hpc.models.encoder.ModelConfig` checks it).
        width: multiplies the channels 16, 32, 64 of the layers; the stem keeps its 16.
    """

    def __init__(self, *, depth: int, width: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        assert depth == 6 * blocks + 4
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        inputs = 16
        for layer in range(3):
            channels = 16 * width * 2**layer
            members: list[nn.Module] = []
            for position in range(blocks):
                members.append(WideBlock(inputs, channels, 2 if layer > 0 and position == 0 else 1))
                inputs = channels
            self.add_module(f"layer{layer + 1}", nn.Sequential(*members))
        self.bn1 = GlobalBatchNorm2d(inputs)
        self.feature_dim = inputs

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to features (B, ``feature_dim``)."""
        x = self.conv1(images)
        for layer in range(3):
            x = self.get_submodule(f"layer{layer + 1}")(x)
        return torch.flatten(F.adaptive_avg_pool2d(F.relu(self.bn1(x), inplace=True), 1), 1)
