"""The images that benchmarks read: pieces of two real photographs, as large as ImageNet's or CIFAR's; no download."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from paws_hpc.files import atomic_write, write_json
from paws_hpc.packing import ArraySource
from paws_hpc.store.format import MANIFEST_NAME, read_manifest, shard_name
from paws_hpc.store.index import build_index, dataset_digest
from paws_hpc.store.shard import read_shard

CLASSES = 100
_SMALL_CLASSES = 10
_QUALITY = {"china.jpg": 96, "flower.jpg": 99}  # so that the pieces of either have 110 KB on average
_HEIGHTS, _WIDTHS = (330, 420), (440, 560)


def write_photographs(folder: Path, count: int) -> Path:
    """Make an image folder of ``count`` JPEGs of about 110 KB and 500 x 375 pixels in :data:`CLASSES` classes.

    Each is another piece of one of the two photographs that scikit-learn ships (640 x 427 pixels), unscaled, so that
    decoding costs what it costs for photographs. The same arguments give the same files; existing ones are kept.
    """
    photos = _open_photographs()
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


def _open_photographs() -> list[tuple[Image.Image, int]]:
    """scikit-learn's photographs, with the JPEG quality of their pieces."""
    import sklearn.datasets  # noqa: PLC0415 - takes a second, and most processes of a benchmark make no images

    photos = []
    for name, quality in _QUALITY.items():
        with Image.open(Path(sklearn.datasets.__file__).parent / "images" / name) as file:
            photos.append((file.convert("RGB"), quality))
    return photos


def small_photographs(count: int) -> ArraySource:
    """``count`` pieces of photographs of 64 to 256 pixels, reduced to 32 x 32, in ten classes."""
    photos = [photo for photo, _ in _open_photographs()]
    images = np.empty((count, 32, 32, 3), np.uint8)
    for number in range(count):
        draw = np.random.default_rng(number)
        photo, side = photos[int(draw.integers(len(photos)))], int(draw.integers(64, 257))
        top, left = int(draw.integers(photo.height - side + 1)), int(draw.integers(photo.width - side + 1))
        piece = photo.resize((32, 32), Image.Resampling.BOX, box=(left, top, left + side, top + side))
        images[number] = np.asarray(piece)
    classes = tuple(f"class{label}" for label in range(_SMALL_CLASSES))
    keys = [f"{number:06d}" for number in range(count)]
    return ArraySource("photographs", images, np.arange(count) % _SMALL_CLASSES, keys, classes)


def jpegs(folder: str | Path) -> list[Path]:
    """The files of an image folder, ordered by the number in their names."""
    return sorted(Path(folder).rglob("*.jpg"), key=lambda path: path.stem)


def read_again(paths: Iterable[str | Path]) -> None:
    """Read files into the page cache anew: how they came there makes copies faster or slower by up to a third."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(1 << 20):
                pass


def repeat_store(store: Path, target: Path, records: int) -> Path:
    """Make a store of at least ``records`` records, with an index of full size, by hard links to one shard of another.

    Keys repeat too, so nothing can be looked up by its key.
    """
    manifest = read_manifest(store)
    entry = manifest.shards[0]
    times = -(-records // entry.count)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    entries = [replace(entry, name=shard_name(number)) for number in range(times)]
    for link in entries:
        os.link(store / entry.name, target / link.name)
    index = build_index(target, lambda: [read_shard(store / entry.name).index] * times)
    whole = replace(
        manifest,
        count=len(index),
        class_counts=tuple(np.bincount(index.labels, minlength=len(manifest.classes)).tolist()),
        digest=dataset_digest(index, encoding=manifest.encoding, shape=manifest.shape, classes=manifest.classes),
        index_hash=index.hash,
        shards=tuple(entries),
    )
    write_json(target / MANIFEST_NAME, whole.to_json())
    return target
