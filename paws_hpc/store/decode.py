"""Records → pixels."""

from __future__ import annotations

import io
import math
import struct

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from paws_hpc.store.format import FLAG_GREY, FLAG_PIXELS, FLAG_PNG

MAX_PIXELS = 178_956_970
"""Pixels of the largest image that is decoded: where PIL, too, speaks of a decompression bomb."""
MAX_ASPECT = 1_000
"""Longer side over shorter one, at most: resized to a short side of 256, a narrower image would fill the memory."""
DECODER_ERRORS = (
    OSError, SyntaxError, EOFError, struct.error, LookupError, TypeError, AttributeError, ArithmeticError,
    AssertionError, RuntimeError, Image.DecompressionBombError, Warning,
)  # fmt: skip
"""What PIL's readers are known to raise on damaged files, beside ValueError; warnings where these are errors."""


def decode_record(record: bytes | NDArray[np.uint8], *, flags: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Decode a record of ``size`` (H, W) to (H, W, 3) uint8, RGB, in memory of its own; ``flags`` says what it is.

    Raises:
        ValueError: the record cannot be decoded, or has another size.
    """
    if flags & FLAG_PIXELS:
        shape = (*size, 1 if flags & FLAG_GREY else 3)
        if len(record) != math.prod(shape):
            raise ValueError(f"it has {len(record):,} bytes, not {' x '.join(map(str, shape))}")
        return colour(np.frombuffer(record, np.uint8).reshape(shape))
    if flags & FLAG_PNG:
        try:
            with Image.open(io.BytesIO(bytes(record)), formats=("PNG",)) as image:
                if image.size != size[::-1] or math.prod(size) > MAX_PIXELS:
                    raise ValueError(f"it is {image.width} x {image.height} pixels, not {size[1]} x {size[0]}")
                return np.asarray(image.convert("RGB"))
        except DECODER_ERRORS as error:
            raise ValueError(f"it is not a readable PNG file: {error}") from error
    return decode_jpeg(record, size=size)


def check_aspect(height: int, width: int) -> None:
    """Raise ValueError for an image narrower than :data:`MAX_ASPECT` allows."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"it is {width} x {height} pixels, too narrow to be cropped: at most {MAX_ASPECT:,} to 1")


def colour(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 1 or 3) uint8 as (H, W, 3), a copy; one channel is repeated."""
    return pixels.copy() if pixels.shape[2] == 3 else np.concatenate((pixels, pixels, pixels), axis=2)


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
