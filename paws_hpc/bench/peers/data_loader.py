"""The baseline of training: images come from PyTorch's DataLoader, which reads and augments them one by one with PIL.

Network, loss, optimiser and precision are ours, so that the difference is the data path's. Two DataLoaders, one for
unlabelled images and one for supports, share as many workers as there are cores: persistent, pinned on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.datasets import ImageFolder

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


def open_images(workload: Workload) -> tuple[Sequence[tuple[Image.Image, int]], list[int]]:
    """Images with labels, and all labels: JPEG files, or pixels in memory, as a user of PyTorch holds them."""
    if workload.files is not None:
        files: Any = ImageFolder(str(workload.files))
        return files, files.targets
    store = ImageStore(workload.store)
    pixels, labels = store.read_raw(np.arange(len(store))), store.labels.tolist()
    images = [Image.fromarray(image.squeeze()).convert("RGB") for image in pixels]
    return list(zip(images, labels, strict=True)), labels


class _Views(Dataset[tuple[Views, int]]):
    """Several views of each image, and its label."""

    def __init__(
        self,
        images: Sequence[tuple[Image.Image, int]],
        views: Sequence[tuple[int, Callable[[Image.Image], Tensor]]],
    ) -> None:
        self._images, self._views = images, views

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> tuple[Views, int]:
        image, label = self._images[number]
        return [view(image) for count, view in self._views for _ in range(count)], label


def loaders(config: Config, workload: Workload, batches: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders of unlabelled images and of supports; both give per view a tensor (B, 3, s, s), and labels (B,)."""
    views, support, n = config.views, config.pretrain.support, config.pretrain.batch_size
    (images, labels), store, draw = open_images(workload), ImageStore(workload.store), np.random.default_rng()
    large, small = (
        pil_view(crop, views.augment, mean=store.mean, std=store.std) for crop in (views.large, views.small)
    )
    unlabelled = _Views(images, [(views.large.count, large), (views.small.count, small)])
    supports = _Views(images, [(views.support_views, large)])
    by_class = [np.flatnonzero(np.equal(labels, label))[: config.labels.per_class] for label in np.unique(labels)]
    drawn = [
        [
            int(number)
            for chosen in draw.permutation(len(by_class))[: support.classes]
            for number in draw.permutation(by_class[chosen])[: support.images_per_class]
        ]
        for _ in range(batches)
    ]
    unlabelled_views = n * (views.large.count + views.small.count)
    support_views = support.classes * support.images_per_class * views.support_views
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
                synchronise(device)
                began = time.perf_counter()
            optimizer.zero_grad()
            loss(model, objective, images[0], labelled, step=number).backward()
            optimizer.step()
        synchronise(device)
        return Round(steps * config.pretrain.batch_size, time.perf_counter() - began)

    return work


def loss(model: nn.Module, objective: Objective, views: Views, labelled: tuple[Views, Tensor], *, step: int) -> Tensor:
    """The objective's total for views of n unlabelled images, and views and labels of the supports."""
    device = next(model.parameters()).device
    rows, labels = labelled
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        h, z = model([view.to(device, non_blocking=True) for view in (*rows, *views)])
    n = len(views[0])
    classes = torch.unique(labels, return_inverse=True)[1].repeat(len(rows))
    batch: Any = SimpleNamespace(  # what an objective reads: paws_hpc.objective.base.Step
        step=step,
        support_classes=classes,
        known=torch.zeros(n, dtype=torch.bool),
        known_classes=torch.zeros(n, dtype=torch.int64),
    )
    inputs = {name: value.to(device) for name, value in objective.inputs(batch).items()}
    total, _ = objective(inputs, h, z, images=n, diagnosed=False)
    return total
