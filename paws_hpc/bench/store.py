"""``bench store``: the image store and the CPU's part of the data path beside what people use instead.

A *group* is a set of contenders that do the same work on the same images in one race; a *bar* compares two of them, or
one of them with a figure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from paws_hpc.bench.figures import Bar, Measured, measure_groups, open_console, telling
from paws_hpc.bench.machine import describe
from paws_hpc.bench.photographs import write_photographs
from paws_hpc.bench.rounds import Entry, Rates, race, ratio
from paws_hpc.bench.synthetic import repeat_store
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
_OWN, _PEERS = "paws_hpc.bench.own", "paws_hpc.bench.peers"


@dataclass(frozen=True)
class _Bench:
    """What the groups share: the images as files and as a store, room for copies, and how long to measure."""

    folder: Path
    rounds: int
    tell: Callable[[str], None]

    @property
    def images(self) -> dict[str, str]:
        return {"folder": str(self.folder / "images")}

    @property
    def store(self) -> dict[str, str]:
        return {"store": str(self.folder / "store")}

    @property
    def copies(self) -> dict[str, str]:
        return self.images | {"scratch": str(self.folder / "peers")}

    def race(self, *entries: Entry, cores: int = 1) -> dict[str, Rates]:
        return race(entries, rounds=self.rounds, cores=sorted(os.sched_getaffinity(0))[:cores], tell=self.tell)


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
    machine = describe(PEERS)
    console.print(
        f"{options.images:,} photographs, {options.rounds} rounds, {machine['cores']} cores of {machine['processor']}, "
        f"commit {machine['commit']}"
    )
    target = options.json or folder / "store.json"
    about = {"images": options.images, "rounds": options.rounds, "machine": machine}
    with console.status("making photographs") as status:
        write_photographs(folder / "images", options.images)
        pack(ImageFolder(folder / "images"), folder / "store", options=PackOptions(check="structure"))
        bench = _Bench(folder, options.rounds, telling(status, console))
        groups = {name: partial(_MEASURE[name], bench) for name in options.only}
        none_failed = measure_groups(console, status, groups, about=about, target=target)
    return 0 if none_failed else 1


def _reads(bench: _Bench) -> Measured:
    rates = bench.race(
        Entry("paws_hpc", f"{_OWN}:reads", bench.store | {"check": False}),
        Entry("paws_hpc, CRC32C checked", f"{_OWN}:reads", bench.store | {"check": True}),
        Entry("os.preadv on one flat file", f"{_OWN}:flat_file", bench.store | {"check": False}),
        Entry("the same with CRC32C", f"{_OWN}:flat_file", bench.store | {"check": True}),
        Entry("plain files", f"{_OWN}:plain_files", bench.images),
        Entry("WebDataset, sequential", f"{_PEERS}:webdataset_reads", bench.copies, _WEBDATASET),
    )
    mine = rates["paws_hpc"]
    checked, raw_checked = rates["paws_hpc, CRC32C checked"], rates["the same with CRC32C"]
    return Measured(
        rates,
        [
            Bar("random reads / raw preadv", ratio(mine, rates["os.preadv on one flat file"]), "x", 0.9),
            Bar("random reads / raw preadv, both with CRC32C", ratio(checked, raw_checked), "x", 0.9),
            Bar("random reads / plain files", ratio(mine, rates["plain files"]), "x", 2.0),
            Bar("random reads / WebDataset's sequential", ratio(mine, rates["WebDataset, sequential"]), "x", 1.5),
        ],
        {},
    )


def _crops(bench: _Bench) -> Measured:
    peers = (
        Entry("torchvision v2", f"{_PEERS}:torchvision_v2", bench.images),
        Entry("litdata", f"{_PEERS}:litdata_crops", bench.copies, _LITDATA),
        Entry("Mosaic Streaming", f"{_PEERS}:mosaic_crops", bench.copies, _MOSAIC),
        Entry("WebDataset", f"{_PEERS}:webdataset_crops", bench.copies, _WEBDATASET),
    )
    rates = bench.race(
        Entry("paws_hpc", f"{_OWN}:crops", bench.store | {"threads": 1}),
        *peers,
        Entry("PIL, all augmentation", f"{_PEERS}:pil_augmentation", bench.images),
    )
    mine = rates["paws_hpc"]
    leads = {peer.name: lead for peer in peers if (lead := ratio(mine, rates[peer.name])) is not None}
    best = min(leads, key=lambda name: leads[name], default="nobody")
    of_peers = f"the same / the best of {len(leads)} of {len(peers)} peers, {best}"
    return Measured(
        rates,
        [
            Bar("decode, 2x224 and 6x96 crops, one core", mine.median, "images/s", 240),
            Bar("the same / PIL with all augmentation", ratio(mine, rates["PIL, all augmentation"]), "x", 7),
            Bar(of_peers, leads.get(best), "x", 1.3),
        ],
        {},
    )


def _threads(bench: _Bench) -> Measured:
    rates = bench.race(
        Entry("two threads", f"{_OWN}:crops", bench.store | {"threads": 2}),
        Entry("one thread", f"{_OWN}:crops", bench.store | {"threads": 1}),
        Entry("two processes", f"{_OWN}:crops_by_processes", bench.store | {"processes": 2}),
        cores=2,
    )
    one, two, ceiling = rates["one thread"], rates["two threads"], rates["two processes"]
    return Measured(
        rates,
        [Bar("two threads / one", ratio(two, one), "x", 1.8)],
        {"two processes / one thread": ratio(ceiling, one)},
    )


def _supports(bench: _Bench) -> Measured:
    rates = bench.race(
        Entry("decoded in memory", f"{_OWN}:supports", bench.store | {"decoded": True}),
        Entry("read and decoded each time", f"{_OWN}:supports", bench.store | {"decoded": False}),
        Entry("PIL, all augmentation", f"{_PEERS}:pil_augmentation", bench.images | {"supports": True}),
    )
    cached = rates["decoded in memory"]
    return Measured(rates, [Bar("supports from the decoded cache, one core", cached.median, "images/s", 1500)], {})


def _pack(bench: _Bench) -> Measured:
    target = {"target": str(bench.folder / "packed")}
    rates = bench.race(
        Entry("paws_hpc", f"{_OWN}:packing", bench.images | target | {"check": "decode"}),
        Entry("paws_hpc, --check structure", f"{_OWN}:packing", bench.images | target | {"check": "structure"}),
        Entry("litdata", f"{_PEERS}:litdata_packing", bench.copies, _LITDATA),
        cores=2,
    )
    other, structure = rates["litdata"], rates["paws_hpc, --check structure"]
    return Measured(
        rates,
        [
            Bar("pack, every JPEG decoded / litdata, two processes", ratio(rates["paws_hpc"], other), "x", 1.5),
            Bar("pack --check structure / litdata, two processes", ratio(structure, other), "x", 1.5),
        ],
        {},
    )


def _start(bench: _Bench) -> Measured:
    bench.tell("making an index of ImageNet's size")
    store = repeat_store(bench.folder / "store", bench.folder / "imagenet-sized", _IMAGENET)
    starts = [_fresh("first-batch", str(store)) for _ in range(bench.rounds)]
    middle = sorted(starts, key=lambda start: start["first_batch_s"])[len(starts) // 2]
    return Measured(
        {},
        [
            Bar(
                "first batch of 1.28 million records, after imports, warm",
                middle["first_batch_s"],
                "s",
                2.0,
                at_most=True,
            )
        ],
        {"starts": starts},
    )


def _memory(bench: _Bench) -> Measured:
    bench.tell("four epochs")
    seen = _fresh("epochs", bench.store["store"], str(len(os.sched_getaffinity(0))))
    share = 100 * seen["growth_mb"] / seen["resident_mb"][0]
    return Measured({}, [Bar("growth of memory over three epochs", share, "%", 2.0, at_most=True)], seen)


def _fresh(*arguments: str) -> dict[str, Any]:
    """What a new process of ``paws_hpc.bench.fresh`` measured."""
    done = subprocess.run(
        [sys.executable, "-m", "paws_hpc.bench.fresh", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise ValueError(f"{arguments[0]} could not be measured: {said[-1]}")
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


_MEASURE: dict[str, Callable[[_Bench], Measured]] = {
    "reads": _reads,
    "crops": _crops,
    "threads": _threads,
    "supports": _supports,
    "pack": _pack,
    "start": _start,
    "memory": _memory,
}
