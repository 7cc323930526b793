"""A running average of a network's weights, for scoring: it moves less than the weights and often scores better."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class WeightAverage(Generic[ModuleT]):
    """Exponential moving average of parameters and running statistics, without a share of the initial weights.

    After steps 0 to t, with d the decay and w_i the weights after step i::

        average = sum_i d^(t - i) w_i / sum_i d^(t - i)

    which a step computes as ``average += (1 - d) / (1 - d^(t + 1)) (w_t - average)``. Normalisations' running means and
    variances are averaged alike: they belong to the weights they were taken with. Ranks hold the same weights, so each
    averages for itself.

    Attributes:
        module: the averaged network; it takes no gradient.
    """

    def __init__(self, network: ModuleT, decay: float) -> None:
        """Copy ``network``, which is not compiled or wrapped yet; the copy has no share in the average."""
        self.decay = decay
        self.module: ModuleT = copy.deepcopy(network).requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after a 0-based step; call it after every step."""
        share = (1 - self.decay) / (1 - self.decay ** (step + 1))
        averages, values = (
            [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
            for module in (self.module, network)
        )
        torch._foreach_lerp_(averages, values, share)
