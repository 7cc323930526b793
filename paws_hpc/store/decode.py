"""JPEG bytes → pixels."""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray


def decode_jpeg(payload: bytes | NDArray[np.uint8], *, strict: bool = True) -> NDArray[np.uint8]:
    """Decode a JPEG file to (H, W, 3) uint8, RGB.

    Args:
        payload: the file's bytes, as bytes or a (bytes,) uint8 array.
        strict: refuse data that libjpeg-turbo can only decode with a warning.

    Raises:
        ValueError: the bytes are not a decodable JPEG; callers add the record's name.
    """
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(payload, colorspace="RGB", strict=strict)
    return pixels
