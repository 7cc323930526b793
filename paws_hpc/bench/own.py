"""The work of this program's data path, as contenders; every function prepares and returns the work.

The work returns how many images it did.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import torch

from paws_hpc.bench.contender import Contender
from paws_hpc.bench.photographs import CLASSES, jpegs
from paws_hpc.data.config import FIRST_SMALL_VIEW, FIRST_SUPPORT_VIEW, CropConfig, ViewsConfig
from paws_hpc.data.images import StoreImages, cached_images
from paws_hpc.data.multicrop import MultiCrop
from paws_hpc.data.samplers import Positions
from paws_hpc.data.streams import PawsStream, StreamOptions
from paws_hpc.packing import ImageFolder, PackOptions, pack
from paws_hpc.store import ImageStore

BATCH = 64
VIEWS = ViewsConfig()
KINDS = [(VIEWS.large, 0), (VIEWS.small, FIRST_SMALL_VIEW)]
_CPU = torch.device("cpu")

Work = Callable[[], int]


def shuffled(count: int) -> Positions:
    """The order in which everybody who reads at random reads."""
    return np.random.default_rng(0).permutation(count)


def batches(records: Positions) -> list[Positions]:
    """Parts of :data:`BATCH` records; what is left over is left out, so that all batches are alike."""
    return [records[start : start + BATCH] for start in range(0, len(records) - BATCH + 1, BATCH)]


def read_again(paths: Iterable[str | Path]) -> None:
    """Take files out of the page cache and read them into it, one after the other.

    How a file came there, written or read and when, makes copies out of it faster or slower by up to a third. So
    contenders are compared on files that came there in the same way.
    """
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(1 << 20):
                pass


def reads(store: str, check: bool) -> Work:
    """Every record at random, one by one, with or without its CRC32C."""
    read_again(Path(store).glob("*.h5"))
    images = ImageStore.open(store, check=check)
    order = batches(shuffled(len(images)))

    def work() -> int:
        for records in order:
            for _ in images.each(records):
                pass
        return BATCH * len(order)

    return work


def flat_file(store: str, check: bool) -> Work:
    """What reading at random costs at least: ``os.preadv`` into one buffer at offsets that are known, and CRC32C."""
    images = ImageStore.open(store)
    path = Path(store).with_suffix(".flat")
    with open(path, "wb") as file:
        lengths = [file.write(record) for record in images.read_encoded(np.arange(len(images)))]
    read_again([path])
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1])).tolist()
    descriptor, buffer = os.open(path, os.O_RDONLY), memoryview(bytearray(max(lengths)))
    order = np.concatenate(batches(shuffled(len(images)))).tolist()

    def work() -> int:
        for place in order:
            record = buffer[: lengths[place]]
            os.preadv(descriptor, [record], starts[place])
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
        for place in order:
            with open(paths[place], "rb", buffering=0) as file:
                file.read()
        return len(order)

    return work


def crops(store: str, threads: int) -> Work:
    """2 x 224 and 6 x 96 crops of every image, without augmentation, which runs batched on the device."""
    images = ImageStore.open(store)
    torch.set_num_threads(1)
    multicrop = MultiCrop(StoreImages(images), seed=0, threads=threads, device=_CPU)
    order, epochs = batches(shuffled(len(images))), iter(range(10**6))

    def work() -> int:
        epoch, finish = next(epochs), None
        for records in order:  # as Prefetch does: one is begun before the last is waited for
            begun = multicrop.begin(records, KINDS, epoch=epoch, config=VIEWS.augment)
            if finish is not None:
                finish()
            finish = begun
        if finish is not None:
            finish()
        return BATCH * len(order)

    return work


def crops_by_processes(store: str, processes: int) -> Work:
    """The same by processes of one thread and one core each, which share nothing: as much as the machine can give."""
    cores = sorted(os.sched_getaffinity(0))[:processes]
    others = [Contender(f"{__name__}:crops", {"store": store, "threads": 1}, cores=[core]) for core in cores]
    pool = ThreadPoolExecutor(processes)

    def work() -> int:
        return round(sum(done for done, _ in pool.map(Contender.work, others)))

    return work


def supports(store: str, decoded: bool) -> Work:
    """One 224 crop of images that memory holds decoded, or that are read from the store each time."""
    images = ImageStore.open(store)
    torch.set_num_threads(1)
    labelled = shuffled(len(images))[: min(600, len(images))]
    source = cached_images(images, labelled) if decoded else StoreImages(images)
    multicrop = MultiCrop(source, seed=0, threads=1, device=_CPU)
    crop = CropConfig(VIEWS.large.size, 1, VIEWS.large.scale, VIEWS.large.ratio)
    order, steps = batches(labelled), iter(range(10**9))

    def work() -> int:
        for records in order:
            multicrop.begin(records, [(crop, FIRST_SUPPORT_VIEW)], epoch=next(steps), config=VIEWS.augment)()
        return BATCH * len(order)

    return work


def packing(folder: str, target: str, check: str) -> Work:
    """Pack the image folder with two processes; what was packed before is removed first."""
    path = Path(target)

    def work() -> int:
        shutil.rmtree(path, ignore_errors=True)
        options = PackOptions(workers=2, check=check, shard_bytes=64 << 20)  # several shards, as a real set has
        return pack(ImageFolder(Path(folder)), path, options=options).manifest.count

    return work


def paws_stream(store: ImageStore, *, threads: int) -> PawsStream:
    """The stream of one of 64 GPUs at ImageNet's recipe: 64 unlabelled images and 105 supports a step."""
    labels = store.labels
    labelled = np.concatenate([np.flatnonzero(labels == label)[:12] for label in range(CLASSES)])
    return PawsStream(
        store,
        labelled,
        views=VIEWS,
        batch_size=64,
        support_classes=15,
        images_per_class=7,
        seed=0,
        threads=threads,
        options=StreamOptions(),
    )
