"""The images that benchmarks read: pieces of two real photographs, as many and as large as ImageNet's are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from paws_hpc.files import atomic_write

CLASSES = 100
_SOURCES = ("china.jpg", "flower.jpg")
_QUALITY = {"china.jpg": 96, "flower.jpg": 99}  # so that the files of either have 110 KB on average
_HEIGHTS, _WIDTHS = (330, 420), (440, 560)


def write_photographs(folder: Path, count: int) -> Path:
    """Make an image folder of ``count`` JPEGs of about 110 KB and 500 x 375 pixels in :data:`CLASSES` classes.

    Each is another piece of one of the two photographs that scikit-learn ships (640 x 427 pixels), unscaled, so that
    decoding costs what it costs for photographs. The same arguments give the same files; existing ones are kept.
    """
    photos = open_photographs()
    for number in range(count):
        path = folder / f"class{number % CLASSES:03d}" / f"{number:06d}.jpg"
        if path.exists():
            continue
        draw = np.random.default_rng(number)
        photo, quality = photos[int(draw.integers(len(photos)))]
        height, width = int(draw.integers(*_HEIGHTS)), int(draw.integers(*_WIDTHS))
        top, left = int(draw.integers(photo.height - height + 1)), int(draw.integers(photo.width - width + 1))
        piece = photo.crop((left, top, left + width, top + height))
        if draw.random() < 0.5:
            piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        with atomic_write(path) as file:
            piece.save(file, "JPEG", quality=quality)
    return folder


def open_photographs() -> list[tuple[Image.Image, int]]:
    """scikit-learn's photographs, with the JPEG quality at which pieces of them are as large as ImageNet's files."""
    import sklearn.datasets  # noqa: PLC0415 - takes a second, and most processes of a benchmark make no images

    photos = []
    for name in _SOURCES:
        with Image.open(Path(sklearn.datasets.__file__).parent / "images" / name) as file:
            photos.append((file.convert("RGB"), _QUALITY[name]))
    return photos


def jpegs(folder: str) -> list[Path]:
    """The files of the image folder; the place of each is the number in its name."""
    return sorted(Path(folder).rglob("*.jpg"), key=lambda path: path.stem)
