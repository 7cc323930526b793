"""``bench store``: the image store and the CPU's part of the data path beside other libraries.

A group is a set of candidates that do the same work on the same images; a target compares two of them, or one of them
with a figure.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from paws_hpc.bench import data_path
from paws_hpc.bench.figures import (
    Figure,
    Measured,
    Target,
    describe_machine,
    measure_groups,
    open_console,
    progress_line,
)
from paws_hpc.bench.images import repeat_store, write_photographs
from paws_hpc.bench.peers import loaders
from paws_hpc.bench.rounds import Candidate, Rates, race, ratio, run_once
from paws_hpc.packing import ImageFolder, PackOptions, pack

GROUPS = ("reads", "crops", "threads", "supports", "pack", "start", "memory")
_IMAGENET = 1_281_167
_LITDATA, _MOSAIC, _WEBDATASET = (
    ("litdata", "litdata"),
    ("streaming", "mosaicml-streaming"),
    ("webdataset", "webdataset"),
)
PEERS = tuple(package for _, package in (_LITDATA, _MOSAIC, _WEBDATASET))
_LEAST_IMAGES = {"start": 1400, "memory": 1400}  # fewer make more shards than may be open, or classes without supports


@dataclass(frozen=True)
class _Bench:
    """What the groups share: the images as files and as a store, room for copies, and how long to measure."""

    folder: Path
    rounds: int
    progress: Callable[[str], None]

    @property
    def images(self) -> dict[str, str]:
        return {"folder": str(self.folder / "images")}

    @property
    def store(self) -> dict[str, str]:
        return {"store": str(self.folder / "store")}

    @property
    def copies(self) -> dict[str, str]:
        return self.images | {"scratch": str(self.folder / "peers")}

    def race(self, *candidates: Candidate, cores: int = 1) -> dict[str, Rates]:
        return race(candidates, rounds=self.rounds, cores=cores, progress=self.progress)


def bench_store(options: argparse.Namespace) -> int:
    """Measure the groups that ``options.only`` names, print a table and write the figures as JSON."""
    for group in options.only:
        if options.images < _LEAST_IMAGES.get(group, 0):
            raise ValueError(
                f"--images {options.images} is too few for the group {group}: give {_LEAST_IMAGES[group]} or more, or "
                "name other groups with --only."
            )
    console = open_console()
    folder = options.folder / f"photographs-{options.images}"
    machine = describe_machine(PEERS)
    console.print(
        f"{options.images:,} photographs, {options.rounds} rounds, {machine['cores']} cores of {machine['processor']}, "
        f"commit {machine['commit']}"
    )
    file = options.json or folder / "store.json"
    about = {"images": options.images, "rounds": options.rounds, "machine": machine}
    with console.status("making photographs") as status:
        write_photographs(folder / "images", options.images)
        pack(ImageFolder(folder / "images"), folder / "store", options=PackOptions(check="structure"))
        bench = _Bench(folder, options.rounds, progress_line(status, console))
        groups = {name: partial(_MEASURE[name], bench) for name in options.only}
        return measure_groups(console, status, groups, about=about, file=file)


def _reads(bench: _Bench) -> Measured:
    rates = bench.race(
        Candidate("paws_hpc", data_path.reads, bench.store | {"check": False}),
        Candidate("paws_hpc, CRC32C checked", data_path.reads, bench.store | {"check": True}),
        Candidate("os.preadv on one flat file", data_path.flat_file, bench.store | {"check": False}),
        Candidate("the same with CRC32C", data_path.flat_file, bench.store | {"check": True}),
        Candidate("plain files", data_path.plain_files, bench.images),
        Candidate("WebDataset, sequential", loaders.webdataset_reads, bench.copies, _WEBDATASET),
    )
    mine = rates["paws_hpc"]
    checked, raw_checked = rates["paws_hpc, CRC32C checked"], rates["the same with CRC32C"]
    return Measured(
        rates,
        [
            Target("random reads / raw preadv", ratio(mine, rates["os.preadv on one flat file"]), "x", 0.9),
            Target("random reads / raw preadv, both with CRC32C", ratio(checked, raw_checked), "x", 0.9),
            Target("random reads / plain files", ratio(mine, rates["plain files"]), "x", 2.0),
            Target("random reads / WebDataset's sequential", ratio(mine, rates["WebDataset, sequential"]), "x", 1.5),
        ],
    )


def _crops(bench: _Bench) -> Measured:
    peers = (
        Candidate("torchvision v2", loaders.torchvision_v2, bench.images),
        Candidate("litdata", loaders.litdata_crops, bench.copies, _LITDATA),
        Candidate("Mosaic Streaming", loaders.mosaic_crops, bench.copies, _MOSAIC),
        Candidate("WebDataset", loaders.webdataset_crops, bench.copies, _WEBDATASET),
    )
    rates = bench.race(
        Candidate("paws_hpc", data_path.crops, bench.store | {"threads": 1}),
        *peers,
        Candidate("PIL, all augmentation", loaders.pil_augmentation, bench.images),
    )
    mine = rates["paws_hpc"]
    leads = {peer.name: lead for peer in peers if (lead := ratio(mine, rates[peer.name])) is not None}
    best = min(leads, key=lambda name: leads[name], default="nobody")
    of_peers = f"the same / the best of {len(leads)} of {len(peers)} peers, {best}"
    return Measured(
        rates,
        [
            Target("decode, 2x224 and 6x96 crops, one core", mine.median, "images/s", 240),
            Target("the same / PIL with all augmentation", ratio(mine, rates["PIL, all augmentation"]), "x", 7),
            Target(of_peers, leads.get(best), "x", 1.3),
        ],
    )


def _threads(bench: _Bench) -> Measured:
    rates = bench.race(
        Candidate("two threads", data_path.crops, bench.store | {"threads": 2}),
        Candidate("one thread", data_path.crops, bench.store | {"threads": 1}),
        Candidate("two processes", data_path.crops_by_processes, bench.store | {"processes": 2}),
        cores=2,
    )
    one, two, ceiling = rates["one thread"], rates["two threads"], rates["two processes"]
    return Measured(
        rates,
        [Target("two threads / one", ratio(two, one), "x", 1.8)],
        [Figure("two processes / one thread", ratio(ceiling, one), "x")],
    )


def _supports(bench: _Bench) -> Measured:
    rates = bench.race(
        Candidate("decoded in memory", data_path.supports, bench.store | {"decoded": True}),
        Candidate("read and decoded each time", data_path.supports, bench.store | {"decoded": False}),
        Candidate("PIL, all augmentation", loaders.pil_augmentation, bench.images | {"supports": True}),
    )
    cached = rates["decoded in memory"]
    return Measured(rates, [Target("supports from the decoded cache, one core", cached.median, "images/s", 1500)])


def _pack(bench: _Bench) -> Measured:
    target = {"target": str(bench.folder / "packed")}
    rates = bench.race(
        Candidate("paws_hpc", data_path.packing, bench.images | target | {"check": "decode"}),
        Candidate("paws_hpc, --check structure", data_path.packing, bench.images | target | {"check": "structure"}),
        Candidate("litdata", loaders.litdata_packing, bench.copies, _LITDATA),
        cores=2,
    )
    other, structure = rates["litdata"], rates["paws_hpc, --check structure"]
    return Measured(
        rates,
        [
            Target("pack, every JPEG decoded / litdata, two processes", ratio(rates["paws_hpc"], other), "x", 1.5),
            Target("pack --check structure / litdata, two processes", ratio(structure, other), "x", 1.5),
        ],
    )


def _start(bench: _Bench) -> Measured:
    bench.progress("making an index of ImageNet's size")
    store = repeat_store(bench.folder / "store", bench.folder / "imagenet-sized", _IMAGENET)
    seconds = [run_once(data_path.first_batch, store=str(store)).seconds for _ in range(bench.rounds)]
    name = "first batch of 1.28 million records, after imports, warm"
    target = Target(name, statistics.median(seconds), "s", 2.0, at_most=True)
    return Measured(targets=[target], details={"first_batch_s": seconds})


def _memory(bench: _Bench) -> Measured:
    bench.progress("four epochs")
    threads = len(os.sched_getaffinity(0))
    details = run_once(data_path.memory_of_epochs, threads=threads, **bench.store).details
    first, *_, last = details["memory_mb"]
    target = Target("growth of memory over three epochs", 100 * (last - first) / first, "%", 2.0, at_most=True)
    return Measured(targets=[target], details=details)


_MEASURE: dict[str, Callable[[_Bench], Measured]] = {
    "reads": _reads,
    "crops": _crops,
    "threads": _threads,
    "supports": _supports,
    "pack": _pack,
    "start": _start,
    "memory": _memory,
}
