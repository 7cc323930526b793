"""Image files → what a JPEG store holds: three-component JPEGs, untouched where they are that already."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from paws_hpc.store.decode import decode_jpeg
from paws_hpc.store.format import FLAG_PROGRESSIVE, FLAG_RECOVERED, FLAG_REENCODED

QUALITY = 95
"""JPEG quality of images that are encoded anew, without chroma subsampling."""

_EIGHT_BIT_MODES = frozenset(("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"))
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE_FRAMES = frozenset((0xC2, 0xC6, 0xCA, 0xCE))


@dataclass(frozen=True)
class StandardImage:
    """One image ready for a JPEG store.

    Attributes:
        payload: the JPEG file's bytes.
        pixels: (H, W, 3) uint8, decoded from ``payload``.
        flags: bits ``FLAG_*``.
        changed: why the payload is not the source's bytes; None where it is.
    """

    payload: bytes
    pixels: NDArray[np.uint8]
    flags: int
    changed: str | None


def standard_jpeg(content: bytes) -> StandardImage:
    """Turn the bytes of an image file into a three-component JPEG.

    Baseline and progressive colour JPEGs are kept byte for byte. Whatever else PIL reads (PNG, grey or CMYK JPEG, JPEG
    data that decodes only with a warning) is decoded as ``convert("RGB")`` does and encoded with quality 95 and 4:4:4.
    Every image is decoded once, so that none is packed that training could not read.

    Raises:
        ValueError: the bytes are no readable image of 8 bits per channel.
    """
    flags, changed = 0, None
    if content[:2] == b"\xff\xd8":
        try:
            _, _, colours, _ = simplejpeg.decode_jpeg_header(content)
            if colours in ("YCbCr", "RGB"):
                pixels = decode_jpeg(content)
                return StandardImage(content, pixels, FLAG_PROGRESSIVE * is_progressive(content), None)
            changed = f"{colours} JPEG"
        except ValueError as error:
            flags, changed = FLAG_RECOVERED, f"JPEG with faults ({error})"
    pixels, container = _decode_with_pil(content)
    payload: bytes = simplejpeg.encode_jpeg(pixels, quality=QUALITY, colorspace="RGB", colorsubsampling="444")
    return StandardImage(payload, decode_jpeg(payload), flags | FLAG_REENCODED, changed or container)


def _decode_with_pil(content: bytes) -> tuple[NDArray[np.uint8], str]:
    """Decode any image file to (H, W, 3) uint8 RGB, transparency dropped; returns also the name of its format."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode not in _EIGHT_BIT_MODES:
                raise ValueError(f"its pixels are of mode {image.mode!r}; convert it to 8 bits per channel first")
            # A palette may hold transparency, which only this step keeps apart from colour.
            opaque = image.convert("RGBA") if image.mode == "P" else image
            return np.ascontiguousarray(opaque.convert("RGB")), image.format or "unknown format"
    except (OSError, SyntaxError, EOFError, struct.error, IndexError, Image.DecompressionBombError) as error:
        raise ValueError(f"it is not a readable image: {error}") from error


def is_progressive(content: bytes) -> bool:
    """Whether a JPEG file is progressive: looks for its first start-of-frame marker (ITU-T T.81, table B.1).

    Raises:
        ValueError: the file ends before any frame.
    """
    place = 2
    while place + 4 <= len(content):
        if content[place] != 0xFF:
            raise ValueError(f"JPEG marker expected at byte {place}")
        marker = content[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
        elif marker in _START_OF_FRAME:
            return marker in _PROGRESSIVE_FRAMES
        else:
            place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    raise ValueError("JPEG without a frame")
