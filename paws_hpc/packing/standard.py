"""Image files → what a store of images of any size holds: JPEGs with their coefficients unchanged, and pixels."""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

try:
    import turbojpeg  # type: ignore[import-not-found]
except ImportError:  # it comes with the extra ``transcode``
    turbojpeg = None

from paws_hpc.packing.jpeg import TooManyScansError, take_apart
from paws_hpc.store.decode import DECODER_ERRORS, MAX_PIXELS, check_aspect, colour, decode_jpeg
from paws_hpc.store.format import (
    FLAG_GREY,
    FLAG_MADE_BASELINE,
    FLAG_PIXELS,
    FLAG_PNG,
    FLAG_PROGRESSIVE,
    FLAG_RECOVERED,
    FLAG_REENCODED,
    FLAG_SHRUNK,
    FLAG_STRIPPED,
    FLAG_TURNED,
    VERSIONS,
    Manifest,
)

_LONGEST_SIDE = 65_500
QUALITY = 95
"""JPEG quality of images that are encoded anew, without chroma subsampling."""
_MOST_GROWTH = 8
"""Pixels may take so many times the bytes of their file. Files that compress better, such as line drawings, become PNG:
those decode fast, and a shard does not grow out of all proportion (docs/benchmarks.md)."""

# PIL knows more, of which EPS runs Ghostscript on what it is given, and others raise what nobody expects.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
_EIGHT_BIT_MODES = frozenset(("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"))
_EXACT_MODES = _EIGHT_BIT_MODES - {"La", "RGBa", "CMYK", "YCbCr"}
"""Of which conversion to grey or RGB keeps the pixels, but for transparency."""
_TURNS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, "HFLIP"),
    3: (Image.Transpose.ROTATE_180, "ROT180"),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, "VFLIP"),
    5: (Image.Transpose.TRANSPOSE, "TRANSPOSE"),
    6: (Image.Transpose.ROTATE_270, "ROT90"),
    7: (Image.Transpose.TRANSVERSE, "TRANSVERSE"),
    8: (Image.Transpose.ROTATE_90, "ROT270"),
}
"""Orientation tag → how PIL and libjpeg-turbo, whose rotations are clockwise, turn the image upright."""


@cache
def transcoder() -> str | None:
    """Name and version of what rewrites JPEG coefficients without loss; None where it is not installed."""
    return None if turbojpeg is None else f"turbojpeg {version('turbojpeg')}"


@dataclass
class StandardImage:
    """One image ready to be stored."""

    payload: bytes
    """The JPEG or PNG file, or raw pixels."""
    height: int
    width: int
    pixels: NDArray[np.uint8] | None
    """(H, W, 3) uint8, as ``payload`` decodes; None where nobody wants them."""
    flags: int
    """Bits ``FLAG_*``; without ``FLAG_REENCODED`` the pixels are those of the source, if turned."""
    changed: str | None
    """What was done, for people; None where the payload is the source's bytes."""


@dataclass(frozen=True)
class ImagePolicy:
    """How images become records of the store."""

    max_short_side: int | None = None
    """An image whose short side is longer, in pixels, is reduced to it and encoded anew. None: never."""
    pixels: bool = True
    """Whether :attr:`StandardImage.pixels` are wanted."""
    decode: bool = True
    """Whether to decode images whose pixels are not wanted, to see that they can be."""
    transcode: bool = False
    """Whether to rewrite coefficients without loss, so that progressive JPEGs become baseline and images are turned
    upright; needs turbojpeg."""
    lossless: bool = True
    """Whether grey JPEGs, and images of formats without loss, keep their pixels; else they become colour JPEGs."""


def standard_image(content: bytes, policy: ImagePolicy = ImagePolicy()) -> StandardImage:
    """Turn the bytes of an image file into a record of 8 bits per channel, as the table of shards/FORMAT.md says.

    Raises:
        ValueError: the bytes are no readable image of 8 bits per channel, or it has absurdly many pixels.
    """
    if not content:
        raise ValueError("it is empty")
    flags, changed = 0, None
    is_jpeg = content[:2] == b"\xff\xd8"
    if is_jpeg:
        try:
            image = _standard_jpeg(content, policy)
            if isinstance(image, StandardImage):
                side = policy.max_short_side
                if side is None or min(image.height, image.width) <= side:
                    return image
                # What was done to the file without loss does not matter any more, but for the turn.
                turned = image.flags & FLAG_TURNED
                return from_pixels(decode_jpeg(image.payload), "turned upright" * bool(turned), turned, policy)
            changed = image
        except TooManyScansError:
            raise
        except ValueError as error:
            flags, changed = FLAG_RECOVERED, f"JPEG with faults ({error})"
    pixels, container, turned, loss = _decode_with_pil(content)
    flags |= FLAG_TURNED * turned | FLAG_REENCODED * bool(loss)
    reason = f"{changed or f'{loss} {container}'.lstrip()}{', turned upright' * turned}"
    lossy = is_jpeg or (container == "WEBP" and b"VP8L" not in content)
    return from_pixels(pixels, reason, flags, policy, kept_from=len(content) * (policy.lossless and not lossy))


def standard_pixels(content: bytes, like: Manifest) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) uint8, RGB, upright, that training would see of an image file, had it been packed.

    A store of version 3 takes a PNG file as a JPEG, at some loss, unless it is a raw one. Errors as in
    :func:`standard_image`.
    """
    image = standard_image(content, ImagePolicy(like.packing.max_short_side, lossless=like.version > VERSIONS[0]))
    if like.encoding == "raw" and image.flags & FLAG_REENCODED:
        return colour(_decode_with_pil(content)[0])
    assert image.pixels is not None, "they are wanted"
    return image.pixels


def image_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) uint8, RGB, of an opened image, upright; ValueError if they have no 8 bits to a channel."""
    upright = ImageOps.exif_transpose(image)
    return colour(_eight_bits(upright).reshape(upright.height, upright.width, -1))


def from_pixels(
    pixels: NDArray[np.uint8], reason: str, flags: int, policy: ImagePolicy, *, kept_from: int = 0
) -> StandardImage:
    """A record of pixels (H, W, 1 or 3) uint8, reduced in size if that is wanted.

    It is a JPEG of quality 95 and 4:4:4; or, without loss, pixels or a PNG of a source of ``kept_from`` bytes.
    """
    height, width, channels = pixels.shape
    check_aspect(height, width)
    side = policy.max_short_side
    if side is not None and min(height, width) > side:
        scale = side / min(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        shrunk = Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels)
        pixels = np.asarray(shrunk.resize((width, height), Image.Resampling.LANCZOS)).reshape(height, width, channels)
        reason = f"{reason}, shrunk to a short side of {side}".removeprefix(", ")
        flags |= FLAG_SHRUNK | FLAG_REENCODED
    if max(height, width) > _LONGEST_SIDE:
        raise ValueError(f"it is {width} x {height} pixels; a store takes at most {_LONGEST_SIDE:,} each way")
    if not kept_from:
        payload = simplejpeg.encode_jpeg(colour(pixels), quality=QUALITY, colorspace="RGB", colorsubsampling="444")
        decoded = decode_jpeg(payload) if policy.pixels else None
        return StandardImage(payload, height, width, decoded, flags | FLAG_REENCODED, reason)
    flags |= FLAG_GREY * (channels == 1)
    if pixels.size <= _MOST_GROWTH * kept_from:
        payload, flags = pixels.tobytes(), flags | FLAG_PIXELS
    else:
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels).save(file, "PNG")
        payload, flags = file.getvalue(), flags | FLAG_PNG
    return StandardImage(payload, height, width, colour(pixels) if policy.pixels else None, flags, reason)


def _standard_jpeg(content: bytes, policy: ImagePolicy) -> StandardImage | str:
    """Keep a JPEG's coefficients; of one that cannot be kept, name what it is; ValueError if it has faults."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    check_aspect(height, width)
    if colours not in ("YCbCr", "RGB", *(["Gray"] if policy.lossless else [])):
        return f"{colours} JPEG"
    parts = take_apart(content)
    payload, flags, done = parts.essential, FLAG_GREY * (colours == "Gray"), []
    if len(payload) != len(content):
        flags, done = flags | FLAG_STRIPPED, ["metadata taken out"]
    if parts.orientation == 1 and not parts.progressive and not policy.pixels:
        if height * width > MAX_PIXELS:
            raise ValueError(f"it claims {width} x {height} pixels, more than {MAX_PIXELS:,}")
        if policy.decode:
            # At an eighth of its size and without colour all its data is read, in two thirds of the time.
            simplejpeg.decode_jpeg(payload, colorspace="GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
        return StandardImage(payload, height, width, None, flags, ", ".join(done) or None)
    pixels = decode_jpeg(payload)
    if parts.orientation != 1:
        turned, (turn, lossless_turn) = None, _TURNS[parts.orientation]
        if policy.transcode:
            with suppress(ValueError):  # it is not possible to the last pixel
                turned = _transcoded(payload, lossless_turn)
        if turned is None:
            image = np.asarray(Image.fromarray(pixels).transpose(turn))
            return from_pixels(image, "turned upright", FLAG_TURNED, policy)
        payload, flags, done = turned, flags | FLAG_TURNED, ["turned upright"]
        pixels = decode_jpeg(payload)
    if parts.progressive and not policy.transcode:
        flags |= FLAG_PROGRESSIVE
    elif parts.progressive:
        payload = payload if flags & FLAG_TURNED else _transcoded(payload, "NONE")
        flags, done = flags | FLAG_MADE_BASELINE, ["progressive made baseline", *done]
        if not np.array_equal(decode_jpeg(payload), pixels):
            raise ValueError("as a baseline JPEG it would have other pixels")
    height, width, _ = pixels.shape
    return StandardImage(payload, height, width, pixels, flags, ", ".join(done) or None)


def _transcoded(payload: bytes, operation: str) -> bytes:
    """Write the coefficients as a baseline JPEG; ValueError for a turn that would lose pixels at an edge."""
    try:
        result: bytes = turbojpeg.transform(
            payload, op=getattr(turbojpeg.OP, operation), perfect=True, optimize=True, copynone=True
        )
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return result


def _decode_with_pil(content: bytes) -> tuple[NDArray[np.uint8], str, bool, str]:
    """Decode any image file to upright (H, W, 1 or 3) uint8.

    Returns also its format, whether it was turned, and :func:`_beyond_eight_bits`.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it claims {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            name, loss = image.format or "unknown format", _beyond_eight_bits(image)
            upright = ImageOps.exif_transpose(image)
            turned = upright is not None and image.getexif().get(0x0112, 1) in _TURNS
            pixels = _eight_bits(upright)
            return pixels.reshape(upright.height, upright.width, -1), name, turned, loss
    except UnidentifiedImageError as error:  # whose message has an address in memory
        raise ValueError("it is not a readable image: its format is not known") from error
    except DECODER_ERRORS as error:
        raise ValueError(f"it is not a readable image: {error}") from error


def _beyond_eight_bits(image: ImageFile.ImageFile) -> str:
    """What keeps the pixels of an image that was just opened from being grey or RGB of 8 bits; empty if nothing does.

    PIL reads colour of 16 bits as its high bytes: only what its decoders are to read tells.
    """
    for codec, _, _, arguments in image.tile:
        if ";16" in str(arguments) or (codec == "ppm" and isinstance(arguments, tuple) and arguments[1] > 255):
            return "16-bit"
    return "" if image.mode in _EXACT_MODES else image.mode


def _eight_bits(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels (H, W) uint8 of a grey image, (H, W, 3) of all others; transparency is dropped."""
    if image.mode.startswith("I;16"):
        # Full scale is 65,535 whatever an image holds. Colour of 16 bits PIL itself reads as its high bytes.
        return ((np.asarray(image).astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8)
    if image.mode not in _EIGHT_BIT_MODES:
        raise ValueError(f"its pixels are of mode {image.mode!r}; convert it to 8 bits per channel first")
    if image.mode in ("1", "L", "LA"):
        return np.asarray(image.convert("L"))
    # A palette may hold transparency, which only this step keeps apart from colour.
    return np.asarray((image.convert("RGBA") if image.mode == "P" else image).convert("RGB"))
