"""Image files of tests: parts of scikit-learn's photographs."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import sklearn.datasets
from numpy.typing import NDArray
from PIL import Image

from paws_hpc.packing import ArraySource

PHOTOS = [Path(sklearn.datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")]


def tile(left: int, top: int, width: int, height: int, *, photo: int = 0) -> Image.Image:
    """Cut a part out of a photograph."""
    with Image.open(PHOTOS[photo]) as whole:
        return whole.crop((left, top, left + width, top + height))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The file of an image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_tiles(root: Path, count: int, *, classes: tuple[str, ...], png: tuple[int, ...] = (), step: int = 3) -> Path:
    """A folder of ``count`` overlapping parts of photographs, 100 x 80, by class; those of ``png`` are PNG."""
    for number in range(count):
        path = root / classes[number % len(classes)] / f"{number:03d}{'.png' if number in png else '.jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        tile(step * number, 2 * number, 100, 80, photo=number % 2).save(path, quality=85)
    return root


def write_noise(root: Path, count: int, *, classes: str = "ab") -> Path:
    """A folder of ``count`` JPEG files of noise by class, all of unlike sizes from 20 to 90 pixels."""
    random = np.random.default_rng(0)
    for number in range(count):
        height, width = random.integers(20, 90, size=2)
        path = root / classes[number % len(classes)] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(path, quality=90)
    return root


def array_source(pixels: NDArray[np.uint8], classes: str = "abcd") -> ArraySource:
    """Images (n, H, W, C) whose classes take turns."""
    count = len(pixels)
    return ArraySource(
        "digits", pixels, np.arange(count) % len(classes), [f"{number:05d}" for number in range(count)], tuple(classes)
    )


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    """Write an idx file; gzipped if the name says so."""
    content = (
        struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    )
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
