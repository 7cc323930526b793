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

from paws_hpc.data.config import AugmentConfig, CenterCropConfig, CropConfig, ViewsConfig
from paws_hpc.data.streams import EvaluationSet, PawsStream
from paws_hpc.engine.config import OptimizerConfig, PretrainConfig, SupportConfig
from paws_hpc.engine.evaluate import Representation, forward_set, paws_nn, score
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.models.config import ModelConfig
from paws_hpc.models.encoder import build_encoder
from paws_hpc.objective.config import OBJECTIVES
from paws_hpc.packing import ArraySource, pack
from paws_hpc.store import ImageStore

CPU, LABELS, BATCH, SIDE, GRID = torch.device("cpu"), 4, 64, 32, 6
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
    return ImageStore.open(folder)


def accuracies(colours: dict[str, float], stores: dict[str, ImageStore], *, epochs: int, seed: int) -> list[float]:
    """PAWS-NN on validation and test patches, with four labelled patches of each photograph."""
    train, random = stores["train"], np.random.default_rng(seed)
    classes = len(train.classes)
    supports = np.concatenate(
        [random.permutation(np.flatnonzero(train.labels == label))[:LABELS] for label in range(classes)]
    )
    views = ViewsConfig(
        large=CropConfig(size=SIDE, count=2, scale=[0.75, 1.0]), small=CropConfig(size=18, count=2, scale=[0.3, 0.75]),
        support_views=2,
        augment=AugmentConfig(
            brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur_probability=0.0, **colours  # type: ignore[arg-type]
        ),
    )  # fmt: skip
    stream = PawsStream(
        train, supports, views=views, batch_size=BATCH, support_classes=classes, images_per_class=LABELS, seed=seed,
        threads=1,
    )  # fmt: skip
    training = Pretraining(
        build_encoder(ModelConfig("small_resnet", channels=[16, 32, 64], projection_dim=64), seed=seed),
        objective=OBJECTIVES["paws"](support_warmup_fraction=0.33),  # type: ignore[call-arg]
        optimizer=OptimizerConfig("sgd", nesterov=True, start_lr=0.01, peak_lr=0.1, final_lr=0.001, warmup_epochs=1),
        config=PretrainConfig(
            batch_size=BATCH, epochs=epochs, support=SupportConfig(classes, LABELS), precision="fp32",
            log_every_steps=1000,
        ),
        stream=stream, device=CPU,
    )  # fmt: skip
    for step in range(training.total_steps):
        training.step(stream.batch(step))
    encoder, crop = Representation(training.encoder), CenterCropConfig(resize=SIDE, size=SIDE)

    def representations(store: ImageStore, records: NDArray[np.int64]) -> torch.Tensor:
        return forward_set(encoder, EvaluationSet(store, records, crop, train), CPU)

    h, labels = representations(train, supports), torch.from_numpy(train.labels[supports])
    results = []
    for store in (stores["validation"], stores["test"]):
        queries = representations(store, np.arange(len(store)))
        predictions = paws_nn(queries, h, labels, num_classes=classes, temperature=0.1)
        results.append(score(predictions, torch.tensor(store.labels)).top1)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        stores = {split: photographs(Path(scratch) / split, split) for split in TILES}
        for seed in map(int, sys.argv[2:]):
            for name, colours in COLOURS.items():
                started = time.monotonic()
                validation, test = accuracies(colours, stores, epochs=int(sys.argv[1]), seed=seed)
                seconds = time.monotonic() - started
                print(
                    f"{name}, seed {seed}: validation {validation:.1%}, test {test:.1%} ({seconds:.0f} s)", flush=True
                )
