"""Batch normalisation whose statistics are those of all ranks' rows together.

Symbols: R ranks, C channels, n_r the number of values per channel on rank r (rows, or rows times pixels), N their sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from paws_hpc.distributed import world_size

Statistics = Literal["global", "local", "frozen"]


class _GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with parameters and buffers named as in :class:`torch.nn.BatchNorm2d`.

    ``statistics`` says where the training-mode mean and variance come from: the rows of all ranks ("global"), this
    rank's rows ("local"), or the running statistics, which then stay as they are while weight and bias train
    ("frozen"). Evaluation mode always takes the running statistics and communicates nothing.

    ``tracked`` says whether a training-mode pass moves the running statistics; :func:`untracked_statistics` turns it off
    for a while. ``num_batches_tracked`` is kept, so that state dicts are interchangeable with PyTorch's and torchvision's, but never
    counted up: only ``momentum=None`` would read it.
    """

    statistics: Statistics = "global"
    tracked: bool = True
    momentum: float
    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` (B, C) or (B, C, H, W) per channel; same shape, dtype and memory format.

        Raises:
            ValueError: training with no rows on this rank, or with a single value per channel over all ranks.
        """
        self._check_input_dim(input)
        training = self.training and self.statistics != "frozen"
        if training and self.statistics == "global" and world_size() > 1:
            if input.numel() == 0:
                raise ValueError(
                    "Global batch normalisation got no rows on this rank; every rank needs an image of each size."
                )
            return _NormaliseOverRanks.apply(input, self.weight, self.bias, self)
        momentum = self.momentum if self.tracked else 0.0
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training, momentum, self.eps
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, statistics={self.statistics}"


class GlobalBatchNorm1d(_GlobalBatchNorm, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` over the rows (B, C) of all ranks."""


class GlobalBatchNorm2d(_GlobalBatchNorm, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` over the images (B, C, H, W) of all ranks."""


def set_statistics(module: nn.Module, statistics: Statistics) -> None:
    """Choose where every normalisation layer in ``module`` takes its training-mode statistics from.

    "global": all ranks (pre-training). "local": this rank alone (fine-tuning). "frozen": the running statistics, which
    stay fixed while weight and bias still train.

    Raises:
        ValueError: ``statistics`` is none of the three.
    """
    if statistics not in get_args(Statistics):
        raise ValueError(f"statistics={statistics!r} is unknown; choose one of {', '.join(get_args(Statistics))}.")
    for layer in module.modules():
        if isinstance(layer, _GlobalBatchNorm):
            layer.statistics = statistics


@contextmanager
def untracked_statistics(module: nn.Module) -> Iterator[None]:
    """Let training-mode passes through ``module`` normalise as always and leave every running statistic as it is.

    For a pass over rows that another pass of the same step has been over already: the statistics of a step are to be
    tracked once. Outputs and gradients are those of a tracked pass. Contexts may be nested; leaving one restores what
    it found.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _GlobalBatchNorm)]
    before = [layer.tracked for layer in layers]
    for layer in layers:
        layer.tracked = False
    try:
        yield
    finally:
        for layer, tracked in zip(layers, before, strict=True):
            layer.tracked = tracked


class _Channels(NamedTuple):
    """Per-channel state of a normalisation, (C,) each: x becomes (x - mean) * invstd * weight + bias."""

    mean: Tensor
    invstd: Tensor
    weight: Tensor
    bias: Tensor


class _NormaliseOverRanks(torch.autograd.Function):
    """Normalise with the statistics of all ranks: one collective forward, one backward, nothing read back by the host.

    PyTorch's SyncBatchNorm does the same on CUDA only, and its host waits for the device in every layer. The gradients
    of weight and bias stay this rank's own: the data-parallel wrapper averages them like all others.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, layer: _GlobalBatchNorm) -> Tensor:
        input = input.contiguous(memory_format=_memory_format(input))
        mean, variance = _moments(input)
        count = mean.new_full((1,), input.numel() // input.shape[1])
        own = torch.cat([mean, variance, count])
        every = own.new_empty(world_size() * own.numel())
        dist.all_gather_into_tensor(every, own)
        means, variances, counts = every.view(world_size(), -1).split([mean.numel(), mean.numel(), 1], dim=1)
        mean, variance = _combine(means, variances, counts)
        if layer.tracked:
            _track(layer, mean, variance, counts.sum())
        channels = _Channels(mean, torch.rsqrt(variance + layer.eps), weight, bias)
        ctx.save_for_backward(input, counts, *channels)
        return _normalise(input, channels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, counts, *rest = ctx.saved_tensors
        channels = _Channels(*rest)
        gradient = gradients[0].contiguous(memory_format=_memory_format(input))
        sum_dy, sum_dy_xmu = _gradient_sums(gradient, input, channels)
        grad_weight = (sum_dy_xmu * channels.invstd).to(channels.weight.dtype)
        grad_bias = sum_dy.to(channels.bias.dtype)
        grad_input = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([sum_dy, sum_dy_xmu])
            dist.all_reduce(sums)
            grad_input = _input_gradient(gradient, input, channels, sums, counts)
        return grad_input, grad_weight, grad_bias, None


def _combine(means: Tensor, variances: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (C,) each, of all rows from those of the ranks, (R, C), and their counts, (R, 1).

    Chan's combination, var = sum n_r (var_r + (mean_r - mean)^2) / N, adds non-negative terms; a difference of mean
    squares would lose every digit where the mean is much larger than the deviation.
    """
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    variance = ((variances + (means - mean) ** 2) * counts).sum(0) / total
    return mean, variance


def _track(layer: _GlobalBatchNorm, mean: Tensor, variance: Tensor, total: Tensor) -> None:
    """Move the running statistics, the variance in its unbiased form, as one process would."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    unbiased = variance * (total / (total - 1))
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), layer.momentum)
    layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), layer.momentum)


# The four passes over the activations. On CUDA they are the kernels that PyTorch's own layer consists of, which read
# bfloat16 and either memory format directly; elsewhere they are plain operations in at least float32.


def _moments(input: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's mean and biased variance, (C,) each."""
    if input.is_cuda:
        # With eps 0 the variance is recovered without loss. The kernel calls 1/std of a constant channel 0.
        mean, invstd = torch.batch_norm_stats(input, 0.0)
        return mean, torch.where(invstd > 0, invstd.pow(-2), 0.0)
    variance, mean = torch.var_mean(_wide(input), _reduced(input), correction=0)
    return mean, variance


def _normalise(input: Tensor, channels: _Channels) -> Tensor:
    """(x - mean) * invstd * weight + bias."""
    mean, invstd, weight, bias = channels
    if input.is_cuda:
        return torch.batch_norm_elemt(input, weight, bias, mean, invstd, 0.0)  # eps is in invstd already
    scaled = (_wide(input) - _columns(mean, input)) * _columns(weight * invstd, input)
    return (scaled + _columns(bias, input)).to(input.dtype)


def _gradient_sums(gradient: Tensor, input: Tensor, channels: _Channels) -> tuple[Tensor, Tensor]:
    """This rank's sums of dy and of dy (x - mean), (C,) each."""
    mean, invstd, weight, _ = channels
    if input.is_cuda:
        sums = torch.batch_norm_backward_reduce(gradient, input, mean, invstd, weight, True, False, False)
        return sums[0], sums[1]
    wide = _wide(gradient)
    centred = _wide(input) - _columns(mean, input)
    return wide.sum(_reduced(input)), (wide * centred).sum(_reduced(input))


def _input_gradient(gradient: Tensor, input: Tensor, channels: _Channels, sums: Tensor, counts: Tensor) -> Tensor:
    """weight invstd (dy - mean(dy) - (x - mean) invstd^2 mean(dy (x - mean))), with means over all ranks.

    Args:
        gradient, input: dy and x, of this rank.
        channels: of all ranks together.
        sums: (2, C), of dy and of dy (x - mean) over all ranks.
        counts: (R, 1), values per channel on each rank.
    """
    mean, invstd, weight, _ = channels
    if input.is_cuda:
        per_rank = counts.flatten().to(torch.int32)
        return torch.batch_norm_backward_elemt(
            gradient, input, mean, invstd, weight.to(mean.dtype), sums[0], sums[1], per_rank
        )
    mean_dy, mean_dy_xmu = sums / counts.sum()
    slope = _columns(mean_dy_xmu * invstd**2, input) * (_wide(input) - _columns(mean, input))
    centred = _wide(gradient) - _columns(mean_dy, input) - slope
    return (centred * _columns(weight * invstd, input)).to(input.dtype)


def _memory_format(input: Tensor) -> torch.memory_format:
    """Channels-last stays so; anything else, a slice for instance, becomes or is contiguous."""
    channels_last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _wide(input: Tensor) -> Tensor:
    """At least float32: bfloat16 has 8 significant bits, far too few for sums over a batch."""
    return input.to(torch.promote_types(input.dtype, torch.float32))


def _reduced(input: Tensor) -> list[int]:
    return [0, *range(2, input.dim())]


def _columns(values: Tensor, input: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (input.dim() - 2))
