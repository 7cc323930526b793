"""The work of ``bench store``: this program's data path, and what reading images costs at least.

Every function prepares and returns the work, which returns how many images it did.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from functools import partial
from pathlib import Path

import google_crc32c
import numpy as np
import torch

from paws_hpc.bench.images import CLASSES, jpegs, read_again
from paws_hpc.bench.rounds import Round, Work
from paws_hpc.data.config import FIRST_SMALL_VIEW, FIRST_SUPPORT_VIEW, CropConfig, ViewsConfig
from paws_hpc.data.images import StoreImages, cached_images
from paws_hpc.data.multicrop import MultiCrop
from paws_hpc.data.samplers import Positions
from paws_hpc.data.streams import PawsStream
from paws_hpc.packing import ImageFolder, PackOptions, pack
from paws_hpc.store import ImageStore

BATCH = 64
VIEWS = ViewsConfig()
CROP_GROUPS = [(VIEWS.large, 0), (VIEWS.small, FIRST_SMALL_VIEW)]
_CPU = torch.device("cpu")
_EPOCHS = 4  # whose memory is watched; the first one warms up, with what comes before it
_SLOW_STEP_S = 2.0  # in which all batches that may be made ahead are made


def shuffled(count: int) -> Positions:
    """The order in which every candidate that reads at random reads."""
    return np.random.default_rng(0).permutation(count)


def batches(records: Positions) -> list[Positions]:
    """Whole batches of :data:`BATCH` records."""
    return [records[start : start + BATCH] for start in range(0, len(records) - BATCH + 1, BATCH)]


def reads(store: str, check: bool) -> Work:
    """Every record at random, one by one, with or without its CRC32C."""
    read_again(Path(store).glob("*.h5"))
    images = ImageStore(store, check=check)
    order = batches(shuffled(len(images)))

    def work() -> int:
        for records in order:
            for _ in images.each(records):
                pass
        return BATCH * len(order)

    return work


def flat_file(store: str, check: bool) -> Work:
    """The least that reading at random costs: ``os.preadv`` into one buffer at known offsets, and CRC32C."""
    images = ImageStore(store)
    path = Path(store).with_suffix(".flat")
    with open(path, "wb") as file:
        lengths = [file.write(record) for record in images.read_encoded(np.arange(len(images)))]
    read_again([path])
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1])).tolist()
    descriptor, buffer = os.open(path, os.O_RDONLY), memoryview(bytearray(max(lengths)))
    order = np.concatenate(batches(shuffled(len(images)))).tolist()

    def work() -> int:
        for position in order:
            record = buffer[: lengths[position]]
            os.preadv(descriptor, [record], starts[position])
            if check:
                google_crc32c.value(np.frombuffer(record, np.uint8))
        return len(order)

    return work


def plain_files(folder: str) -> Work:
    """Every file of the image folder at random: open, read, close."""
    paths = [str(path) for path in jpegs(folder)]
    read_again(paths)
    order = np.concatenate(batches(shuffled(len(paths)))).tolist()

    def work() -> int:
        for position in order:
            with open(paths[position], "rb", buffering=0) as file:
                file.read()
        return len(order)

    return work


def crops(store: str, threads: int) -> Work:
    """2 x 224 and 6 x 96 crops of every image, without augmentation, which runs batched on the device."""
    images = ImageStore(store)
    torch.set_num_threads(1)
    multicrop = MultiCrop(StoreImages(images), seed=0, threads=threads, device=_CPU)
    order, epochs = batches(shuffled(len(images))), itertools.count()

    def work() -> int:
        begin = partial(multicrop.begin, crop_groups=CROP_GROUPS, epoch=next(epochs), config=VIEWS.augment)
        begun = [begin(records) for records in order[:1]]
        for records in order[1:]:  # one batch is begun before the last is waited for, as in training
            begun.append(begin(records))
            begun.pop(0)()
        for finish in begun:
            finish()
        return BATCH * len(order)

    return work


def supports(store: str, decoded: bool) -> Work:
    """One 224 crop of images that memory holds decoded, or that are read from the store each time."""
    images = ImageStore(store)
    torch.set_num_threads(1)
    labelled = shuffled(len(images))[: min(600, len(images))]
    source = cached_images(images, labelled) if decoded else StoreImages(images)
    multicrop = MultiCrop(source, seed=0, threads=1, device=_CPU)
    crop = CropConfig(VIEWS.large.size, 1, VIEWS.large.scale)
    order, steps = batches(labelled), itertools.count()

    def work() -> int:
        for records in order:
            multicrop.begin(records, [(crop, FIRST_SUPPORT_VIEW)], epoch=next(steps), config=VIEWS.augment)()
        return BATCH * len(order)

    return work


def packing(folder: str, target: str) -> Work:
    """Pack the image folder with two processes; what was packed before is removed first."""
    path = Path(target)

    def work() -> int:
        shutil.rmtree(path, ignore_errors=True)
        options = PackOptions(workers=2, shard_bytes=64 << 20)  # several shards, as a real set has
        manifest = pack(ImageFolder(Path(folder)), path, options=options).manifest
        assert manifest is not None, "the whole of it is packed"
        return manifest.count

    return work


def _stream(path: str, *, threads: int) -> PawsStream:
    """The stream of one of 64 GPUs at ImageNet's recipe: 64 unlabelled images and 105 supports a step."""
    torch.set_num_threads(1)
    store = ImageStore(path)
    labelled = np.concatenate([np.flatnonzero(store.labels == label)[:12] for label in range(CLASSES)])
    return PawsStream(
        store,
        labelled,
        views=VIEWS,
        batch_size=BATCH,
        support_classes=15,
        images_per_class=7,
        seed=0,
        threads=threads,
    )


def first_batch(store: str) -> Work:
    """Open a store and make its first batch, after imports."""

    def work() -> int:
        with _stream(store, threads=2).prefetch(0, 1) as prefetched:
            next(iter(prefetched))
        return BATCH

    return work


def memory_of_epochs(store: str, threads: int) -> Work:
    """``memory_mb`` of this process at the end of each of a few epochs; files' pages are not counted.

    The warm-up has as many batches in use at once as there can ever be: those made ahead, one begun, two held.
    """
    stream = _stream(store, threads=threads)

    def work() -> Round:
        began, memory_mb = time.perf_counter(), []
        with stream.prefetch(0, stream.steps_per_epoch) as prefetched:
            held = []
            for _ in range(2):
                held.append(next(prefetched))
                time.sleep(_SLOW_STEP_S)
            del held
        for epoch in range(_EPOCHS):
            first = epoch * stream.steps_per_epoch
            with stream.prefetch(first, first + stream.steps_per_epoch) as prefetched:
                for batch in prefetched:
                    del batch
            memory_mb.append(_memory_mb())
        images = _EPOCHS * stream.steps_per_epoch * BATCH
        return Round(images, time.perf_counter() - began, {"memory_mb": memory_mb})

    return work


def _memory_mb() -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return sum(int(sizes[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1000
