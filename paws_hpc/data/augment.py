"""Augmentation, batched on tensors on any device.

:data:`OPERATIONS` is the pipeline. :func:`draw_parameters`, :func:`augment`, :class:`CompiledAugmentation` and
``paws_hpc.bench.peers.pil`` know no operation by name: to add one, write its fields in ``AugmentConfig``, its function
here, and its row.

Legend: n images, C channels (3, or 1 for grey stores), H x W pixels. Parameters are drawn on the CPU as pure functions
of (seed, epoch, sample, view) and decide there which rows each operation touches, so a GPU is never waited for.

On values in [0, 1] the operations are torchvision's for float tensors (C = 1 included, where saturation and hue change
nothing). The blur is a Gaussian cut at three standard deviations, whatever the image's size, as PIL's is, which PAWS
used (they differ by about 1 of 255 levels r.m.s.).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from paws_hpc.data.config import AugmentConfig
from paws_hpc.data.devices import to_device
from paws_hpc.data.philox import Stream, uniform
from paws_hpc.whole_graph import whole_graph

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, with torchvision's digits
_BLUR_RADIUS_SIGMAS = 3
_BLUR_SIGMA = (0.1, 2.0)  # least and greatest, pixels


class Change(NamedTuple):
    """A function of some images of a batch."""

    function: Callable[[Tensor, Tensor], Tensor]  # (m, C, H, W) float32 in [0, 1] and (m,) amounts → the same
    wanted: Any  # (n,) bool, the images that it changes; tensor or array, as are the parameters
    amounts: Any  # (n,) float32, too
    strength: str  # config field; at 0 no image is ever wanted


@dataclass(frozen=True)
class Operation:
    """One operation of the pipeline, for all ways to augment.

    Attributes:
        fields: of ``AugmentConfig``; the first is the probability that an image gets it.
        columns: the uniform numbers of an image that it uses; the first decides whether the image gets it. Every run's
            result depends on them: a new operation takes the next free ones.
        turns: (n,) bool, which images get it, and (amounts, n) → its changes, turn by turn; those of a turn concern
            different images.
        pil: the config → the same on one RGB image that gets it; Python's or torch's generator draws.
        amounts: parameters of an image beside whether it gets the operation.
        draw: (n, len(columns) - 1) uniform numbers → (n, amounts) parameters.
    """

    fields: tuple[str, ...]
    columns: tuple[int, ...]
    turns: Callable[[Any, Any], list[list[Change]]]
    pil: Callable[[AugmentConfig], Callable[[Image.Image], Image.Image]]
    amounts: int = 0
    draw: Callable[[AugmentConfig, NDArray[np.float64]], NDArray[np.floating]] = lambda _, numbers: numbers

    @property
    def probability(self) -> str:
        """Config field: the chance that an image gets it."""
        return self.fields[0]


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Each image (n, C, H, W) float32 in [0, 1] times its factor (n,), clamped to [0, 1]."""
    return (images * factors[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Each image blended with the mean of its own grey values; shapes as in ``adjust_brightness``."""
    return _blend(images, _luma(images).mean(dim=(1, 2, 3), keepdim=True), factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Each image blended with its grey version; shapes as in ``adjust_brightness``, grey images stay."""
    return images if images.shape[1] == 1 else _blend(images, _luma(images), factors)


def adjust_hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Each image's hue turned by its share (n,) of the colour circle, in [-0.5, 0.5]; grey images stay.

    With value v = max(r, g, b), chroma c = v - min(r, g, b) and hue h in sixths of the circle, a channel is
    ``v - c * clamp(min(k, 4 - k), 0, 1)`` where ``k = (h + 5, 3 or 1) mod 6`` for red, green and blue.
    """
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(dim=1)
    smallest, value = images.aminmax(dim=1)
    chroma = value - smallest
    divisor = torch.where(chroma == 0, 1, chroma)  # a grey pixel's numerators are 0
    sixths = torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4)
    sixths = torch.where(value == red, (green - blue) / divisor, sixths) + 6 * shifts[:, None, None]
    offsets = torch.arange(5, 0, -2, device=images.device, dtype=images.dtype)[:, None, None]
    position = (sixths[:, None] + offsets).remainder_(6)
    share = torch.minimum(position, 4 - position).clamp_(0, 1)
    return torch.addcmul(value[:, None], chroma[:, None], share, value=-1)


def to_grayscale(images: Tensor) -> Tensor:
    """Grey values in every channel: (n, C, H, W) float32 to the same."""
    return _luma(images).expand_as(images)


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Values from each image's threshold on inverted, x to 1 - x; shapes as in ``adjust_brightness``."""
    return torch.where(images < thresholds[:, None, None, None], images, 1 - images)


def equalize(images: Tensor) -> Tensor:
    """The histogram of each channel of each image made flat: (n, C, H, W) float32 in [0, 1] to the same.

    Equal to torchvision's and PIL's, which know 256 levels: a level becomes the number of darker pixels over a 255th of
    the pixels below the brightest level, rounded. A channel with too few such pixels stays.
    """
    levels = (images.flatten(2) * 255.999).long()  # torchvision's way from floats to levels
    counts = levels.new_zeros(*levels.shape[:2], 256).scatter_add_(2, levels, torch.ones_like(levels))
    brightest = counts.gather(2, levels.amax(dim=2, keepdim=True))
    step = (levels.shape[2] - brightest) // 255
    table = ((counts.cumsum(2) - counts + step // 2) // step.clamp(min=1)).clamp(max=255)
    changed = (table.gather(2, levels) / 255).to(images.dtype)
    return torch.where(step == 0, images.flatten(2), changed).unflatten(2, images.shape[2:])


def gaussian_blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Each image blurred by a Gaussian, reflected at the borders, cut at a radius of ceil(3 sigma) pixels.

    Equal to torchvision's ``gaussian_blur`` with ``kernel_size = 2 ceil(3 sigma) + 1`` per image, as two batched
    products with (H, H) and (W, W) matrices, which are at least as fast as a convolution with a kernel per image. The
    radius is at most the image's side minus 1. ``sigmas`` (n,) are positive, in pixels.
    """
    height, width = images.shape[-2:]
    rows = _blur_matrix(sigmas, height)
    columns = rows if width == height else _blur_matrix(sigmas, width)
    return rows[:, None] @ images @ columns[:, None].mT


def _blur_matrix(sigmas: Tensor, size: int) -> Tensor:
    """(n, size, size) weights of the pixels of a line in each blurred pixel; rows sum to 1.

    A pixel j adds to pixel i at its own distance |i - j| and, seen through the mirrors at both ends, at i + j and at
    2 (size - 1) - i - j; the outermost pixels are the mirrors themselves and count once.
    """
    pixel = torch.arange(size, device=sigmas.device)
    near = pixel[:, None] + pixel
    far = 2 * (size - 1) - near
    beyond = 2 * size  # a distance that no kernel reaches
    near = near.masked_fill(pixel == 0, beyond)
    far = far.masked_fill(pixel == size - 1, beyond)
    distance = torch.arange(beyond + 1, device=sigmas.device)
    radius = torch.ceil(_BLUR_RADIUS_SIGMAS * sigmas).clamp(max=size - 1)[:, None]
    taps = torch.exp(-0.5 * (distance / sigmas[:, None]).square()).where(distance <= radius, 0)
    taps = taps / (2 * taps.sum(dim=1, keepdim=True) - taps[:, :1])
    return taps[:, (pixel[:, None] - pixel).abs()] + taps[:, near] + taps[:, far]


def _luma(images: Tensor) -> Tensor:
    """(n, 1, H, W) grey values; a grey image is its own."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])[:, None]


def _blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    """``factor * image + (1 - factor) * other``, clamped to [0, 1]."""
    factors = factors[:, None, None, None]
    return torch.addcmul(images * factors, others, 1 - factors).clamp_(0, 1)


def _once(strength: str, function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., list[list[Change]]]:
    """The turns of an operation that is one function, which takes the first amount if there is one."""
    return lambda wanted, amounts: [[Change(function, wanted, amounts[0] if len(amounts) else wanted, strength)]]


_JITTER_FIELDS = ("brightness", "contrast", "saturation", "hue")
_NO_JITTER = (1.0, 1.0, 1.0, 0.0)
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int64)


def _draw_jitter(config: AugmentConfig, numbers: NDArray[np.float64]) -> NDArray[np.floating]:
    """(n, 8): four factors or shifts, and which comes first, second, third and last.

    Functions that change nothing in an image come last, so that strengths of 0 cost no pass.
    """
    strengths = np.array([config.brightness, config.contrast, config.saturation])
    least = np.append(np.maximum(0, 1 - strengths), -config.hue)
    greatest = np.append(1 + strengths, config.hue)
    factors = (least + (greatest - least) * numbers[:, :4]).astype(np.float32)
    order = _ORDERS[(numbers[:, 4] * len(_ORDERS)).astype(np.int64)]
    active = np.take_along_axis(factors != np.array(_NO_JITTER, np.float32), order, axis=1)
    order = np.take_along_axis(order, np.argsort(~active, axis=1, kind="stable"), axis=1)
    return np.concatenate((factors, order.astype(np.float32)), axis=1)


def _jitter_turns(wanted: Any, amounts: Any) -> list[list[Change]]:
    functions = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    active = [wanted & (factors != neutral) for factors, neutral in zip(amounts[:4], _NO_JITTER, strict=True)]
    return [
        [Change(functions[k], active[k] & (turn == k), amounts[k], _JITTER_FIELDS[k]) for k in range(4)]
        for turn in amounts[4:]
    ]


def _pil_jitter(config: AugmentConfig) -> Callable[[Image.Image], Image.Image]:
    from torchvision.transforms import ColorJitter  # noqa: PLC0415 - takes a second to import, for benchmarks alone

    return ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)


OPERATIONS = (
    Operation(
        fields=("flip_probability",),
        columns=(0,),
        turns=_once("flip_probability", lambda images, _: images.flip(-1)),
        pil=lambda _: ImageOps.mirror,
    ),
    Operation(
        fields=("jitter_probability", *_JITTER_FIELDS),
        columns=(1, 4, 5, 6, 7, 8),
        amounts=8,
        draw=_draw_jitter,
        turns=_jitter_turns,
        pil=_pil_jitter,
    ),
    Operation(
        fields=("grayscale_probability",),
        columns=(2,),
        turns=_once("grayscale_probability", lambda images, _: to_grayscale(images)),
        pil=lambda _: lambda image: image.convert("L").convert(image.mode),
    ),
    Operation(
        fields=("solarize_probability",),
        columns=(10, 11),
        amounts=1,
        draw=lambda _, numbers: numbers * (256 / 255),  # PAWS draws a threshold in [0, 256) levels
        turns=_once("solarize_probability", solarize),
        pil=lambda _: lambda image: ImageOps.solarize(image, int(random.uniform(0, 256))),
    ),
    Operation(
        fields=("equalize_probability",),
        columns=(12,),
        turns=_once("equalize_probability", lambda images, _: equalize(images)),
        pil=lambda _: ImageOps.equalize,
    ),
    Operation(
        fields=("blur_probability",),
        columns=(3, 9),
        amounts=1,
        draw=lambda _, numbers: _BLUR_SIGMA[0] + (_BLUR_SIGMA[1] - _BLUR_SIGMA[0]) * numbers,
        turns=_once("blur_probability", gaussian_blur),
        pil=lambda _: lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(*_BLUR_SIGMA))),
    ),
)


def _by_operation(parameters: Any) -> list[tuple[Operation, Any, Any]]:
    """(n, P), as tensor or array → each operation with (n,) bool whether and (amounts, n)."""
    rows, starts = parameters.T, itertools.accumulate((1 + each.amounts for each in OPERATIONS), initial=0)
    return [
        (operation, rows[start] > 0, rows[start + 1 : start + 1 + operation.amounts])
        for operation, start in zip(OPERATIONS, starts, strict=False)
    ]


def draw_parameters(
    config: AugmentConfig, *, seed: int, epoch: int, samples: NDArray[np.int64], view: int | NDArray[np.int64]
) -> Tensor:
    """Draw what happens to (n,) samples, a function of (seed, epoch, sample, view) alone, as in ``uniform``.

    Returns:
        (n, P) float32 on the CPU: for each operation in turn, whether an image gets it (0 or 1), and its amounts.
    """
    count = 1 + max(column for operation in OPERATIONS for column in operation.columns)
    numbers = uniform(seed=seed, stream=Stream.AUGMENT, epoch=epoch, samples=samples, view=view, count=count)
    rows = []
    for operation in OPERATIONS:
        whether, *others = operation.columns
        rows.append(numbers[:, whether] < getattr(config, operation.probability))
        rows.extend(operation.draw(config, numbers[:, others]).T)
    return torch.from_numpy(np.stack(rows, axis=1, dtype=np.float32, casting="unsafe"))


def augment(images: Tensor, parameters: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Change each image by its own parameters, and normalise it. Each operation computes the images that get it.

    Args:
        images: (n, 3, H, W) or (n, 1, H, W) uint8 on any device.
        parameters: (n, P) of :func:`draw_parameters`.
        mean, std: three values each, of pixels in [0, 1].

    Returns:
        (n, 3, H, W) float32 on the images' device, channels-last on a GPU; a grey image is repeated to three channels.

    Raises:
        ValueError: dtype, channels or the number of parameters do not fit.
    """
    _require_images(images, mean, std, parameters)
    changes = [  # as arrays: some fifty operations on n numbers, which cost torch a millisecond
        (change, change.wanted.nonzero()[0])
        for operation, wanted, amounts in _by_operation(parameters.numpy())
        for turn in operation.turns(wanted, amounts)
        for change in turn
        if change.wanted.any()
    ]
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    if changes:
        counts = [len(which) for _, which in changes]  # one copy of all row numbers, and one of all amounts
        rows = to_device(torch.from_numpy(np.concatenate([which for _, which in changes])), images.device)
        values = np.concatenate([change.amounts[which] for change, which in changes], dtype=np.float32)
        amounts_there = to_device(torch.from_numpy(values), images.device).split(counts)
        for (change, _), which, of_which in zip(changes, rows.split(counts), amounts_there, strict=True):
            pixels.index_copy_(0, which, change.function(pixels.index_select(0, which), of_which))
    return _normalised(pixels, mean, std)


def augment_groups(
    images: Sequence[Tensor], parameters: Sequence[Tensor], *, mean: Sequence[float], std: Sequence[float]
) -> list[Tensor]:
    """:func:`augment` of each group of crops, which are of one size within a group."""
    return [augment(crops, each, mean=mean, std=std) for crops, each in zip(images, parameters, strict=True)]


class CompiledAugmentation:
    """:func:`augment_groups` as one graph of ``torch.compile`` per size of group, compiled at the first of each size.

    :func:`augment` gives an operation only the rows that it changes; their number differs from batch to batch. Here
    every operation computes all rows and ``torch.where`` picks: one graph serves every step, and a few fused kernels
    replace hundreds of small ones. Values in [0, 1] agree to 5e-6. A graph break is an error that says where.
    """

    def __init__(self, config: AugmentConfig, *, backend: str | Callable[..., Any] = "inductor") -> None:
        """Prepare; operations that the config of all batches turns off are not in the graph."""
        self._config = config
        self._graph = whole_graph(self._all_rows, backend=backend)

    def __call__(
        self, images: Sequence[Tensor], parameters: Sequence[Tensor], *, mean: Sequence[float], std: Sequence[float]
    ) -> list[Tensor]:
        """As :func:`augment_groups`. Parameters, mean and std of all groups go to the device in one copy."""
        for crops, each in zip(images, parameters, strict=True):
            _require_images(crops, mean, std, each)
        colours = parameters[0].new_zeros(1, parameters[0].shape[1])  # a row as long as the others
        colours[0, :6] = torch.tensor((*mean, *std))
        there = to_device(torch.cat([*parameters, colours]), images[0].device)
        *values, colours = there.split([*map(len, parameters), 1])
        return [self._graph(crops, each, colours[0, :6]) for crops, each in zip(images, values, strict=True)]

    def _all_rows(self, images: Tensor, values: Tensor, colours: Tensor) -> Tensor:
        """(n, C, H, W) uint8, (n, P) parameters, (6,) mean and std → (n, 3, H, W)."""
        pixels = images.to(torch.float32, memory_format=torch.contiguous_format) / 255
        for operation, wanted, amounts in _by_operation(values):
            if not getattr(self._config, operation.probability):
                continue
            for turn in operation.turns(wanted, amounts):
                changed = pixels
                for change in turn:
                    if getattr(self._config, change.strength):
                        everywhere = change.function(pixels, change.amounts)
                        changed = torch.where(change.wanted[:, None, None, None], everywhere, changed)
                pixels = changed
        centre, scale = colours.view(2, 3, 1, 1)
        layout = torch.channels_last if images.is_cuda else torch.contiguous_format
        return ((pixels - centre) / scale).contiguous(memory_format=layout)


def normalise(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise without augmentation, for evaluation; arguments and result as in ``augment``."""
    _require_images(images, mean, std)
    return _normalised(images.to(torch.float32, memory_format=torch.contiguous_format).div_(255), mean, std)


def _normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    n, _, height, width = pixels.shape
    layout = torch.channels_last if pixels.is_cuda else torch.contiguous_format
    result = torch.empty((n, 3, height, width), dtype=pixels.dtype, device=pixels.device, memory_format=layout)
    centre, scale = to_device(torch.tensor((mean, std), dtype=pixels.dtype), pixels.device)[:, :, None, None]
    return torch.sub(pixels, centre, out=result).div_(scale)


def _require_images(
    images: Tensor, mean: Sequence[float], std: Sequence[float], parameters: Tensor | None = None
) -> None:
    """Raise the errors of :func:`augment`."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean={mean} and std={std} need three values each, std positive")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"need uint8 images (n, 3 or 1, H, W), not {images.dtype} {tuple(images.shape)}")
    if parameters is not None and len(parameters) != len(images):
        raise ValueError(f"{len(images)} images need as many parameters, not {len(parameters)}")
