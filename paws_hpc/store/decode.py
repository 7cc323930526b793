"""JPEG bytes → pixels."""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray

MAX_PIXELS = 178_956_970
"""Pixels of the largest image that is decoded: where PIL, too, speaks of a decompression bomb."""


def decode_jpeg(
    payload: bytes | NDArray[np.uint8], *, strict: bool = True, size: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Decode a JPEG file to (H, W, 3) uint8, RGB.

    The header is read first: a few hundred bytes can claim 65,535 x 65,535 pixels, which would take 13 GB.

    Raises:
        ValueError: the bytes are not a JPEG, decode only with a warning (if ``strict``), have another ``size`` (H, W)
            or more than :data:`MAX_PIXELS`.
    """
    if not len(payload):
        raise ValueError("it is empty")
    height, width, _, _ = simplejpeg.decode_jpeg_header(payload, strict=strict)
    if size is not None and (height, width) != size:
        raise ValueError(f"it is {width} x {height} pixels, not {size[1]} x {size[0]}")
    if height * width > MAX_PIXELS:
        raise ValueError(f"it claims {width} x {height} pixels, more than the {MAX_PIXELS:,} that are decoded")
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(payload, colorspace="RGB", strict=strict)
    return pixels
