"""The recipes whose training is measured: experiments of ``conf/`` at the sizes of one GPU, and images for them.

A recipe's config is composed as a launch composes it, so that what is measured is what would train.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from paws_hpc.bench.images import small_photographs, write_photographs
from paws_hpc.cluster.compose import compose_run
from paws_hpc.config import Config
from paws_hpc.data.multicrop import Crops, CutCrops
from paws_hpc.data.streams import MicroBatch, PawsBatch, PawsStream
from paws_hpc.engine.determinism import set_determinism
from paws_hpc.packing import ImageFolder, Source, SourceConfig, open_source, pack
from paws_hpc.stages.pretrain import open_stream
from paws_hpc.stages.run_data import open_data

_DIGITS = 1397  # training images that scikit-learn's digits leave
_GPU_STEPS = 50


@dataclass(frozen=True)
class Recipe:
    """An experiment of ``conf/experiment``; the overrides ``sizes`` make the sizes of one GPU of the paper.

    On a CPU, fewer images are made, a round has few steps, and ``cpu_sizes`` make a step that takes seconds.
    """

    experiment: str
    images: int
    cpu_images: int
    cpu_steps: int
    sizes: tuple[str, ...] = ()
    cpu_sizes: tuple[str, ...] = ()


_DRAWN_LABELS = ("labels.file=null", "labels.validation_file=null", "labels.validation_per_class=1")
RECIPES = {
    "imagenet": Recipe(
        "imagenet_10pct",
        images=2400,
        cpu_images=300,
        cpu_steps=1,
        sizes=("pretrain.batch_size=64", "pretrain.support.classes=15", *_DRAWN_LABELS, "labels.per_class=12"),
        cpu_sizes=("pretrain.batch_size=2", "pretrain.support={classes: 2, images_per_class: 2}", "labels.per_class=2"),
    ),
    "cifar": Recipe(
        "cifar10_4000",
        images=10_000,
        cpu_images=640,
        cpu_steps=2,
        cpu_sizes=(
            "pretrain.batch_size=4",
            "pretrain.support.images_per_class=2",
            "labels={per_class: 8, validation_per_class: 1}",
        ),
    ),
    "digits": Recipe("digits", images=_DIGITS, cpu_images=_DIGITS, cpu_steps=10),
}


@dataclass(frozen=True)
class Workload:
    """One of :data:`RECIPES` on ``cpu`` or ``cuda``, with overrides; :func:`make_images` fills ``folder``."""

    recipe: str
    device: str
    folder: Path
    overrides: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """How many the recipe needs on this device."""
        recipe = RECIPES[self.recipe]
        return recipe.images if self.device == "cuda" else recipe.cpu_images

    @property
    def steps(self) -> int:
        """How many make one round."""
        return _GPU_STEPS if self.device == "cuda" else RECIPES[self.recipe].cpu_steps

    @property
    def store(self) -> Path:
        """Of the images, packed."""
        return self.folder / "store"

    @property
    def files(self) -> Path | None:
        """The images as JPEG files in a folder per class; None for those that people hold as an array."""
        return self.folder / "images" if self.recipe == "imagenet" else None

    def config(self) -> Config:
        """Composed from ``conf/``; raises ConfigError where the overrides do not compose."""
        recipe = RECIPES[self.recipe]
        own = [f"experiment={recipe.experiment}", *recipe.sizes, f"data.train={self.store}", "data.source=null"]
        own += [f"data.threads={cores()}"] if self.device == "cuda" else recipe.cpu_sizes
        config, _ = compose_run([*own, "tracking.wandb=disabled", f"device={self.device}", *self.overrides])
        return config


def make_images(workload: Workload) -> None:
    """Make and pack the images of a workload; existing ones stay."""
    if workload.files is not None:
        source: Source = ImageFolder(write_photographs(workload.files, workload.images))
    elif workload.recipe == "cifar":
        source = small_photographs(workload.images)
    else:
        source = open_source(SourceConfig(kind="digits", split="train"))
    pack(source, workload.store)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def use_threads(config: Config) -> None:
    """Let torch use as many threads as pre-training would on the cores of this process, and its determinism."""
    set_determinism(config.deterministic)
    torch.set_num_threads(config.resources["pretrain"].threads_per_rank or cores())


@contextmanager
def opened_stream(config: Config) -> Iterator[PawsStream]:
    """The stream of a config, and torch's threads, as pre-training has them."""
    use_threads(config)
    data = open_data(config)
    with data.caching() as cached:
        yield open_stream(cached, torch.device(config.device))


def on_device(batch: PawsBatch, device: torch.device) -> PawsBatch:
    """The batch with its crops, uint8, on the device."""

    def moved(crops: Crops) -> Crops:
        return CutCrops(crops.on(device), crops.parameters)

    micro_batches = tuple(MicroBatch(*map(moved, each.crop_groups)) for each in batch.micro_batches)
    return replace(batch, micro_batches=micro_batches)


def rows_by_crop_group(config: Config) -> list[tuple[int, int]]:
    """(rows, pixels of a side) of one step: supports, large crops and, if there are any, small ones."""
    views, support, n = config.views, config.pretrain.support, config.pretrain.batch_size
    groups = [
        (support.classes * support.images_per_class * views.support_views, views.large.size),
        (n * views.large.count, views.large.size),
        (n * views.small.count, views.small.size),
    ]
    return [(rows, size) for rows, size in groups if rows]


def plain_images(config: Config) -> float:
    """How many images of 224 pixels cost as much as an unlabelled image of a step, its share of the supports included.

    The cost of a ResNet-50 is proportional to the pixels; 4.74 for the paper's ImageNet recipe.
    """
    return sum(rows * (side / 224) ** 2 for rows, side in rows_by_crop_group(config)) / config.pretrain.batch_size


def describe_sizes(config: Config) -> dict[str, object]:
    """Images per step and the network, by name."""
    views = config.views
    return {
        "unlabelled per step": config.pretrain.batch_size,
        "support rows per step": rows_by_crop_group(config)[0][0],
        "crops": f"{views.large.count} x {views.large.size} + {views.small.count} x {views.small.size}",
        "network": config.model.name,
    }
