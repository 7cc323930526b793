"""A view of one image as the paper's code makes it: PIL crops, jitters and blurs; torchvision makes a tensor."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms

from paws_hpc.data.config import AugmentConfig, CropConfig

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pil_view(
    crop: CropConfig,
    augment: AugmentConfig,
    *,
    mean: Sequence[float] = _IMAGENET[0],
    std: Sequence[float] = _IMAGENET[1],
) -> Callable[[Image.Image], Tensor]:
    """One random view: an RGB image to (3, s, s) float32.

    Args:
        crop: size, scale and ratio; its count is the caller's business.
        augment: operations on it. Those of no chance are left out, as their users would.
        mean, std: of pixels in [0, 1], three values each.
    """
    steps: list[object] = [
        transforms.RandomResizedCrop(crop.size, scale=tuple(crop.scale), ratio=tuple(crop.ratio)),
    ]
    if augment.flip_probability:
        steps.append(transforms.RandomHorizontalFlip(augment.flip_probability))
    if augment.jitter_probability:
        strengths = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
        steps.append(transforms.RandomApply([transforms.ColorJitter(*strengths)], p=augment.jitter_probability))
    if augment.grayscale_probability:
        steps.append(transforms.RandomGrayscale(augment.grayscale_probability))
    if augment.blur_probability:
        blur = transforms.Lambda(partial(_blur, sigma=augment.blur_sigma))
        steps.append(transforms.RandomApply([blur], p=augment.blur_probability))
    view: Callable[[Image.Image], Tensor] = transforms.Compose(
        [*steps, transforms.ToTensor(), transforms.Normalize(mean, std)]
    )
    return view


def _blur(image: Image.Image, *, sigma: list[float]) -> Image.Image:
    least, greatest = sigma
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(least, greatest)))
