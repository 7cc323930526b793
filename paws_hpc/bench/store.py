"""``bench store``: the image store and the CPU's share of the data path beside other libraries.

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
from paws_hpc.bench.peers import loaders
from paws_hpc.bench.rounds import Candidate, ratio, run_once
from paws_hpc.packing import ImageFolder, PackOptions, pack

_IMAGENET = 1_281_167
_LITDATA, _MOSAIC = ("litdata", "litdata"), ("streaming", "mosaicml-streaming")
_WEBDATASET = ("webdataset", "webdataset")
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
        pack(ImageFolder(folder / "images"), folder / "store", options=PackOptions(check="structure"))

    return measure_groups(
        f"{options.images:,} photographs, {options.rounds} rounds",
        {name: partial(GROUPS[name], folder) for name in options.only},
        prepare=prepare,
        rounds=options.rounds,
        about={"images": options.images},
        packages=[package for _, package in (_LITDATA, _MOSAIC, _WEBDATASET)],
        file=options.json or folder / "store.json",
    )


def _images(folder: Path) -> dict[str, str]:
    return {"folder": str(folder / "images")}


def _copies(folder: Path) -> dict[str, str]:
    """The images, and room for copies as a peer packs them."""
    return _images(folder) | {"scratch": str(folder / "peers")}


def _store(folder: Path) -> dict[str, str]:
    return {"store": str(folder / "store")}


def _reads(folder: Path, race: Race) -> Measured:
    rates = race(
        Candidate("paws_hpc", data_path.reads, _store(folder) | {"check": False}),
        Candidate("paws_hpc, CRC32C checked", data_path.reads, _store(folder) | {"check": True}),
        Candidate("os.preadv on one flat file", data_path.flat_file, _store(folder) | {"check": False}),
        Candidate("the same with CRC32C", data_path.flat_file, _store(folder) | {"check": True}),
        Candidate("plain files", data_path.plain_files, _images(folder)),
        Candidate("WebDataset, sequential", loaders.webdataset_reads, _copies(folder), _WEBDATASET),
        cores=1,
    )
    mine, checked, flat, flat_checked, files, webdataset = rates.values()
    return rates, [
        Figure("random reads / raw preadv", ratio(mine, flat), "x", 0.9),
        Figure("random reads / raw preadv, both with CRC32C", ratio(checked, flat_checked), "x", 0.9),
        Figure("random reads / plain files", ratio(mine, files), "x", 2.0),
        Figure("random reads / WebDataset's sequential", ratio(mine, webdataset), "x", 1.5),
    ]


def _crops(folder: Path, race: Race) -> Measured:
    rates = race(
        Candidate("paws_hpc", data_path.crops, _store(folder) | {"threads": 1}),
        Candidate("PIL, all augmentation", loaders.pil_augmentation, _images(folder)),
        Candidate("torchvision v2", loaders.torchvision_v2, _images(folder)),
        Candidate("litdata", loaders.litdata_crops, _copies(folder), _LITDATA),
        Candidate("Mosaic Streaming", loaders.mosaic_crops, _copies(folder), _MOSAIC),
        Candidate("WebDataset", loaders.webdataset_crops, _copies(folder), _WEBDATASET),
        cores=1,
    )
    mine, by_pil, *peers = rates.values()
    leads = {peer.name: lead for peer in peers if (lead := ratio(mine, peer)) is not None}
    best = min(leads, key=lambda name: leads[name], default="nobody")
    of_peers = f"the same / the best of {len(leads)} of {len(peers)} peers, {best}"
    return rates, [
        Figure("decode, 2x224 and 6x96 crops, one core", mine.median, "images/s", 240),
        Figure("the same / PIL with all augmentation", ratio(mine, by_pil), "x", 7),
        Figure(of_peers, leads.get(best), "x", 1.3),
    ]


def _threads(folder: Path, race: Race) -> Measured:
    rates = race(
        Candidate("two threads", data_path.crops, _store(folder) | {"threads": 2}),
        Candidate("one thread", data_path.crops, _store(folder) | {"threads": 1}),
        Candidate("two processes", data_path.crops_by_processes, _store(folder) | {"processes": 2}),
        cores=2,
    )
    two, one, processes = rates.values()
    return rates, [
        Figure("two threads / one", ratio(two, one), "x", 1.8),
        Figure("two processes / one thread", ratio(processes, one), "x"),
    ]


def _supports(folder: Path, race: Race) -> Measured:
    rates = race(
        Candidate("decoded in memory", data_path.supports, _store(folder) | {"decoded": True}),
        Candidate("read and decoded each time", data_path.supports, _store(folder) | {"decoded": False}),
        Candidate("PIL, all augmentation", loaders.pil_augmentation, _images(folder) | {"supports": True}),
        cores=1,
    )
    cached = rates["decoded in memory"].median
    return rates, [Figure("supports from the decoded cache, one core", cached, "images/s", 1500)]


def _pack(folder: Path, race: Race) -> Measured:
    packed = _images(folder) | {"target": str(folder / "packed")}
    rates = race(
        Candidate("paws_hpc", data_path.packing, packed | {"check": "decode"}),
        Candidate("paws_hpc, --check structure", data_path.packing, packed | {"check": "structure"}),
        Candidate("litdata", loaders.litdata_packing, _copies(folder), _LITDATA),
        cores=2,
    )
    decoded, structure, litdata = rates.values()
    return rates, [
        Figure("pack, every JPEG decoded / litdata, two processes", ratio(decoded, litdata), "x", 1.5),
        Figure("pack --check structure / litdata, two processes", ratio(structure, litdata), "x", 1.5),
    ]


def _start(folder: Path, race: Race) -> Measured:
    store = repeat_store(folder / "store", folder / "imagenet-sized", _IMAGENET)
    seconds = statistics.median(run_once(data_path.first_batch, store=str(store)).seconds for _ in range(3))
    name = "first batch of 1.28 million records, after imports, warm"
    return {}, [Figure(name, seconds, "s", 2.0, at_most=True)]


def _memory(folder: Path, race: Race) -> Measured:
    threads = len(os.sched_getaffinity(0))
    first, *_, last = run_once(data_path.memory_of_epochs, threads=threads, **_store(folder)).details["memory_mb"]
    growth = 100 * (last - first) / first
    return {}, [
        Figure("memory after the first epoch", first, "MB"),
        Figure("growth of memory over three epochs", growth, "%", 2.0, at_most=True),
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
