"""Batch normalisation whose statistics are those of all ranks' rows together.

Symbols: R ranks, C channels, n_r the number of values per channel on rank r (rows, or rows times pixels), N their sum.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from paws_hpc.distributed import world_size

Statistics = Literal["global", "local", "frozen"]


class _Moments(NamedTuple):
    """Mean and biased variance of the rows of all ranks, (C,) each, and the ranks' counts of values, (R, 1)."""

    mean: Tensor
    variance: Tensor
    counts: Tensor


class _TakesStatistics(nn.Module):
    """A layer that depends on where normalisation takes its statistics from.

    Attributes:
        statistics: see :func:`set_statistics`. Evaluation mode takes the running ones and communicates nothing.
    """

    statistics: Statistics = "global"

    @property
    def by_batch(self) -> bool:
        """Whether a pass takes the statistics of its own rows."""
        return self.training and self.statistics != "frozen"


class _GlobalBatchNorm(_TakesStatistics, nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with parameters and buffers named as in :class:`torch.nn.BatchNorm2d`.

    ``num_batches_tracked`` is kept, so that state dicts are interchangeable with PyTorch's, but never counted up.

    Attributes:
        tracked: whether a training-mode pass moves the running statistics; see :func:`untracked_statistics`.
        tape: statistics of a pass that will run again; see :func:`recomputation`.
    """

    tracked: bool = True
    tape: dict[nn.Module, _Moments] | None = None
    momentum: float
    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` (B, C) or (B, C, H, W) per channel; same shape, dtype and memory format.

        Raises:
            ValueError: training with no rows on this rank, or with a single value per channel over all ranks.
        """
        self._check_input_dim(input)
        if self.by_batch and self.statistics == "global" and world_size() > 1:
            return self._normalise_over_ranks(input)
        # The running statistics are (1 - momentum) old + momentum new.
        momentum = self.momentum if self.tracked else 0.0
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.by_batch, momentum, self.eps
        )

    def _normalise_over_ranks(self, input: Tensor) -> Tensor:
        if input.numel() == 0:
            raise ValueError(
                "Global batch normalisation got no rows on this rank; every rank needs an image of each size."
            )
        input = input.contiguous(memory_format=_memory_format(input))
        moments = None if self.tape is None else self.tape.get(self)
        if moments is None:
            moments = _moments_over_ranks(input.detach())
            if self.tape is not None:
                self.tape[self] = moments
        if self.tracked:
            self._track(moments)
        invstd = torch.rsqrt(moments.variance + self.eps)
        return _NormaliseOverRanks.apply(input, self.weight, self.bias, moments.mean, invstd, moments.counts)

    @torch.no_grad()
    def _track(self, moments: _Moments) -> None:
        """Move the running statistics, the variance in its unbiased form, as one process would."""
        assert self.running_mean is not None
        assert self.running_var is not None
        total = moments.counts.sum()
        unbiased = moments.variance * (total / (total - 1))
        self.running_mean.lerp_(moments.mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)

    @torch.no_grad()
    def track_shift(self, shift: Tensor) -> None:
        """Make the running mean what it were if the rows just normalised had been larger by ``shift``, (C,)."""
        assert self.running_mean is not None
        if self.by_batch and self.tracked:
            # Through .data: autograd holds the running mean, takes any change for an error, and does not read it here.
            self.running_mean.data.add_(shift, alpha=self.momentum)


class GlobalBatchNorm1d(_GlobalBatchNorm, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` over the rows (B, C) of all ranks."""


class GlobalBatchNorm2d(_GlobalBatchNorm, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` over the images (B, C, H, W) of all ranks."""


class CancelledBiasConv2d(_TakesStatistics, nn.Conv2d):
    """A convolution whose bias only normalisation layers see, which subtract it with the mean of their rows.

    So the bias changes no output and has gradient zero while statistics are the batch's. It is not added then: that and
    its gradient's sum would be a sixth of a step of a wide ResNet. The running means still contain it
    (:meth:`_GlobalBatchNorm.track_shift`), and it is added where they normalise.
    """

    bias: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """As :class:`torch.nn.Conv2d`."""
        return self._conv_forward(input, self.weight, None if self.by_batch else self.bias)


class _Unmoved(torch.autograd.Function):
    """The first argument; the others are part of the graph and do not move.

    Their gradient is None on one rank and zero on several: DistributedDataParallel waits for every parameter, and where
    it looks for unused ones, a gradient that is None has it read from the device at every step, which no graph allows.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [parameter.shape for parameter in parameters]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if world_size() == 1:
            return gradient, *[None] * len(ctx.shapes)
        zero = gradient.new_zeros(())
        return gradient, *[zero.expand(shape) for shape in ctx.shapes]


def with_cancelled_biases(output: Tensor, network: nn.Module) -> Tensor:
    """The output of ``network`` from a graph that has the biases which its convolutions left out."""
    convolutions = [layer for layer in network.modules() if isinstance(layer, CancelledBiasConv2d)]
    return _Unmoved.apply(output, *[layer.bias for layer in convolutions if layer.by_batch])


def set_statistics(module: nn.Module, statistics: Statistics) -> None:
    """Choose where every normalisation layer in ``module`` takes its training-mode statistics from.

    "global": the rows of all ranks (pre-training). "local": this rank's (fine-tuning). "frozen": the running
    statistics, which stay fixed while weight and bias train.
    """
    for layer in module.modules():
        if isinstance(layer, _TakesStatistics):
            layer.statistics = statistics


class _Setting(AbstractContextManager[None]):
    """Attributes of all normalisation layers of a module for a while; it may be entered again once it was left."""

    def __init__(self, module: nn.Module, **values: Any) -> None:
        self.layers, self.values = _layers(module), values

    def __enter__(self) -> None:
        self.before = [{name: getattr(layer, name) for name in self.values} for layer in self.layers]
        for layer in self.layers:
            vars(layer).update(self.values)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, values in zip(self.layers, self.before, strict=True):
            vars(layer).update(values)


def untracked_statistics(module: nn.Module) -> AbstractContextManager[None]:
    """Let training-mode passes through ``module`` leave every running statistic as it is; contexts may be nested.

    For a second pass over the rows of a step, whose statistics are tracked once.
    """
    return _Setting(module, tracked=False)


def recomputation(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for one training-mode pass through ``module`` and for running it again on the same rows.

    The second pass takes the first one's statistics over all ranks, each layer its own. It communicates nothing, so
    that ranks may recompute when and in whatever order they like, moves no running statistic, and gives the same bits.
    Within ``module`` every layer is called once. Made for ``context_fn`` of :func:`torch.utils.checkpoint.checkpoint`.
    """
    tape: dict[nn.Module, _Moments] = {}
    return _Setting(module, tape=tape), _Setting(module, tape=tape, tracked=False)


def _layers(module: nn.Module) -> list[_GlobalBatchNorm]:
    return [layer for layer in module.modules() if isinstance(layer, _GlobalBatchNorm)]


@torch.no_grad()
def _moments_over_ranks(input: Tensor) -> _Moments:
    """Of the rows of all ranks, by one collective; nothing is read back by the host.

    Chan's combination, var = sum n_r (var_r + (mean_r - mean)^2) / N, adds non-negative terms; a difference of mean
    squares would lose every digit where the mean is much larger than the deviation.
    """
    mean, variance = _moments(input)
    count = mean.new_full((1,), input.numel() // input.shape[1])
    own = torch.cat([mean, variance, count])
    every = own.new_empty(world_size() * own.numel())
    dist.all_gather_into_tensor(every, own)
    means, variances, counts = every.view(world_size(), -1).split([mean.numel(), mean.numel(), 1], dim=1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    variance = ((variances + (means - mean) ** 2) * counts).sum(0) / total
    return _Moments(mean, variance, counts)


class _Channels(NamedTuple):
    """Per-channel state of a normalisation, (C,) each: x becomes (x - mean) * invstd * weight + bias."""

    mean: Tensor
    invstd: Tensor
    weight: Tensor


class _NormaliseOverRanks(torch.autograd.Function):
    """Normalise with the mean and 1 / deviation of all ranks' rows; one collective in the backward pass.

    The gradient of the input includes what flows through mean and deviation, on every rank. The gradients of weight and
    bias stay this rank's own: the data-parallel wrapper averages them like all others.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd hands arguments on by position
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, counts: Tensor
    ) -> Tensor:
        ctx.save_for_backward(input, counts, mean, invstd, weight)
        return _normalise(input, _Channels(mean, invstd, weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, counts, *rest = ctx.saved_tensors
        channels = _Channels(*rest)
        gradient = gradient.contiguous(memory_format=_memory_format(input))
        sum_dy, sum_dy_xmu = _gradient_sums(gradient, input, channels)
        grad_weight = (sum_dy_xmu * channels.invstd).to(channels.weight.dtype)
        grad_bias = sum_dy.to(channels.weight.dtype)
        grad_input = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([sum_dy, sum_dy_xmu])
            dist.all_reduce(sums)
            grad_input = _input_gradient(gradient, input, channels, sums, counts)
        return grad_input, grad_weight, grad_bias, None, None, None


# The four passes over the activations. Where it can they are the kernels that PyTorch's own layer consists of: those
# for CUDA read bfloat16 and either memory format; those for CPUs are taken for contiguous values in full precision,
# where plain operations are five times as slow, and not for channels-last ones, which they sum naively. Elsewhere, and
# under torch.compile, which fuses them with their neighbours, the passes are plain operations in at least float32.


def _by_cuda_kernel(input: Tensor) -> bool:
    return input.is_cuda and not torch.compiler.is_compiling()


def _by_cpu_kernel(input: Tensor) -> bool:
    full = input.dtype in (torch.float32, torch.float64)
    return input.is_cpu and full and input.is_contiguous() and not torch.compiler.is_compiling()


def _moments(input: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's mean and biased variance, (C,) each."""
    if _by_cuda_kernel(input):
        # With eps 0 the variance is recovered without loss. The kernel calls 1/std of a constant channel 0.
        mean, invstd = torch.batch_norm_stats(input, 0.0)
        return mean, torch.where(invstd > 0, invstd.pow(-2), 0.0)
    if _by_cpu_kernel(input):
        mean, variance = torch.batch_norm_update_stats(input, None, None, 0.0)
        return mean, variance
    variance, mean = torch.var_mean(_wide(input), _reduced(input), correction=0)
    return mean, variance


def _normalise(input: Tensor, channels: _Channels, bias: Tensor) -> Tensor:
    """(x - mean) * invstd * weight + bias."""
    mean, invstd, weight = channels
    if _by_cuda_kernel(input):
        return torch.batch_norm_elemt(input, weight, bias, mean, invstd, 0.0)  # eps is in invstd already
    if _by_cpu_kernel(input):
        return _centred_affine(input, mean, weight * invstd, bias)
    scaled = (_wide(input) - _columns(mean, input)) * _columns(weight * invstd, input)
    output = scaled + _columns(bias, input)
    # Not .to() at all where it would change nothing: torch.compile (2.11) then takes the gradient for zero, silently.
    return output if output.dtype == input.dtype else output.to(input.dtype)


def _gradient_sums(gradient: Tensor, input: Tensor, channels: _Channels) -> tuple[Tensor, Tensor]:
    """This rank's sums of dy and of dy (x - mean), (C,) each."""
    mean, invstd, weight = channels
    if _by_cuda_kernel(input):
        sums = torch.batch_norm_backward_reduce(gradient, input, mean, invstd, weight, True, False, False)
        return sums[0], sums[1]
    if _by_cpu_kernel(input):
        ones = torch.ones_like(mean)  # as weight and variance: the gradients of weight and bias are these sums then
        _, sum_dy_xmu, sum_dy = torch.ops.aten.native_batch_norm_backward(
            gradient, input, ones, mean, ones, None, None, False, 0.0, [False, True, True]
        )
        return sum_dy, sum_dy_xmu
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
    mean, invstd, weight = channels
    if _by_cuda_kernel(input):
        per_rank = counts.flatten().to(torch.int32)
        return torch.batch_norm_backward_elemt(
            gradient, input, mean, invstd, weight.to(mean.dtype), sums[0], sums[1], per_rank
        )
    mean_dy, mean_dy_xmu = sums / counts.sum()
    if _by_cpu_kernel(input):
        scale = weight * invstd
        rest = _centred_affine(input, mean, -scale * invstd**2 * mean_dy_xmu, -scale * mean_dy)
        return rest.addcmul_(gradient, _columns(scale, input))
    slope = _columns(mean_dy_xmu * invstd**2, input) * (_wide(input) - _columns(mean, input))
    centred = _wide(gradient) - _columns(mean_dy, input) - slope
    return (centred * _columns(weight * invstd, input)).to(input.dtype)


def _centred_affine(input: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x - mean) scale + shift in one pass."""
    output, _, _ = torch.native_batch_norm(input, scale, shift, mean, torch.ones_like(mean), False, 0.0, 0.0)
    return output


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
