"""Mean and standard deviation of pixels, summed exactly in integers so that the order of images cannot matter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paws_hpc.store.format import Statistics

_LEVELS = 256
_FULL_SCALE = 255


@dataclass(frozen=True)
class PixelSums:
    """Per channel the sum and the sum of squares of some images' values 0..255; three channels, or one for grey."""

    images: int
    pixels: int
    totals: tuple[int, ...]
    squares: tuple[int, ...]


def pixel_sums(image: NDArray[np.uint8]) -> PixelSums:
    """Sum one image (H, W, C)."""
    values = image.reshape(-1, image.shape[-1])
    counts = [np.bincount(values[:, channel], minlength=_LEVELS) for channel in range(values.shape[1])]
    levels = np.arange(_LEVELS)
    return PixelSums(
        images=1,
        pixels=len(values),
        totals=tuple(int(count @ levels) for count in counts),
        squares=tuple(int(count @ levels**2) for count in counts),
    )


def combine(parts: Iterable[PixelSums], *, exact: bool) -> Statistics:
    """Statistics over all pixels of all parts; a single channel is repeated to three."""
    parts = list(parts)
    pixels = sum(part.pixels for part in parts)
    totals = [sum(column) for column in zip(*(part.totals for part in parts), strict=True)]
    squares = [sum(column) for column in zip(*(part.squares for part in parts), strict=True)]
    mean = [total / pixels / _FULL_SCALE for total in totals]
    # n * sum(x^2) - sum(x)^2 is an exact integer: no cancellation.
    std = [
        (pixels * square - total * total) ** 0.5 / pixels / _FULL_SCALE
        for total, square in zip(totals, squares, strict=True)
    ]
    return Statistics(
        mean=_three(mean),
        std=_three(std),
        images=sum(part.images for part in parts),
        method="exact" if exact else "sample",
    )


def _three(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = values if len(values) == 3 else values * 3
    return red, green, blue
