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

from paws_hpc.data.config import AugmentConfig, CenterCropConfig, CropConfig, ViewsConfig
from paws_hpc.data.streams import EvaluationSet, PawsStream
from paws_hpc.engine.config import OptimizerConfig, PretrainConfig, SupportConfig
from paws_hpc.engine.evaluate import Representation, forward_set, paws_nn, score
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.models.config import ModelConfig
from paws_hpc.models.encoder import build_encoder
from paws_hpc.objective.config import OBJECTIVES
from paws_hpc.packing import ArraySource, SourceConfig, open_source, pack
from paws_hpc.store import ImageStore

CPU, LABELS, EPOCHS = torch.device("cpu"), 4, 7
STILL = AugmentConfig(jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0, flip_probability=0.0)
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
    return ImageStore.open(folder)


def accuracy(objective: str, store: ImageStore, test: ImageStore, *, seed: int) -> float:
    """PAWS-NN on test digits, with four images of each digit labelled."""
    random = np.random.default_rng(seed)
    labelled = [random.permutation(np.flatnonzero(store.labels == digit))[:LABELS] for digit in range(10)]
    supports = np.concatenate(labelled)
    stream = PawsStream(
        store, supports, views=VIEWS, batch_size=64, support_classes=10, images_per_class=LABELS, seed=seed, threads=1
    )
    training = Pretraining(
        build_encoder(ModelConfig("small_resnet", channels=[16, 32, 64], projection_dim=64), seed=seed),
        objective=OBJECTIVES[objective](support_warmup_fraction=0.33),  # type: ignore[call-arg]
        optimizer=OptimizerConfig("sgd", nesterov=True, start_lr=0.01, peak_lr=0.1, final_lr=0.001, warmup_epochs=1),
        config=PretrainConfig(
            batch_size=64, epochs=EPOCHS, support=SupportConfig(10, LABELS), precision="fp32", log_every_steps=1000
        ),
        stream=stream, device=CPU,
    )  # fmt: skip
    for step in range(training.total_steps):
        training.step(stream.batch(step))
    encoder, crop = Representation(training.encoder), CenterCropConfig(resize=16, size=16)
    queries, h = (
        forward_set(encoder, EvaluationSet(images, records, crop, store), CPU)
        for images, records in ((test, np.arange(len(test))), (store, supports))
    )
    classes = torch.from_numpy(store.labels[supports])
    predictions = paws_nn(queries, h, classes, num_classes=10, temperature=0.1)
    return score(predictions, torch.tensor(test.labels)).top1


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for split in ("train", "test"):
            pack(open_source(SourceConfig(kind="digits", split=split, size=16)), Path(scratch) / split)
        digits = ImageStore.open(Path(scratch) / "train")
        images = half_blank(digits, Path(scratch) / "half-blank")
        for seed in map(int, sys.argv[2:]):
            result = accuracy(sys.argv[1], images, ImageStore.open(Path(scratch) / "test"), seed=seed)
            print(sys.argv[1], seed, f"{result:.2%}", flush=True)
