"""The recipes whose training is measured: experiments of ``conf/`` at the sizes of one GPU, and images for them.

A recipe's config is composed as a launch composes it, so that what is measured is what would train.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from paws_hpc.bench.photographs import open_photographs, write_photographs
from paws_hpc.cluster.compose import compose_run
from paws_hpc.config import Config
from paws_hpc.data.multicrop import Crops, CutCrops
from paws_hpc.data.streams import MicroBatch, PawsBatch, PawsStream
from paws_hpc.packing import ArraySource, ImageFolder, PackOptions, Source, SourceConfig, open_source, pack
from paws_hpc.stages.pretrain import open_stream
from paws_hpc.stages.run_data import open_data, stream_options

_DIGITS = 1397  # training images that scikit-learn's digits leave
_SMALL_CLASSES = 10
_FOLDER = "images"
_GPU_STEPS = 50


@dataclass(frozen=True)
class Recipe:
    """One experiment at the sizes of one GPU of the paper, or smaller, for a CPU.

    Attributes:
        experiment: of ``conf/experiment``.
        sizes: overrides of it that make the sizes of one GPU.
        images: to make for these sizes.
        cpu_sizes: overrides on top of ``sizes`` where there is no GPU, so that a step takes seconds.
        cpu_images: to make for those.
        cpu_steps: that take a few seconds there.
    """

    experiment: str
    sizes: tuple[str, ...]
    images: int
    cpu_sizes: tuple[str, ...]
    cpu_images: int
    cpu_steps: int


_DRAWN_LABELS = ("labels.file=null", "labels.validation_file=null", "labels.validation_per_class=1")
RECIPES = {
    "imagenet": Recipe(
        "imagenet_10pct",
        ("pretrain.batch_size=64", "pretrain.support.classes=15", *_DRAWN_LABELS, "labels.per_class=12"),
        2400,
        ("pretrain.batch_size=2", "pretrain.support={classes: 2, images_per_class: 2}", "labels.per_class=2"),
        300,
        1,
    ),
    "cifar": Recipe(
        "cifar10_4000",
        (),
        10_000,
        (
            "pretrain.batch_size=4",
            "pretrain.support.images_per_class=2",
            "labels={per_class: 8, validation_per_class: 1}",
        ),
        640,
        2,
    ),
    "digits": Recipe("digits", (), _DIGITS, (), _DIGITS, 10),
}


@dataclass(frozen=True)
class Scene:
    """What a contender needs to set up training, as plain values that JSON can hold.

    Attributes:
        recipe: name of one of :data:`RECIPES`.
        device: ``cpu`` or ``cuda``.
        folder: of the images and the store, which :func:`make_images` has made.
        overrides: of the config, on top of the recipe's.
    """

    recipe: str
    device: str
    folder: str
    overrides: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """That the recipe wants on this device."""
        recipe = RECIPES[self.recipe]
        return recipe.images if self.device == "cuda" else recipe.cpu_images

    @property
    def steps(self) -> int:
        """That make one round."""
        return _GPU_STEPS if self.device == "cuda" else RECIPES[self.recipe].cpu_steps

    @property
    def store(self) -> Path:
        """Of the images, packed."""
        return Path(self.folder) / "store"

    @property
    def files(self) -> Path | None:
        """The images as JPEG files in a folder per class; None for those that people hold as an array."""
        folder = Path(self.folder) / _FOLDER
        return folder if self.recipe == "imagenet" else None

    def config(self) -> Config:
        """Composed from ``conf/``.

        Raises:
            ConfigError: the overrides do not compose.
        """
        recipe = RECIPES[self.recipe]
        own = [f"experiment={recipe.experiment}", *recipe.sizes, f"data.train={self.store}", "data.source=null"]
        own += [f"data.threads={cores()}"] if self.device == "cuda" else recipe.cpu_sizes
        config, _ = compose_run([*own, "tracking.wandb=disabled", f"device={self.device}", *self.overrides])
        return config


def as_published(scene: Scene) -> Config:
    """The recipe's experiment as it stands in ``conf/``, at its global sizes."""
    config, _ = compose_run([f"experiment={RECIPES[scene.recipe].experiment}"])
    return config


def make_images(scene: Scene) -> None:
    """Make and pack the images of a scene; what is there already stays.

    ImageNet: pieces of photographs as JPEG files. CIFAR: smaller pieces, reduced to 32 pixels. Digits: themselves.
    """
    options = PackOptions(check="decode")
    if scene.files is not None:
        write_photographs(scene.files, scene.images)
        pack(ImageFolder(scene.files), scene.store, options=options)
        return
    source: Source = (
        small_photographs(scene.images)
        if scene.recipe == "cifar"
        else open_source(SourceConfig(kind="digits", split="train"))
    )
    pack(source, scene.store, options=options)


def small_photographs(count: int) -> ArraySource:
    """``count`` pieces of photographs of 64 to 256 pixels, reduced to 32 x 32, in ten classes."""
    photos = [photo for photo, _ in open_photographs()]
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


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def use_threads(config: Config) -> int:
    """Let torch use as many threads as pre-training would on the cores that this process may use; returns them."""
    threads = config.resources["pretrain"].threads_per_rank or cores()
    torch.set_num_threads(threads)
    return threads


@contextmanager
def opened_stream(config: Config) -> Iterator[PawsStream]:
    """The stream of a config, as pre-training opens it."""
    data = open_data(config)
    with data.caching() as cached:
        yield open_stream(config, cached, stream_options(config, data, torch.device(config.device)))


def on_device(batch: PawsBatch, device: torch.device) -> PawsBatch:
    """The batch with its crops, uint8, on the device."""

    def moved(crops: Crops) -> Crops:
        return CutCrops(crops.on(device), crops.parameters)

    moved_batches = tuple(MicroBatch(*map(moved, each.crop_groups)) for each in batch.micro_batches)
    return replace(batch, micro_batches=moved_batches)


def describe_sizes(config: Config) -> dict[str, object]:
    """Images per step, as a table tells them."""
    views, support = config.views, config.pretrain.support
    return {
        "unlabelled per step": config.pretrain.batch_size,
        "support rows per step": support.classes * support.images_per_class * views.support_views,
        "crops": f"{views.large.count} x {views.large.size} + {views.small.count} x {views.small.size}",
        "network": config.model.name,
    }
