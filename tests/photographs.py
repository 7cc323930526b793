"""Folders of real images, cut from the photographs that scikit-image and scikit-learn ship: for studies of own images.

    python -m tests.photographs FOLDER

makes three in FOLDER. A class is one photograph or texture; its images are parts of it, each turned, mirrored, scaled
and lit otherwise. Photographs are divided into upright strips, for training and test images in turn, so that no test
image shares a pixel with a training image. The same numbers are drawn every time.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import skimage
import sklearn
from PIL import Image, ImageEnhance

_SKIMAGE, _SKLEARN = Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets/images"
_STRIPS = 4  # of a photograph, for training and test images in turn
_MOST_TURN = 25  # degrees


@dataclass(frozen=True)
class Photographs:
    """What one folder is made of.

    Attributes:
        sources: photograph of each class.
        train, test: images of each class.
        parts: least and greatest side of a part, as a share of the photograph's height.
        pixels: least and greatest short side of an image.
        suffix: of the files, which decides their encoding.
        grey: whether images are.
    """

    sources: dict[str, Path]
    train: int
    test: int
    parts: tuple[float, float]
    pixels: tuple[int, int]
    suffix: str
    grey: bool = False


FOLDERS = {
    # grey textures and surfaces, small PNG
    "textures": Photographs(
        {name: _SKIMAGE / f"{name}.png" for name in ("brick", "grass", "gravel", "ihc", "moon", "coins")},
        train=80, test=40, parts=(0.15, 0.25), pixels=(60, 110), suffix=".png", grey=True,
    ),
    # colour photographs, parts of any shape
    "scenes": Photographs(
        {
            **{name: _SKIMAGE / f"{name}.png" for name in ("astronaut", "chelsea", "coffee", "motorcycle_left")},
            **{name: _SKIMAGE / f"{name}.jpg" for name in ("rocket", "retina")},
            **{name: _SKLEARN / f"{name}.jpg" for name in ("flower", "china")},
        },
        train=250, test=50, parts=(0.15, 0.35), pixels=(80, 300), suffix=".jpg",
    ),
    # few and large
    "large": Photographs(
        {
            "hubble": _SKIMAGE / "hubble_deep_field.jpg",
            "coffee": _SKIMAGE / "coffee.png",
            "china": _SKLEARN / "china.jpg",
            "flower": _SKLEARN / "flower.jpg",
            "ihc": _SKIMAGE / "ihc.png",
        },
        train=20, test=20, parts=(0.25, 0.5), pixels=(600, 2000), suffix=".jpg",
    ),
}  # fmt: skip


def make(photographs: Photographs, to: Path, *, seed: int = 0) -> None:
    """Write ``train/CLASS/`` and ``test/CLASS/`` into the folder ``to``."""
    draws = np.random.default_rng(seed)
    for name, source in photographs.sources.items():
        with Image.open(source) as opened:
            whole = opened.convert("L" if photographs.grey else "RGB")
        borders = [whole.width * index // _STRIPS for index in range(_STRIPS + 1)]
        strips = [whole.crop((left, 0, right, whole.height)) for left, right in pairwise(borders)]
        for split, of, count in (("train", strips[::2], photographs.train), ("test", strips[1::2], photographs.test)):
            folder = to / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                part = _part(of[index % len(of)], photographs, draws)
                part.save(folder / f"{index:04}{photographs.suffix}")


def _part(strip: Image.Image, photographs: Photographs, draws: np.random.Generator) -> Image.Image:
    """A part of a strip of a photograph, as an image of its own."""
    share, ratio = draws.uniform(*photographs.parts), np.exp(draws.uniform(-0.3, 0.3))
    turn = np.radians(draws.uniform(0, _MOST_TURN))
    width, tall = share * strip.height * np.sqrt(ratio), share * strip.height / np.sqrt(ratio)
    needed = np.array(  # an upright box around the turned part
        [width * np.cos(turn) + tall * np.sin(turn), width * np.sin(turn) + tall * np.cos(turn)]
    )
    shrink = min(1.0, *(np.array(strip.size) / needed))
    needed, width, tall = needed * shrink, width * shrink, tall * shrink
    left, top = draws.uniform(0, np.maximum(np.array(strip.size) - needed, 0))
    box = strip.crop((round(left), round(top), round(left + needed[0]), round(top + needed[1])))
    turned = box.rotate(np.degrees(turn) * draws.choice([-1, 1]), Image.Resampling.BICUBIC)
    x, y = (turned.width - width) / 2, (turned.height - tall) / 2
    part = turned.crop((round(x), round(y), round(x + width), round(y + tall)))
    scale = draws.uniform(*photographs.pixels) / min(part.size)
    part = part.resize((round(part.width * scale), round(part.height * scale)), Image.Resampling.BICUBIC)
    if draws.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for lit in (ImageEnhance.Brightness, ImageEnhance.Contrast):
        part = lit(part).enhance(draws.uniform(0.6, 1.4))
    return part


if __name__ == "__main__":
    for folder, photographs in FOLDERS.items():
        make(photographs, Path(sys.argv[1]) / folder)
