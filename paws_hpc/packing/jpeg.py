"""The structure of JPEG files: segments, scans and the orientation tag, read without decoding (ITU-T T.81, annex B)."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE_FRAMES = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA
_COMMENT = 0xFE
_APPLICATION = frozenset(range(0xE0, 0xF0))
_JFIF_BYTES = 14
_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""The marker after a scan: neither a stuffed byte, a restart, nor fill."""
_ORIENTATION = 0x0112
_SHORT = 3
MOST_SCANS = 500
"""Real progressive files have about ten."""
_MOST_ENTRIES = 4096


class TooManyScansError(ValueError):
    """A small file that takes very long to decode."""


@dataclass(frozen=True)
class JpegParts:
    """A JPEG file taken apart."""

    essential: bytes
    """The file without metadata, previews and whatever follows the image; its pixels are the same."""
    progressive: bool
    orientation: int
    """The orientation tag 1 to 8; 1 where there is none."""


def take_apart(content: bytes) -> JpegParts:
    """Walk the segments of a JPEG file up to the end of its image.

    What decoders need stays: tables, frame and scans, JFIF (without a thumbnail) and Adobe's segment, which say how
    colours are coded. All other application segments and comments go, colour profiles too, which no trainer applies.

    Raises:
        TooManyScansError: no decoder should be given this file.
        ValueError: the file does not have the structure of a JPEG file.
    """
    kept, place, scans, progressive, orientation = [b"\xff\xd8"], 2, 0, None, None
    while True:
        marker, place = _marker(content, place)
        if marker == _END_OF_IMAGE:
            break
        length = int.from_bytes(content[place : place + 2], "big")
        body, place = content[place + 2 : place + length], place + length
        if length < 2 or place > len(content):
            raise ValueError(f"a JPEG segment of {length} bytes leads beyond the file")
        if marker in _START_OF_FRAME:
            progressive = marker in _PROGRESSIVE_FRAMES
        elif marker in _APPLICATION or marker == _COMMENT:
            if marker == 0xE1 and orientation is None and body.startswith(b"Exif\0\0"):
                orientation = exif_orientation(body[6:])
            body = _kept_application_data(marker, body)
            if not body:
                continue
        kept.append(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body)
        if marker == _START_OF_SCAN:
            scans += 1
            if scans > MOST_SCANS:
                raise TooManyScansError(f"it has more than {MOST_SCANS} scans: it was made to keep a decoder busy")
            end = _SCAN_END.search(content, place)
            if end is None:
                raise ValueError("the JPEG file ends within a scan")
            kept.append(content[place : end.start()])
            place = end.start()
    if progressive is None:
        raise ValueError("JPEG without a frame")
    return JpegParts(b"".join((*kept, b"\xff\xd9")), progressive, orientation or 1)


def _marker(content: bytes, place: int) -> tuple[int, int]:
    """The marker at ``place``, after any fill bytes, and the place behind it."""
    while content[place : place + 2] == b"\xff\xff":
        place += 1
    if len(content) < place + 2 or content[place] != 0xFF or content[place + 1] in (0, _START_OF_IMAGE):
        raise ValueError(f"JPEG marker expected at byte {place}")
    return content[place + 1], place + 2


def _kept_application_data(marker: int, body: bytes) -> bytes:
    """What decoders need of an application segment; empty if nothing."""
    if marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= _JFIF_BYTES:
        return body[: _JFIF_BYTES - 2] + b"\0\0"  # a thumbnail of no size
    return body if marker == 0xEE and body.startswith(b"Adobe") else b""


def exif_orientation(exif: bytes) -> int:
    """The orientation tag of Exif data, a TIFF header with its first directory; 1 if there is none or it is damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return 1
    (start,) = struct.unpack(f"{order}I", exif[4:8])
    count = struct.unpack(f"{order}H", exif[start : start + 2])[0] if start + 2 <= len(exif) else 0
    for entry in range(min(count, _MOST_ENTRIES)):
        place = start + 2 + 12 * entry
        if place + 12 > len(exif):
            break
        tag, kind, values = struct.unpack(f"{order}HHI", exif[place : place + 8])
        if tag == _ORIENTATION:
            (value,) = struct.unpack(f"{order}H", exif[place + 8 : place + 10])
            return int(value) if (kind, values) == (_SHORT, 1) and 1 <= value <= 8 else 1
    return 1
