"""The baseline of training: images come from PyTorch's DataLoader, which reads and augments them one by one with PIL.

Network, loss, optimiser and precision are ours, so that the difference is the data path's. Two DataLoaders, one for
unlabelled images and one for supports, share as many workers as there are cores: persistent, pinned on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import default_loader

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


@dataclass(frozen=True)
class Images:
    """What a user of PyTorch holds: paths of JPEG files, or pixels in memory; and a label of each."""

    load: Callable[[int], Image.Image]
    labels: Sequence[int]


def open_images(workload: Workload) -> Images:
    """The images of a workload, without the store's reader where they are files."""
    if workload.files is not None:
        paths = jpegs(workload.files)
        names = sorted({path.parent.name for path in paths})
        return Images(lambda number: default_loader(str(paths[number])), [names.index(p.parent.name) for p in paths])
    store = ImageStore.open(workload.store)
    pixels = store.read_raw(np.arange(len(store)))

    def load(number: int) -> Image.Image:
        image = pixels[number]
        return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).convert("RGB")

    return Images(load, store.labels.tolist())


class _Views(Dataset[tuple[Views, int]]):
    """Several views of one image, and its label."""

    def __init__(self, images: Images, views: Sequence[tuple[int, Callable[[Image.Image], Tensor]]]) -> None:
        self._images, self._views = images, views

    def __len__(self) -> int:
        return len(self._images.labels)

    def __getitem__(self, number: int) -> tuple[Views, int]:
        image = self._images.load(number)
        return [view(image) for count, view in self._views for _ in range(count)], self._images.labels[number]


class _SupportSampler(Sampler[list[int]]):
    """Batches of equally many labelled images of some classes, drawn anew each time."""

    def __init__(self, by_class: Sequence[Sequence[int]], classes: int, each: int, batches: int) -> None:
        self._by_class, self._classes, self._each, self._batches = by_class, classes, each, batches

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        draw = np.random.default_rng()
        for _ in range(self._batches):
            chosen = draw.permutation(len(self._by_class))[: self._classes]
            yield [int(number) for label in chosen for number in draw.permutation(self._by_class[label])[: self._each]]


def loaders(config: Config, workload: Workload, batches: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders of unlabelled images and of supports; both give per view a tensor (B, 3, s, s), and labels (B,)."""
    images, views, support = open_images(workload), config.views, config.pretrain.support
    n, store = config.pretrain.batch_size, ImageStore.open(workload.store)
    assert config.labels.per_class is not None, "the recipes draw their labels"
    of_class = [
        np.flatnonzero(np.array(images.labels) == label).tolist()[: config.labels.per_class]
        for label in sorted(set(images.labels))
    ]
    large, small = (
        pil_view(crop, views.augment, mean=store.mean, std=store.std) for crop in (views.large, views.small)
    )
    unlabelled_views = n * (views.large.count + views.small.count)
    support_views = support.classes * support.images_per_class * views.support_views
    for_supports = max(1, round(cores() * support_views / (unlabelled_views + support_views)))
    options: dict[str, Any] = {
        "persistent_workers": True,
        "pin_memory": config.device == "cuda",
        "worker_init_fn": lambda _: torch.set_num_threads(1),
    }
    shuffled = torch.utils.data.RandomSampler(range(len(images.labels)), num_samples=n * batches)
    unlabelled = DataLoader(
        _Views(images, [(views.large.count, large), (views.small.count, small)]),
        sampler=shuffled,
        batch_size=n,
        num_workers=max(1, cores() - for_supports),
        **options,
    )
    supports = DataLoader(
        _Views(images, [(views.support_views, large)]),
        batch_sampler=_SupportSampler(of_class, support.classes, support.images_per_class, batches),
        num_workers=for_supports,
        **options,
    )
    return unlabelled, supports


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
    views, support, n = config.views, config.pretrain.support, config.pretrain.batch_size
    images = open_images(workload)
    large, small = (pil_view(crop, views.augment) for crop in (views.large, views.small))
    supports_each = support.classes * support.images_per_class * views.support_views / n

    def work() -> Round:
        done = supports = 0
        began = time.perf_counter()
        while done == 0 or time.perf_counter() - began < least_s:
            image = images.load(done % len(images.labels))
            for view, count in ((large, views.large.count), (small, views.small.count)):
                for _ in range(count):
                    view(image)
            done += 1
            while supports < round(done * supports_each):  # as many as come with so many unlabelled images
                large(images.load(supports % len(images.labels)))
                supports += 1
        return Round(done, time.perf_counter() - began)

    return work
