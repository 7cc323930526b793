"""What blocks of all residual backbones have in common: their activations may be recomputed instead of kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from paws_hpc.models.norm import recomputation


class ResidualBlock(nn.Module, ABC):
    """A block of a residual backbone.

    Attributes:
        recomputed: the backward pass runs the block again from its input, so that of all its activations only the input
            is kept until then. Outputs, gradients and running statistics are the same to the bit (on GPUs as far as
            their kernels repeat themselves), and ranks communicate no more than without.
    """

    recomputed: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H/stride, W/stride); of a transformer (B, N, D) to (B, N, D)."""
        if not (self.recomputed and torch.is_grad_enabled()):
            return self.transform(x)
        output = checkpoint(
            self.transform,
            x,
            use_reentrant=False,
            preserve_rng_state=False,  # blocks draw nothing
            context_fn=_compiled_recomputation if torch.compiler.is_compiling() else partial(recomputation, self),
        )
        assert isinstance(output, Tensor)
        return output

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        """What the block computes, shapes as in :meth:`forward`."""


def _compiled_recomputation() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What :func:`.norm.recomputation` does where torch.compile decides what runs again: communication does not.

    torch logs that in-place operations do not go with this. It means results that are saved and overwritten later; what
    is saved here are statistics, and nothing writes to them.
    """
    collectives = torch.ops._c10d_functional
    saved = [collectives.all_gather_into_tensor.default, collectives.wait_tensor.default]
    return create_selective_checkpoint_contexts(saved)


def set_recomputed(module: nn.Module, recomputed: bool) -> None:
    """Choose whether the residual blocks in ``module`` recompute their activations."""
    for block in module.modules():
        if isinstance(block, ResidualBlock):
            block.recomputed = recomputed
