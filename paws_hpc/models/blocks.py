"""What residual blocks of all trunks have in common: their activations may be recomputed instead of kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paws_hpc.models.norm import recomputation


class ResidualBlock(nn.Module, ABC):
    """A block of a residual trunk.

    Attributes:
        recomputed: the backward pass runs the block again from its input, so that of all its activations only the input
            is kept until then. Outputs, gradients and running statistics are the same to the bit (on GPUs as far as
            their kernels repeat themselves), and ranks communicate no more than without.
    """

    recomputed: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H/stride, W/stride)."""
        if not (self.recomputed and torch.is_grad_enabled()):
            return self.transform(x)
        output = checkpoint(
            self.transform,
            x,
            use_reentrant=False,
            preserve_rng_state=False,  # blocks draw nothing
            context_fn=partial(recomputation, self),
        )
        assert isinstance(output, Tensor)
        return output

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        """What the block computes, shapes as in :meth:`forward`."""


def set_recomputed(module: nn.Module, recomputed: bool) -> None:
    """Choose whether the residual blocks in ``module`` recompute their activations."""
    for block in module.modules():
        if isinstance(block, ResidualBlock):
            block.recomputed = recomputed
