"""PAWS-NN on digits with as many nearly blank unlabelled images: the first open-set table of docs/results.md.

python -m tests.numerics.half_blank OBJECTIVE SEED [SEED ...]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from paws_hpc.data.config import CropConfig, ViewsConfig
from paws_hpc.packing import ArraySource, SourceConfig, open_source, pack
from paws_hpc.store import ImageStore
from tests.numerics.study import accuracies
from tests.tiny import STILL

VIEWS = ViewsConfig(
    large=CropConfig(size=16, count=2, scale=[0.6, 1.0]), small=CropConfig(size=8, count=2, scale=[0.3, 0.6]),
    support_views=2, augment=STILL,
)  # fmt: skip


def nearly_blank(count: int, size: int) -> NDArray[np.uint8]:
    """(count, size, size, 1) uint8, the smoothest pieces of scikit-learn's two photographs: sky, blurred leaves."""
    random, pieces = np.random.default_rng(0), []
    photographs = [np.asarray(Image.fromarray(photograph).convert("L")) for photograph in load_sample_images().images]
    for number in range(15 * count):
        photograph, side = photographs[number % 2], random.integers(24, 80)
        top, left = (random.integers(length - side) for length in photograph.shape)
        pieces.append(photograph[top : top + side, left : left + side])
    pieces = sorted(pieces, key=np.std)[:count]
    small = [Image.fromarray(piece).resize((size, size), Image.Resampling.BILINEAR) for piece in pieces]
    return np.stack([np.asarray(image) for image in small])[..., None]


def half_blank(digits: ImageStore, folder: Path) -> ImageStore:
    """The training digits, and as many nearly blank images, of a class that nobody labels."""
    blanks = nearly_blank(len(digits), 16)
    pixels = np.concatenate([digits.read_raw(np.arange(len(digits))), blanks])
    labels = np.append(digits.labels, np.full(len(blanks), 10))
    keys = [*digits.keys, *(f"blank{number}" for number in range(len(blanks)))]
    pack(ArraySource("half blank", pixels, labels, keys, (*digits.classes, "blank")), folder)
    return ImageStore(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for split in ("train", "test"):
            pack(open_source(SourceConfig(kind="digits", split=split, size=16)), Path(scratch) / split)
        digits = ImageStore(Path(scratch) / "train")
        images = half_blank(digits, Path(scratch) / "half-blank")
        for seed in map(int, sys.argv[2:]):
            (result,) = accuracies(
                images, [ImageStore(Path(scratch) / "test")], objective=sys.argv[1], views=VIEWS, classes=10,
                batch_size=64, epochs=7, seed=seed,
            )  # fmt: skip
            print(sys.argv[1], seed, f"{result:.2%}", flush=True)
