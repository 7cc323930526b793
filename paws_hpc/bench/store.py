"""``bench store``: the image store and the CPU's share of the data path, beside the least that they could cost.

A group is a set of candidates that do the same work on the same images; a target compares two of them, or one of them
with a figure.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from paws_hpc.bench import data_path
from paws_hpc.bench.figures import Figure, Measured, Race, measure_groups
from paws_hpc.bench.images import repeat_store, write_photographs
from paws_hpc.bench.peers.pil import pil_augmentation
from paws_hpc.bench.rounds import median, ratio, run_once
from paws_hpc.packing import ImageFolder, pack

_IMAGENET = 1_281_167
_LEAST_IMAGES = {"start": 1400, "memory": 1400}  # fewer make more shards than may be open, or classes without supports


def bench_store(options: argparse.Namespace) -> int:
    """Measure the groups that ``options.only`` names, print a table and write the figures as JSON."""
    for group in options.only:
        if options.images < _LEAST_IMAGES.get(group, 0):
            raise ValueError(
                f"--images {options.images} is too few for the group {group}: give {_LEAST_IMAGES[group]} or more, or "
                "name other groups with --only."
            )
    folder = options.folder / f"photographs-{options.images}"

    def prepare() -> None:
        write_photographs(folder / "images", options.images)
        pack(ImageFolder(folder / "images"), folder / "store")

    return measure_groups(
        f"{options.images:,} photographs, {options.rounds} rounds",
        {name: partial(GROUPS[name], folder) for name in options.only},
        prepare=prepare,
        rounds=options.rounds,
        about={"images": options.images},
        file=options.json or folder / "store.json",
    )


def _paths(folder: Path) -> tuple[str, str]:
    """The store and the image folder."""
    return str(folder / "store"), str(folder / "images")


def _reads(folder: Path, race: Race) -> Measured:
    store, images = _paths(folder)
    candidates = {
        "paws_hpc": partial(data_path.reads, store, check=False),
        "paws_hpc, CRC32C checked": partial(data_path.reads, store, check=True),
        "os.preadv on one flat file": partial(data_path.flat_file, store, check=False),
        "the same with CRC32C": partial(data_path.flat_file, store, check=True),
        "plain files": partial(data_path.plain_files, images),
    }
    rates = race(candidates, cores=1)
    mine, checked, flat, flat_checked, files = rates.values()
    return rates, [
        Figure("random reads / raw preadv", ratio(mine, flat), "x", 0.9),
        Figure("random reads / raw preadv, both with CRC32C", ratio(checked, flat_checked), "x", 0.9),
        Figure("random reads / plain files", ratio(mine, files), "x", 2.0),
    ]


def _crops(folder: Path, race: Race) -> Measured:
    store, images = _paths(folder)
    candidates = {
        "paws_hpc": partial(data_path.crops, store, threads=1),
        "PIL, all augmentation": partial(pil_augmentation, images),
    }
    rates = race(candidates, cores=1)
    mine, by_pil = rates.values()
    return rates, [
        Figure("decode, 2x224 and 6x96 crops, one core", median(mine.per_s), "images/s", 240),
        Figure("the same / PIL with all augmentation", ratio(mine, by_pil), "x", 7),
    ]


def _threads(folder: Path, race: Race) -> Measured:
    store, _ = _paths(folder)
    candidates = {
        "two threads": partial(data_path.crops, store, threads=2),
        "one thread": partial(data_path.crops, store, threads=1),
    }
    rates = race(candidates, cores=2)
    two, one = rates.values()
    return rates, [Figure("two threads / one", ratio(two, one), "x", 1.8)]


def _supports(folder: Path, race: Race) -> Measured:
    store, images = _paths(folder)
    candidates = {
        "decoded in memory": partial(data_path.supports, store, decoded=True),
        "read and decoded each time": partial(data_path.supports, store, decoded=False),
        "PIL, all augmentation": partial(pil_augmentation, images, supports=True),
    }
    rates = race(candidates, cores=1)
    cached = median(rates["decoded in memory"].per_s)
    return rates, [Figure("supports from the decoded cache, one core", cached, "images/s", 1500)]


def _pack(folder: Path, race: Race) -> Measured:
    candidates = {"paws_hpc": partial(data_path.packing, str(folder / "images"), str(folder / "packed"))}
    rates = race(candidates, cores=2)
    packed = median(rates["paws_hpc"].per_s)
    return rates, [Figure("pack, every JPEG decoded, two processes", packed, "images/s")]


def _start(folder: Path, race: Race) -> Measured:
    store = repeat_store(folder / "store", folder / "imagenet-sized", _IMAGENET)
    seconds = statistics.median(run_once(partial(data_path.first_batch, str(store))).seconds for _ in range(3))
    name = "first batch of 1.28 million records, after imports, warm"
    return {}, [Figure(name, seconds, "s", 2.0, at_most=True)]


def _memory(folder: Path, race: Race) -> Measured:
    threads = len(os.sched_getaffinity(0))
    epochs = run_once(partial(data_path.memory_of_epochs, str(folder / "store"), threads=threads))
    first, *_, last = epochs.details["memory_mb"]
    return {}, [
        Figure("memory after the first epoch", first, "MB"),
        Figure("growth of memory over three epochs", 100 * (last - first) / first, "%", 2.0, at_most=True),
    ]


GROUPS: dict[str, Callable[[Path, Race], Measured]] = {
    "reads": _reads,
    "crops": _crops,
    "threads": _threads,
    "supports": _supports,
    "pack": _pack,
    "start": _start,
    "memory": _memory,
}
