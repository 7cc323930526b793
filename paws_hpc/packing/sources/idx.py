"""idx files, the format of the MNIST family: four magic bytes, the shape, the values; gzipped or not."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paws_hpc.packing.sources.base import ArraySource, position_keys
from paws_hpc.store.format import StoreError

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_UINT8 = 0x08
_PREFIXES = {"train": "train", "test": "t10k"}


def idx(root: Path, *, split: str, kind: str = "idx", classes: tuple[str, ...] | None = None) -> ArraySource:
    """Load ``<train|t10k>-images-idx3-ubyte[.gz]`` and its labels from ``root`` as (N, H, W, 1) uint8.

    Args:
        root: the folder with the files.
        split: ``train`` or ``test`` (the files named t10k).
        kind: name of the source in the manifest.
        classes: class names; by default the labels' numbers.

    Raises:
        StoreError: a file is missing, is not idx, or images and labels do not belong together.
    """
    images_path = _find(root, f"{_PREFIXES[split]}-images", "idx3-ubyte")
    labels_path = _find(root, f"{_PREFIXES[split]}-labels", "idx1-ubyte")
    images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
    if len(images) != len(labels):
        raise StoreError(f"{images_path} has {len(images):,} images but {labels_path} {len(labels):,} labels.")
    if not len(images):
        raise StoreError(f"{images_path} has no images.")
    names = classes or tuple(str(label) for label in range(int(labels.max()) + 1))
    if labels.max() >= len(names):
        raise StoreError(f"{labels_path} has label {labels.max()}, but there are {len(names)} class names.")
    return ArraySource(
        kind=kind,
        images=images[..., None],
        labels=labels.astype(np.int64),
        keys=position_keys(range(len(images))),
        classes=names,
        options={"split": split},
    )


def read_idx(path: Path, *, dimensions: int) -> NDArray[np.uint8]:
    """Read one idx file of unsigned bytes.

    Raises:
        StoreError: the file is not idx, has other dimensions or another length than its header says.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise StoreError(f"{path} cannot be read: {error}. Get the file again.") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, _UINT8, dimensions)):
        raise StoreError(f"{path} is not an idx file of bytes with {dimensions} dimensions. Get the file again.")
    shape = np.frombuffer(content, dtype=">u4", count=dimensions, offset=4).tolist()
    if len(content) - header != math.prod(shape):
        raise StoreError(
            f"{path} has {len(content) - header:,} values, its header says {math.prod(shape):,}. Get the file again."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _find(root: Path, stem: str, kind: str) -> Path:
    """Find a file under the names it goes by."""
    names = [f"{stem}{separator}{kind}{suffix}" for separator in "-." for suffix in ("", ".gz")]
    for name in names:
        if (root / name).is_file():
            return root / name
    raise StoreError(f"{root} has no {names[0]} (or {', '.join(names[1:])}). Point --root to their folder.")
