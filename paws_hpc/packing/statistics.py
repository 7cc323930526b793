"""Mean and standard deviation of pixels, summed exactly in integers so that the order of images cannot matter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PixelSums:
        """Build the sums from parsed JSON, whose integers are as long as needed."""
        return cls(value["images"], value["pixels"], tuple(value["totals"]), tuple(value["squares"]))


def pixel_sums(image: NDArray[np.uint8]) -> PixelSums:
    """Sum one image (H, W, C)."""
    height, width, channels = image.shape
    # PIL counts values four times as fast as numpy.
    counts = np.array(Image.fromarray(image if channels == 3 else image[..., 0]).histogram()).reshape(channels, _LEVELS)
    levels = np.arange(_LEVELS)
    return PixelSums(
        images=1,
        pixels=height * width,
        totals=tuple(int(count @ levels) for count in counts),
        squares=tuple(int(count @ levels**2) for count in counts),
    )


def add_up(parts: Iterable[PixelSums]) -> PixelSums:
    """The sums of all parts together; there is at least one."""
    parts = list(parts)
    return PixelSums(
        images=sum(part.images for part in parts),
        pixels=sum(part.pixels for part in parts),
        totals=tuple(sum(column) for column in zip(*(part.totals for part in parts), strict=True)),
        squares=tuple(sum(column) for column in zip(*(part.squares for part in parts), strict=True)),
    )


def combine(parts: Iterable[PixelSums], *, exact: bool) -> Statistics:
    """Statistics over all pixels of all parts; a single channel is repeated to three."""
    whole = add_up(parts)
    pixels, totals, squares = whole.pixels, whole.totals, whole.squares
    mean = [total / pixels / _FULL_SCALE for total in totals]
    # n * sum(x^2) - sum(x)^2 is an exact integer: no cancellation.
    std = [
        (pixels * square - total * total) ** 0.5 / pixels / _FULL_SCALE
        for total, square in zip(totals, squares, strict=True)
    ]
    return Statistics(
        mean=_three(mean),
        std=_three(std),
        images=whole.images,
        method="exact" if exact else "sample",
    )


def _three(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = values if len(values) == 3 else values * 3
    return red, green, blue
