"""Augmentation, batched on tensors on any device: flip, colour jitter in per-sample order, grayscale, blur, normalise.

Legend: n images, C channels (3, or 1 for grey stores), H x W pixels. Parameters are drawn on the CPU as pure functions
of (seed, epoch, sample, view) and decide there which rows each operation touches, so a GPU is never waited for.

On values in [0, 1] the operations are torchvision's for float tensors (C = 1 included, where saturation and hue change
nothing). The blur is a true Gaussian cut at three standard deviations. torchvision leaves the kernel's size to its
user; SimCLR's tenth of the image's side would cut a 32-pixel image's kernel to three pixels, while PIL's blur, which
PAWS used, follows the standard deviation alone, as this one does (they differ by about 1 of 255 levels r.m.s.).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paws_hpc.data.config import AugmentConfig
from paws_hpc.data.devices import to_device
from paws_hpc.data.philox import Stream, uniform

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NO_JITTER = (1.0, 1.0, 1.0, 0.0)
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int64)
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, with torchvision's digits
_BLUR_RADIUS_SIGMAS = 3
_UNIFORMS_PER_IMAGE = 10


@dataclass(frozen=True)
class AugmentParameters:
    """What happens to each of n images, on the CPU.

    Attributes:
        flip: (n,) bool, mirrored left to right.
        jitter: (n, 4) float32: factors of brightness, contrast and saturation (1 changes nothing), shift of hue (0).
        order: (n, 4) int64, which of the four comes first, second, third and last.
        grayscale: (n,) bool.
        blur_sigma: (n,) float32, pixels; 0 means no blur.
    """

    flip: Tensor
    jitter: Tensor
    order: Tensor
    grayscale: Tensor
    blur_sigma: Tensor

    def __len__(self) -> int:
        return len(self.flip)

    @staticmethod
    def concatenate(parts: Sequence[AugmentParameters]) -> AugmentParameters:
        """The parameters of the parts' images one after the other."""
        names = [field.name for field in fields(AugmentParameters)]
        return AugmentParameters(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def draw_parameters(
    config: AugmentConfig, *, seed: int, epoch: int, samples: NDArray[np.int64], view: int | NDArray[np.int64]
) -> AugmentParameters:
    """Draw the parameters of n images, each a function of (seed, epoch, sample, view) alone.

    Args:
        config: strengths and probabilities.
        seed, epoch, samples, view: as in ``philox.uniform``; samples (n,).

    Returns:
        parameters of n images.
    """
    numbers = uniform(
        seed=seed, stream=Stream.AUGMENT, epoch=epoch, samples=samples, view=view, count=_UNIFORMS_PER_IMAGE
    )
    flip, jittered, grayscale, blurred = (numbers[:, column] for column in range(4))
    strengths = np.array([config.brightness, config.contrast, config.saturation])
    least = np.append(np.maximum(0, 1 - strengths), -config.hue)
    greatest = np.append(1 + strengths, config.hue)
    jitter = least + (greatest - least) * numbers[:, 4:8]
    jitter[jittered >= config.jitter_probability] = NO_JITTER
    order = _ORDERS[(numbers[:, 8] * len(_ORDERS)).astype(np.int64)]
    least_sigma, greatest_sigma = config.blur_sigma
    sigma = least_sigma + (greatest_sigma - least_sigma) * numbers[:, 9]
    sigma[blurred >= config.blur_probability] = 0
    return AugmentParameters(
        flip=torch.from_numpy(flip < config.flip_probability),
        jitter=torch.from_numpy(jitter.astype(np.float32)),
        order=torch.from_numpy(order),
        grayscale=torch.from_numpy(grayscale < config.grayscale_probability),
        blur_sigma=torch.from_numpy(sigma.astype(np.float32)),
    )


def augment(
    images: Tensor,
    parameters: AugmentParameters,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Flip, jitter, grayscale, blur and normalise each image by its own parameters.

    Args:
        images: (n, 3, H, W) or (n, 1, H, W) uint8 on any device.
        parameters: of n images.
        mean, std: three values each, of pixels in [0, 1].

    Returns:
        (n, 3, H, W) float32 on the images' device, channels-last on a GPU; a grey image has three channels of the same
        pixels.

    Raises:
        ValueError: dtype, channels or the number of parameters do not fit.
    """
    require_augmentable(images, parameters, mean, std)
    groups = _jitter_groups(parameters)
    flipped, gray, blurred, *jittered = _rows_on_device(
        [
            parameters.flip.numpy().nonzero()[0],
            parameters.grayscale.numpy().nonzero()[0],
            parameters.blur_sigma.numpy().nonzero()[0],
            *(rows for _, rows in groups),
        ],
        images.device,
    )
    jitter = to_device(parameters.jitter, images.device)
    pixels = _unit_interval(images)
    _apply(_mirror, pixels, flipped)
    for (kind, _), rows in zip(groups, jittered, strict=True):
        _apply(JITTER[kind], pixels, rows, jitter[:, kind])
    _apply(to_grayscale, pixels, gray)
    _apply(gaussian_blur, pixels, blurred, to_device(parameters.blur_sigma, images.device))
    return _normalised(pixels, mean, std)


def normalise(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise without augmentation, for evaluation; arguments and result as in ``augment``."""
    _require_images(images, mean, std)
    return _normalised(_unit_interval(images), mean, std)


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Each image times its factor, clamped to [0, 1].

    Args:
        images: (n, C, H, W) float32 in [0, 1].
        factors: (n,) float32, not negative.

    Returns:
        (n, C, H, W) float32.
    """
    return (images * factors[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Each image blended with the mean of its own grey values; shapes as in ``adjust_brightness``."""
    return _blend(images, _luma(images).mean(dim=(1, 2, 3), keepdim=True), factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Each image blended with its grey version; shapes as in ``adjust_brightness``, grey images stay."""
    return images if images.shape[1] == 1 else _blend(images, _luma(images), factors)


def adjust_hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Each image's hue turned by its share of the colour circle; shapes as in ``adjust_brightness``, grey images stay.

    With value v = max(r, g, b), chroma c = v - min(r, g, b) and hue h in sixths of the circle, a channel is
    ``v - c * clamp(min(k, 4 - k), 0, 1)`` where ``k = (h + 5, 3 or 1) mod 6`` for red, green and blue.

    Args:
        images: (n, C, H, W) float32 in [0, 1].
        shifts: (n,) float32 in [-0.5, 0.5].

    Returns:
        (n, C, H, W) float32.
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


def gaussian_blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Each image blurred by a Gaussian, reflected at the borders, cut at a radius of ceil(3 sigma) pixels.

    Equal to torchvision's ``gaussian_blur`` with ``kernel_size = 2 ceil(3 sigma) + 1`` per image, computed as two
    batched products with (H, H) and (W, W) matrices, which is as fast as a convolution with a kernel per image on the
    CPU and faster on small images. The radius is at most the image's side minus 1.

    Args:
        images: (n, C, H, W) float32.
        sigmas: (n,) float32 standard deviations, pixels, positive.

    Returns:
        (n, C, H, W) float32.
    """
    height, width = images.shape[-2:]
    rows = _blur_matrix(sigmas, height)
    columns = rows if width == height else _blur_matrix(sigmas, width)
    return rows[:, None] @ images @ columns[:, None].mT


def _blur_matrix(sigmas: Tensor, size: int) -> Tensor:
    """(n, size, size): what each pixel of a line takes from each; rows sum to 1.

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


JITTER: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
)


def _jitter_groups(parameters: AugmentParameters) -> list[tuple[int, NDArray[np.int64]]]:
    """The jitter as at most 16 (operation, rows) in the order of application.

    Operations that change nothing in an image are dropped and its others move up, so that disabled ones cost no pass.
    """
    order = parameters.order.numpy()
    active = np.take_along_axis(parameters.jitter.numpy() != np.array(NO_JITTER, np.float32), order, axis=1)
    order = np.take_along_axis(order, np.argsort(~active, axis=1, kind="stable"), axis=1)
    counts = active.sum(axis=1)
    groups = []
    for turn in range(len(NO_JITTER)):
        for kind in range(len(NO_JITTER)):
            rows = np.flatnonzero((order[:, turn] == kind) & (turn < counts))
            if rows.size:
                groups.append((kind, rows))
    return groups


def _apply(operation: Callable[..., Tensor], pixels: Tensor, rows: Tensor, amounts: Tensor | None = None) -> None:
    """Replace the given rows of ``pixels`` by the operation's result, which gets its rows of ``amounts``, if any."""
    if len(rows) == 0:
        return
    selected = pixels.index_select(0, rows)
    changed = operation(selected) if amounts is None else operation(selected, amounts.index_select(0, rows))
    pixels.index_copy_(0, rows, changed)


def _mirror(images: Tensor) -> Tensor:
    return images.flip(-1)


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


def _unit_interval(images: Tensor) -> Tensor:
    """uint8 pixels as float32 in [0, 1], channel planes contiguous, as the operations want them."""
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    n, _, height, width = pixels.shape
    layout = torch.channels_last if pixels.is_cuda else torch.contiguous_format
    result = torch.empty((n, 3, height, width), dtype=pixels.dtype, device=pixels.device, memory_format=layout)
    centre, scale = to_device(torch.tensor((mean, std), dtype=pixels.dtype), pixels.device)[:, :, None, None]
    return torch.sub(pixels, centre, out=result).div_(scale)


def _rows_on_device(groups: list[NDArray[np.int64]], device: torch.device) -> Sequence[Tensor]:
    """Row numbers as tensors on the device, by one copy."""
    rows = to_device(torch.from_numpy(np.concatenate(groups)), device)
    return rows.split([len(group) for group in groups])


def require_augmentable(
    images: Tensor, parameters: AugmentParameters, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Raise the errors of :func:`augment`."""
    _require_images(images, mean, std)
    if len(parameters) != len(images):
        raise ValueError(f"{len(images)} images need as many parameters, not {len(parameters)}")


def _require_images(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean={mean} and std={std} need three values each, std positive")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"need uint8 images (n, 3 or 1, H, W), not {images.dtype} {tuple(images.shape)}")
