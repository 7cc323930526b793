"""Packing: a source of labelled images → a store. The same source, seed and shard size give the same bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from paws_hpc import __version__
from paws_hpc.packing.building import ShardTask
from paws_hpc.packing.finishing import PackReport, done_before, finish, finished_by_others, same_store, stamp
from paws_hpc.packing.plan import Plan, packing_order
from paws_hpc.packing.processes import build_shards
from paws_hpc.packing.sources.base import Source
from paws_hpc.packing.sources.listing import Listing
from paws_hpc.packing.standard import transcoder
from paws_hpc.packing.underway import Identity, Underway
from paws_hpc.store.format import MANIFEST_NAME, Origin, Packing, StoreError
from paws_hpc.store.progress import progress
from paws_hpc.store.workers import usable_cores

__all__ = [
    "PackOptions",
    "PackReport",
    "Part",
    "PartReport",
    "pack",
    "pack_part",
    "packing_order",
    "plan_pack",
    "planned_listing",
]

_LARGEST_SHARD = 1 << 36


@dataclass
class PackOptions:
    """How to pack; all but the last two decide the store's bytes."""

    shard_bytes: int = 256 << 20
    """Bytes of the source's images that make a shard: it ends before the image that would exceed it."""
    seed: int = 0
    """Shuffles the images before they are divided into shards, so that reading in order is reading at random."""
    on_error: str = "stop"
    """stop at an image that cannot be read, or skip it and report it."""
    max_short_side: int | None = None
    """Shrinks images whose short side has more pixels, at some loss; None keeps all as they are."""
    check: str = "decode"
    """decode every JPEG, so that none is stored that training could not read; or look at its structure only, which is
    several times as fast and leaves damage to be found later."""
    force: bool = False
    """Replace a different or damaged store at the destination, once the new one is whole."""
    workers: int | None = None
    """Processes that each build one shard at a time, or threads where there are fewer shards; None: one per core."""

    def __post_init__(self) -> None:
        if not 1 <= self.shard_bytes <= _LARGEST_SHARD:
            raise ValueError(
                f"pack.shard_bytes={self.shard_bytes} must be positive and at most {_LARGEST_SHARD}; "
                "268435456 (256 MiB) is usual."
            )
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"pack.seed={self.seed} must lie in [0, 2**64).")
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"pack.on_error={self.on_error!r} must be 'stop' or 'skip'.")
        if self.check not in ("decode", "structure"):
            raise ValueError(f"pack.check={self.check!r} must be 'decode' or 'structure'.")
        if self.max_short_side is not None and self.max_short_side < 1:
            raise ValueError(f"pack.max_short_side={self.max_short_side} must be at least 1 pixel.")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"pack.workers={self.workers} must be at least 1.")


@dataclass(frozen=True)
class PartReport:
    """What packing a part did.

    Attributes:
        path: the store's folder.
        packed: shards that were built.
        kept: shards of this part that were done before.
        missing: shards of other parts that are not done.
        store: the whole store, where this part was the last; else None.
        seconds: duration.
    """

    path: Path
    packed: int
    kept: int
    missing: int
    store: PackReport | None
    seconds: float


@dataclass(frozen=True)
class Part:
    """A part of the work: every ``of``-th shard, beginning with shard ``number`` - 1."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ValueError(
                f"part {self.number}/{self.of}: parts are numbered from 1/{self.of} to {self.of}/{self.of}."
            )


def pack(
    source: Source, destination: Path, *, options: PackOptions | None = None, show_progress: bool = False
) -> PackReport:
    """Pack ``source`` into the folder ``destination``.

    A complete store of the same source and options is left as it is. Shards that an interrupted run finished are kept.
    The manifest is written last, so that an interrupted run never looks like a store, and a former store at the
    destination (``options.force``) stays until the new one is whole.

    Raises:
        RecordError: an image cannot be read and ``options.on_error`` is ``stop``; its key is named.
        SourceChangedError: the source changed while it was packed.
        StoreError: the source has no images or ambiguous keys, or another store, whole or unfinished, is at
            ``destination``.
        OSError: the disk is full or the folder cannot be written; finished shards stay, temporary files go.
    """
    options, started = options or PackOptions(), time.monotonic()
    identity, former = _identity(source, options), stamp(destination)
    if not options.force and (there := same_store(destination, identity)) is not None:
        newer = _written_after(source, destination)
        return PackReport(destination, there, packed=False, newer=newer, seconds=time.monotonic() - started)
    plan, underway = Plan(source, identity), Underway(destination)
    underway.begin(identity, force=options.force)
    try:
        kept = _build(plan, underway, range(len(plan)), options, show_progress)
        report = replace(finish(plan, underway), kept=kept)
    except (FileNotFoundError, StoreError):
        there_now = finished_by_others(plan, underway, former)
        if there_now is None:
            raise
        report = there_now
    return replace(report, seconds=time.monotonic() - started)


def plan_pack(source: Source, destination: Path, *, options: PackOptions | None = None) -> tuple[int, int]:
    """Begin packing in parts: keep the list of the source, so that no part need make it again.

    Returns:
        The numbers of shards and of images.

    Raises:
        StoreError: as :func:`pack`.
    """
    options = options or PackOptions()
    identity = _identity(source, options)
    plan = Plan(source, identity)
    if same_store(destination, identity) is None:
        underway = Underway(destination)
        underway.begin(identity, force=options.force)
        _keep_listing(underway, source, anew=True)
    return len(plan), len(plan.order)


def planned_listing(destination: Path, kind: str) -> Listing | None:
    """The list of files that the unfinished pack at ``destination`` began with; None if there is none of this kind.

    Raises:
        StoreError, ValueError: the record or the list is damaged.
    """
    underway = Underway(destination)
    identity = underway.identity()
    return underway.listing() if identity is not None and identity.get("kind") == kind else None


def _keep_listing(underway: Underway, source: Source, *, anew: bool = False) -> None:
    listing = getattr(source, "listing", None)
    if isinstance(listing, Listing) and (anew or underway.listing() is None):
        underway.keep_listing(listing)


def pack_part(
    source: Source, destination: Path, part: Part, *, options: PackOptions | None = None, show_progress: bool = False
) -> PartReport:
    """Pack a part of the shards; whoever finishes the last shard makes the store of all.

    Any number of parts may be packed at once by processes on any nodes that share the folder, in any order, again
    after being killed, and twice at the same time: their files are equal.

    Raises:
        ValueError: ``options.force`` is set: a part that starts late would begin a finished store anew.
        RecordError, SourceChangedError, StoreError, OSError: as :func:`pack`.
    """
    options, started = options or PackOptions(), time.monotonic()
    if options.force:
        raise ValueError(
            "parts cannot be packed with --force: one that starts late would begin a finished store anew. "
            "Pack into a new folder, or remove the former store first."
        )
    identity, former = _identity(source, options), stamp(destination)
    if (there := same_store(destination, identity)) is not None:
        report = PackReport(destination, there, packed=False, newer=_written_after(source, destination))
        return PartReport(destination, 0, 0, 0, report, time.monotonic() - started)
    plan, underway = Plan(source, identity), Underway(destination)
    underway.begin(identity, force=False)
    _keep_listing(underway, source)
    mine = range(part.number - 1, len(plan), part.of)
    kept = missing = 0
    store = None
    try:
        kept = _build(plan, underway, mine, options, show_progress)
        missing = len(set(range(len(plan))) - underway.noted())
        # Others may have finished all of it between this part's first look and its beginning.
        store = finished_by_others(plan, underway, former) if missing else finish(plan, underway)
    except (FileNotFoundError, StoreError):
        store = finished_by_others(plan, underway, former)
        if store is None:
            raise
    return PartReport(destination, len(mine) - kept, kept, missing, store, time.monotonic() - started)


def _identity(source: Source, options: PackOptions) -> Identity:
    on_error: Literal["stop", "skip"] = "skip" if options.on_error == "skip" else "stop"
    if source.encoding == "raw" and options.max_short_side is not None:
        raise ValueError(
            f"pack.max_short_side={options.max_short_side} does not apply to the {source.kind} source, which gives raw "
            "pixels: remove it."
        )
    packing = Packing(
        packer=__version__,
        seed=options.seed,
        shard_bytes=options.shard_bytes,
        on_error=on_error,
        max_short_side=options.max_short_side,
        check="structure" if options.check == "structure" else "decode",
        transcoder=transcoder() if source.encoding == "jpeg" else None,
    )
    return Identity(Origin(kind=source.kind, digest=source.digest, options=source.options), packing)


def _written_after(source: Source, destination: Path) -> int:
    """How many of the source's images were written after the store; 0 where the digest covers their contents."""
    packed = (destination / MANIFEST_NAME).stat().st_mtime_ns
    return int(np.count_nonzero(source.stamps > packed))


def _build(plan: Plan, underway: Underway, numbers: range, options: PackOptions, show_progress: bool) -> int:
    """Build those shards that are not done; returns how many are."""
    done = {number for number in numbers if done_before(plan, underway, number) is not None}
    missing = [number for number in numbers if number not in done]
    if not missing:
        return len(done)
    workers = options.workers or usable_cores()
    processes = min(workers, len(missing))
    images = sum(len(plan.members(number)) for number in missing)

    def tasks() -> Iterator[ShardTask]:
        return (plan.task(number, underway.shard_path(number)) for number in missing)

    with progress(f"packing {underway.destination.name}", images, show=show_progress) as advance:
        for result in build_shards(tasks(), processes=processes, threads=workers // processes, advance=advance):
            underway.keep(result)
    return len(done)
