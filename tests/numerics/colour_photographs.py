"""PAWS-NN on patches of colour photographs, with grey images or solarized and equalized ones (docs/results.md).

pip install scikit-image
python -m tests.numerics.colour_photographs EPOCHS SEED [SEED ...]
"""

from __future__ import annotations

import sys
import tempfile
import time
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from paws_hpc.data.config import AugmentConfig, CropConfig, ViewsConfig
from paws_hpc.packing import ArraySource, pack
from paws_hpc.store import ImageStore
from tests.numerics.study import accuracies

BATCH, SIDE, GRID = 64, 32, 6
PHOTOGRAPHS = {
    "skimage.data": "astronaut.png chelsea.png coffee.png hubble_deep_field.jpg ihc.png motorcycle_left.png retina.jpg "
    "rocket.jpg",
    "sklearn.datasets.images": "china.jpg flower.jpg",
}
TILES = {"train": range(22), "validation": range(22, 29), "test": range(29, 36)}  # of the 36, shuffled
PATCHES = {"train": 200, "validation": 100, "test": 100}  # of each photograph
COLOURS = {
    "grey": {"grayscale_probability": 0.2},
    "solarize, equalize": {
        "grayscale_probability": 0.0, "solarize_probability": 0.2, "equalize_probability": 0.2
    },
}  # fmt: skip


def patches(photograph: Image.Image, split: str) -> NDArray[np.uint8]:
    """(n, 32, 32, 3) uint8: squares of 32 to 56 pixels from the split's tiles, each within one tile, made 32 wide."""
    pixels, pieces = np.asarray(photograph.convert("RGB")), []
    if min(pixels.shape[:2]) < GRID * 64:  # small photographs are enlarged: a tile holds the largest square
        scale = GRID * 64 / min(pixels.shape[:2])
        pixels = np.asarray(Image.fromarray(pixels).resize((int(pixels.shape[1] * scale), GRID * 64)))
    height, width = (length // GRID for length in pixels.shape[:2])
    tiles = np.random.default_rng(0).permutation(GRID * GRID)[list(TILES[split])]
    random = np.random.default_rng(list(TILES).index(split))
    for tile in random.choice(tiles, PATCHES[split]):
        side = int(random.integers(32, 57))
        top = tile // GRID * height + random.integers(height - side + 1)
        left = tile % GRID * width + random.integers(width - side + 1)
        piece = Image.fromarray(pixels[top : top + side, left : left + side])
        pieces.append(np.asarray(piece.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
    return np.stack(pieces)


def photographs(folder: Path, split: str) -> ImageStore:
    """A store of patches, each photograph a class."""
    images, names = [], []
    for package, listed in PHOTOGRAPHS.items():
        for name in listed.split():
            with as_file(files(package) / name) as path:
                images.append(patches(Image.open(path), split))
            names.append(name.partition(".")[0])
    labels = np.repeat(np.arange(len(names)), PATCHES[split])
    keys = [f"{number:05}" for number in range(len(labels))]
    pack(ArraySource("photographs", np.concatenate(images), labels, keys, tuple(names)), folder)
    return ImageStore(folder)


def views_with(colours: dict[str, float]) -> ViewsConfig:
    return ViewsConfig(
        large=CropConfig(size=SIDE, count=2, scale=[0.75, 1.0]), small=CropConfig(size=18, count=2, scale=[0.3, 0.75]),
        support_views=2,
        augment=AugmentConfig(
            brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur_probability=0.0, **colours  # type: ignore[arg-type]
        ),
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        stores = {split: photographs(Path(scratch) / split, split) for split in TILES}
        for seed in map(int, sys.argv[2:]):
            for name, colours in COLOURS.items():
                started = time.monotonic()
                validation, test = accuracies(
                    stores["train"], [stores["validation"], stores["test"]], views=views_with(colours),
                    classes=len(stores["train"].classes), batch_size=BATCH, epochs=int(sys.argv[1]), seed=seed,
                )  # fmt: skip
                seconds = time.monotonic() - started
                print(
                    f"{name}, seed {seed}: validation {validation:.1%}, test {test:.1%} ({seconds:.0f} s)", flush=True
                )
