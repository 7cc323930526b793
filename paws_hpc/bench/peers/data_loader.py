"""The baseline of training: images come from PyTorch's DataLoader, which reads and augments them one by one with PIL.

Network, loss, optimiser and precision are ours, so that the difference is the data path's. Two DataLoaders, one for
unlabelled images and one for supports, share as many workers as there are cores: persistent, pinned on a GPU.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from paws_hpc.bench.images import jpegs
from paws_hpc.bench.peers.pil import pil_view
from paws_hpc.bench.rounds import Round
from paws_hpc.bench.step_parts import synchronise
from paws_hpc.bench.training import TimedWork
from paws_hpc.bench.workloads import Workload, cores, use_threads
from paws_hpc.config import Config
from paws_hpc.engine.optimizer import build_optimizer
from paws_hpc.engine.parallel import move
from paws_hpc.models.encoder import build_encoder
from paws_hpc.objective.base import Objective
from paws_hpc.store import ImageStore

Views = list[Tensor]


class Images(ABC):
    """What a user of PyTorch holds: paths of JPEG files, or pixels in memory; and ``labels``."""

    labels: list[int]

    @abstractmethod
    def load(self, number: int) -> Image.Image:
        """One image, RGB."""


class _Files(Images):
    def __init__(self, folder: Path) -> None:
        self._paths = jpegs(folder)
        names = sorted({path.parent.name for path in self._paths})
        self.labels = [names.index(path.parent.name) for path in self._paths]

    def load(self, number: int) -> Image.Image:
        return Image.open(self._paths[number]).convert("RGB")


class _Pixels(Images):
    def __init__(self, store: ImageStore) -> None:
        self._pixels, self.labels = store.read_raw(np.arange(len(store))), store.labels.tolist()

    def load(self, number: int) -> Image.Image:
        return Image.fromarray(self._pixels[number].squeeze()).convert("RGB")


def open_images(workload: Workload) -> Images:
    """The images of a workload, without the store's reader where they are files."""
    return _Pixels(ImageStore.open(workload.store)) if workload.files is None else _Files(workload.files)


class _Views(Dataset[tuple[Views, int]]):
    """Several views of one image, and its label."""

    def __init__(self, images: Images, views: Sequence[tuple[int, Callable[[Image.Image], Tensor]]]) -> None:
        self._images, self._views = images, views

    def __len__(self) -> int:
        return len(self._images.labels)

    def __getitem__(self, number: int) -> tuple[Views, int]:
        image = self._images.load(number)
        return [view(image) for count, view in self._views for _ in range(count)], self._images.labels[number]


def _views(workload: Workload, config: Config) -> tuple[_Views, _Views, int]:
    """Views of every unlabelled image and of every support, and how many supports come with a step."""
    images, views, store = open_images(workload), config.views, ImageStore.open(workload.store)
    large, small = (
        pil_view(crop, views.augment, mean=store.mean, std=store.std) for crop in (views.large, views.small)
    )
    unlabelled = _Views(images, [(views.large.count, large), (views.small.count, small)])
    support = config.pretrain.support
    return unlabelled, _Views(images, [(views.support_views, large)]), support.classes * support.images_per_class


def loaders(config: Config, workload: Workload, batches: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders of unlabelled images and of supports; both give per view a tensor (B, 3, s, s), and labels (B,)."""
    unlabelled, supports, supports_per_step = _views(workload, config)
    views, support, n = config.views, config.pretrain.support, config.pretrain.batch_size
    labels, draw = np.array(open_images(workload).labels), np.random.default_rng()
    by_class = [np.flatnonzero(labels == label)[: config.labels.per_class] for label in np.unique(labels)]
    drawn = [
        [
            int(number)
            for chosen in draw.permutation(len(by_class))[: support.classes]
            for number in draw.permutation(by_class[chosen])[: support.images_per_class]
        ]
        for _ in range(batches)
    ]
    unlabelled_views = n * (views.large.count + views.small.count)
    support_views = supports_per_step * views.support_views
    for_supports = max(1, round(cores() * support_views / (unlabelled_views + support_views)))
    options: dict[str, Any] = {
        "persistent_workers": True,
        "pin_memory": config.device == "cuda",
        "worker_init_fn": lambda _: torch.set_num_threads(1),
        "multiprocessing_context": "fork",  # as users have it on Linux; a candidate's own default is to spawn
    }
    shuffled = RandomSampler(unlabelled, num_samples=n * batches)
    for_unlabelled = max(1, cores() - for_supports)
    return (
        DataLoader(unlabelled, sampler=shuffled, batch_size=n, num_workers=for_unlabelled, **options),
        DataLoader(supports, batch_sampler=drawn, num_workers=for_supports, **options),
    )


def training_steps(workload: Workload, steps: int) -> TimedWork:
    """Training end to end; as many steps as fill the loaders come first and do not count."""
    config = workload.config()
    use_threads(config)
    device = torch.device(config.device)
    model = move(build_encoder(config.model, seed=config.seed), device, torch.float32)
    optimizer = build_optimizer(model, config.optimizer)
    warm = 2 * cores()  # of each loader: two batches per worker are made ahead
    objective = config.objective.build(num_classes=config.pretrain.support.classes, total_steps=warm + steps)
    unlabelled, supports = loaders(config, workload, warm + steps)

    def work() -> Round:
        began = 0.0
        for number, (images, labelled) in enumerate(zip(unlabelled, supports, strict=True)):
            if number == warm:
                synchronise(device.type == "cuda")
                began = time.perf_counter()
            optimizer.zero_grad()
            loss(model, objective, images[0], labelled, step=number).backward()
            optimizer.step()
        synchronise(device.type == "cuda")
        return Round(steps * config.pretrain.batch_size, time.perf_counter() - began)

    return work


@dataclass(frozen=True)
class _LoadedStep:
    """What an objective reads of a batch (:class:`paws_hpc.objective.base.Step`)."""

    step: int
    records: Sized
    num_support_rows: int
    support_classes: Tensor
    known: Tensor
    known_classes: Tensor


def loss(model: nn.Module, objective: Objective, views: Views, labelled: tuple[Views, Tensor], *, step: int) -> Tensor:
    """The objective's total for views of n unlabelled images, and views and labels of the supports."""
    device = next(model.parameters()).device
    rows, labels = labelled
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        h, z = model([view.to(device, non_blocking=True) for view in (*rows, *views)])
    n = len(views[0])
    classes = torch.unique(labels, return_inverse=True)[1].repeat(len(rows))
    unknown = torch.zeros(n, dtype=torch.int64)
    batch = _LoadedStep(step, range(n), len(classes), classes, unknown.bool(), unknown)
    total, _ = objective(batch, h, z, diagnosed=False)
    return total


def augmentation_per_image(workload: Workload, least_s: float) -> TimedWork:
    """PIL and torchvision, image by image on one core, decoding and crops included, for at least ``least_s``."""
    config = workload.config()
    torch.set_num_threads(1)
    unlabelled, supports, supports_per_step = _views(workload, config)

    def work() -> Round:
        done = of_supports = 0
        began = time.perf_counter()
        while done == 0 or time.perf_counter() - began < least_s:
            unlabelled[done % len(unlabelled)]
            done += 1
            while of_supports < done * supports_per_step // config.pretrain.batch_size:
                supports[of_supports % len(supports)]
                of_supports += 1
        return Round(done, time.perf_counter() - began)

    return work
