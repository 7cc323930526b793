"""LARS on classical heavy-ball momentum, AdamW, and which parameters they adapt and decay."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from paws_hpc.engine.config import OptimizerConfig

_TRUST_COEFFICIENT, _EPS = 1e-3, 1e-8


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv:1708.03888) with the learning rate inside the momentum buffer.

    Per tensor p with gradient g::

        u = (g + wd p) * eta |p| / (|g| + wd |p| + eps)     if adapted, |p| > 0 and |g| > 0
        u = g                                               if adapted, and |p| or |g| is 0
        u = g + wd p                                        if not adapted
        v = momentum v + lr u;  p = p - v                   (Nesterov: p = p - (lr u + momentum v))

    This is the paper's equation 2. ``torch.optim.SGD`` keeps the learning rate outside the buffer (equation 3), which
    takes another path whenever the learning rate changes.

    eta is 1e-3 and eps 1e-8. A parameter group may set ``adapt: bool`` (default True). The state is one buffer per
    tensor (``momentum_buffer``), so that a checkpoint restores it to the bit. Norms stay on the device, and no step
    waits for one.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        nesterov: bool = False,
    ) -> None:
        """See the class; tensors of one group share device and dtype, and lie in memory without gaps."""
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "adapt": True,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._tensors_of_rows: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(group, parameters)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat, steps = _side_by_side(parameters)
        torch._foreach_copy_(steps, gradients)
        if group["weight_decay"]:
            torch._foreach_add_(steps, parameters, alpha=group["weight_decay"])
        if group["adapt"]:
            # All at once: a list of tensors times a list of factors would be a launch per tensor. Every row of ``flat``
            # is of one tensor, as its length divides all of theirs.
            lengths = [p.numel() for p in parameters]
            rows = flat.view(-1, math.gcd(*lengths))
            rows.mul_(_scales(group, gradients, parameters)[self._tensor_of_row(lengths, rows), None])
        else:
            flat.mul_(group["lr"])
        buffers = [self._buffer(p) for p in parameters]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, steps)
        if group["nesterov"]:
            torch._foreach_add_(steps, buffers, alpha=group["momentum"])
            torch._foreach_sub_(parameters, steps)
        else:
            torch._foreach_sub_(parameters, buffers)

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state["momentum_buffer"]

    def _tensor_of_row(self, lengths: list[int], rows: Tensor) -> Tensor:
        """(rows,) int64: for each row, the index of the tensor that it belongs to; the same at every step."""
        key = tuple(lengths)
        if key not in self._tensors_of_rows:
            counts = torch.tensor(lengths) // rows.shape[1]
            numbers = torch.arange(len(lengths)).repeat_interleave(counts, output_size=len(rows))
            self._tensors_of_rows[key] = numbers.to(rows.device)
        return self._tensors_of_rows[key]


def _side_by_side(parameters: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """New memory without values, as one tensor (N,) and as tensors that are laid out like the parameters."""
    lengths = [p.numel() for p in parameters]
    flat = parameters[0].new_empty(sum(lengths))
    pieces = zip(flat.split(lengths), parameters, strict=True)
    return flat, [piece.as_strided(p.shape, p.stride(), piece.storage_offset()) for piece, p in pieces]


def _scales(group: dict[str, Any], gradients: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """What each decayed gradient is multiplied with, learning rate included; (tensors,)."""
    weight_norms = torch.stack(torch._foreach_norm(parameters))
    gradient_norms = torch.stack(torch._foreach_norm(gradients))
    decayed_norms = gradient_norms + group["weight_decay"] * weight_norms + _EPS
    scales = _TRUST_COEFFICIENT * weight_norms / decayed_norms
    # Chosen on the device: asking "is this norm zero?" on the host would wait for the GPU once per tensor. Without a
    # gradient nothing moves, decay included; without a weight there is no decay either, and the gradient is the step.
    usable = (weight_norms > 0) & (gradient_norms > 0)
    return group["lr"] * torch.where(usable, scales, (gradient_norms > 0).to(scales.dtype))


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Make the optimiser of ``model``: weights are adapted and decayed, biases and normalisation parameters are not.

    A parameter of fewer than two dimensions, one called ``bias`` and any of a normalisation layer is excluded. Frozen
    parameters are left out. The training loop calls :func:`set_rates` at every step.

    Raises:
        ValueError: the model has no parameter that trains.
    """
    weights, excluded = split_parameters(model)
    if not weights and not excluded:
        raise ValueError(f"{type(model).__name__} has no parameter with requires_grad=True: nothing to train.")
    groups = [
        {"params": weights, "decayed": True, "weight_decay": config.weight_decay},
        {"params": excluded, "decayed": False, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.start_lr, betas=(config.momentum, 0.999))
    for group in groups:
        group["adapt"] = config.name == "lars" and group["decayed"]
    return LARS(groups, lr=config.start_lr, momentum=config.momentum, nesterov=config.nesterov)


def set_rates(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set the learning rate of every group, and the decay of those that :func:`build_optimizer` gave any."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decayed"]:
            group["weight_decay"] = weight_decay


_NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters of ``model`` in its order: (weights, biases and normalisation parameters)."""
    weights: dict[nn.Parameter, None] = {}
    excluded: dict[nn.Parameter, None] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                small = parameter.ndim < 2 or name == "bias" or isinstance(module, _NORMALISATIONS)
                (excluded if small else weights)[parameter] = None
    return list(weights), list(excluded)
