"""Initial weights as a function of the run's seed and each tensor's name, and of nothing else.

Because the name counts, a backbone starts from the same weights with and without a prediction head, and adding a
layer changes no other layer. Values are drawn on the CPU in float32, so every device and rank starts the same.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from paws_hpc.models.vit import VisionTransformer


def initialise(module: nn.Module, *, seed: int) -> None:
    """Set every parameter and buffer of ``module``; PyTorch's global generators are not touched.

    Convolutions: weight ~ N(0, 2 / fan_out) (He et al. 2015), bias 0. Linear layers: weight and bias ~
    U(-1, 1) / sqrt(fan_in), PyTorch's own. Normalisations: gamma 1 (the last one of a block too), beta 0, running
    mean 0 and variance 1. In vision transformers all else has weights ~ N(0, 0.02^2) cut at two deviations, bias 0.

    Raises:
        TypeError: a layer of another kind has parameters; say here how they begin.
    """
    transformers = [layer for layer in module.modules() if isinstance(layer, VisionTransformer)]
    of_transformers = {layer for transformer in transformers for layer in transformer.modules()}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.LayerNorm):
            layer.reset_parameters()
        elif layer in of_transformers:
            for kind, tensor in layer.named_parameters(recurse=False):
                values = torch.zeros(tensor.shape, dtype=torch.float32)
                if tensor.dim() > 1:
                    generator = _generator(seed, f"{name}.{kind}")
                    nn.init.trunc_normal_(values, std=0.02, a=-0.04, b=0.04, generator=generator)
                _set(tensor, values)
        elif isinstance(layer, nn.Conv2d):
            values = torch.empty(layer.weight.shape, dtype=torch.float32)
            generator = _generator(seed, f"{name}.weight")
            nn.init.kaiming_normal_(values, mode="fan_out", nonlinearity="relu", generator=generator)
            _set(layer.weight, values)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            for kind, tensor in layer.named_parameters(recurse=False):
                values = torch.empty(tensor.shape, dtype=torch.float32)
                bound = layer.in_features**-0.5
                _set(tensor, values.uniform_(-bound, bound, generator=_generator(seed, f"{name}.{kind}")))
        elif any(True for _ in layer.parameters(recurse=False)) or any(True for _ in layer.buffers(recurse=False)):
            raise TypeError(f"{name}: no initialisation is known for {type(layer).__name__}; add it to initialise().")


@torch.no_grad()
def _set(tensor: Tensor, values: Tensor) -> None:
    tensor.copy_(values)


def _generator(seed: int, name: str) -> torch.Generator:
    """A generator for one tensor. It takes 32 bits of the digest: PyTorch's CPU generator reads no more of a seed."""
    # The backbone was called trunk when seeds were given their weights; under that name they keep them.
    hashed = name.replace("backbone.", "trunk.", 1) if name.startswith("backbone.") else name
    digest = hashlib.sha256(f"{seed}/{hashed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
