"""Augmentation as contenders: all views of a step, counted in unlabelled images."""

from __future__ import annotations

import itertools
import time
from contextlib import ExitStack
from typing import Any

import torch

from paws_hpc.bench.recipes import Scene, opened_stream, use_threads
from paws_hpc.bench.timeline import synchronise
from paws_hpc.bench.training import Work

_open_for_good = ExitStack()  # what work needs until its process ends


def augmentation(scene: dict[str, Any], steps: int) -> Work:
    """Steps' views from the store: images are read, decoded and cropped, and augmented as one batch."""
    config = Scene(**scene).config()
    use_threads(config)
    device = torch.device(config.device)
    stream = _open_for_good.enter_context(opened_stream(config))
    numbers = itertools.count()

    def augment_next() -> None:
        for part in stream.batch(next(numbers)).micro_batches:
            stream.augment(part, device, torch.float32)

    def work() -> dict[str, Any]:
        if device.type == "cuda":
            augment_next()  # takes the memory again that others had meanwhile
        synchronise(device.type == "cuda")
        began = time.perf_counter()
        for _ in range(steps):
            augment_next()
        synchronise(device.type == "cuda")
        seconds = time.perf_counter() - began
        return {"done": steps * config.pretrain.batch_size, "seconds": seconds}

    return work


def per_image(scene: dict[str, Any], least_s: float) -> Work:
    """PIL and torchvision, image by image on one core, decoding and crops included.

    Args:
        scene: the recipe.
        least_s: goes on for at least so many seconds; it is slow.
    """
    from paws_hpc.bench.pil import pil_view  # noqa: PLC0415 - torchvision, which takes seconds to import
    from paws_hpc.bench.plain_loader import open_images  # noqa: PLC0415

    place = Scene(**scene)
    config = place.config()
    torch.set_num_threads(1)
    views, support, n = config.views, config.pretrain.support, config.pretrain.batch_size
    images = open_images(place)
    large, small = (pil_view(crop, views.augment) for crop in (views.large, views.small))
    supports_each = support.classes * support.images_per_class * views.support_views / n

    def work() -> dict[str, Any]:
        done = supports = 0
        began = time.perf_counter()
        while done == 0 or time.perf_counter() - began < least_s:
            image = images.load(done % len(images.labels))
            for view, count in ((large, views.large.count), (small, views.small.count)):
                for _ in range(count):
                    view(image)
            done += 1
            while supports < round(done * supports_each):  # as many as come with so many unlabelled images
                large(image)
                supports += 1
        return {"done": done, "seconds": time.perf_counter() - began}

    return work
