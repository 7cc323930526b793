"""A pack that is not finished: what belongs to it, which shards are done, and how it becomes a store.

Everything lies in ``.packing`` in the store's folder (shards/FORMAT.md), so that a former store stays as it is until
the new one is whole. Any number of processes on any nodes may work in it at once: they write equal files, each by a
rename, none takes away what another put in place, and every step of the end can be repeated, so none needs a lock.
While ``complete.json`` is there no reader opens the store, whose folder may hold shards of two.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paws_hpc.files import create_json, read_json, read_record, write_json, write_record, write_text
from paws_hpc.packing.plan import Plan, differences
from paws_hpc.packing.sources.base import Source
from paws_hpc.packing.sources.listing import Listing
from paws_hpc.packing.write import Change, ShardResult
from paws_hpc.store.format import (
    FLAG_PROGRESSIVE,
    FLAG_RECOVERED,
    FLAG_REENCODED,
    FLAGS_OF_VERSION_4,
    INDEX_NAME,
    MANIFEST_NAME,
    MOVING_NAME,
    UNDERWAY_NAME,
    VERSIONS,
    Manifest,
    Omission,
    ShardEntry,
    ShardIndex,
    Statistics,
    StoreError,
    shard_name,
)
from paws_hpc.store.index import StoreIndex, build_index, dataset_digest
from paws_hpc.store.shard import read_shard

CHANGES_NAME = "changes.tsv"
_RECORD = "pack.json"
_LISTING = "listing.bin"
_DEAD_AFTER_S = 3600.0


class PackJob:
    """The unfinished pack in ``folder``, the ``.packing`` of a store's folder ``destination``."""

    def __init__(self, destination: Path) -> None:
        self.destination, self.folder = destination, destination / UNDERWAY_NAME

    def identity(self) -> dict[str, Any] | None:
        """The identity (see :class:`Plan`) of the unfinished pack; None if there is none, StoreError if damaged."""
        try:
            value = read_json(self.folder / _RECORD)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(f"{error} Or begin anew with --force.") from error
        return value if isinstance(value, dict) else {}

    def begin(self, identity: dict[str, Any], *, force: bool) -> None:
        """Continue the unfinished pack of this identity, or begin one; ``force`` discards one of another identity.

        Raises StoreError if one of another source or with other options is there.
        """
        try:
            there = self.identity()
        except StoreError:
            if not force:
                raise
            there = {}
        if there is None:
            with suppress(FileExistsError):  # another task of the same work began it, which is compared below
                create_json(self.folder / _RECORD, identity)
            there = self.identity() or {}
        # Shards without a skipped image are the same whatever is done about such images; see result().
        differing = differences(identity, there, but="on_error")
        if differing and not force:
            raise StoreError(
                f"{self.destination} holds the unfinished pack of another source, or with other options: "
                f"{', '.join(differing)}. Finish that one, choose another folder, or discard it with --force."
            )
        if differing:
            if self.is_ending():  # the folder may hold shards of two stores, and must not look like one
                (self.destination / MANIFEST_NAME).unlink(missing_ok=True)
            self.discard()
            self.begin(identity, force=False)
        for path in (*self.folder.glob(".*.tmp"), *self.destination.glob(".*.tmp")):
            with suppress(FileNotFoundError):  # of killed processes: a living one writes to its file all the time
                if time.time() - path.stat().st_mtime > _DEAD_AFTER_S:
                    path.unlink()

    def discard(self) -> None:
        """Remove everything that belongs to the unfinished pack; it goes in one step, its files in many."""
        with suppress(FileNotFoundError):  # there is none, or another process renamed it
            os.replace(self.folder, self.destination / f"{UNDERWAY_NAME}.{secrets.token_hex(8)}")
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Remove what discarding left when it was interrupted; an unfinished pack stays."""
        for leftover in self.destination.glob(f"{UNDERWAY_NAME}.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def listing(self) -> Listing | None:
        """The list of files that was kept when the pack began; None if there is none."""
        try:
            return Listing.load(self.folder / _LISTING)
        except FileNotFoundError:
            return None

    def keep_listing(self, source: Source, *, anew: bool = False) -> None:
        """Keep the list of the source's files, if it has one, for the other tasks of the work."""
        listing = getattr(source, "listing", None)
        if isinstance(listing, Listing) and (anew or self.listing() is None):
            listing.save(self.folder / _LISTING)

    def shard_path(self, number: int) -> Path:
        """Where a shard is built."""
        return self.folder / shard_name(number)

    def keep(self, result: ShardResult) -> None:
        """Note that a shard is done."""
        value = asdict(result)
        write_record(self.shard_path(result.number).with_suffix(".json"), value)

    def noted(self) -> set[int]:
        """Numbers of the shards that are noted as done, by a look at the folder only."""
        names = os.listdir(self.folder)
        return {int(name[6:-5]) for name in names if name.startswith("shard-") and name.endswith(".json")}

    def result(self, plan: Plan, number: int) -> ShardResult | None:
        """The result of a shard that is done; None if it must be built.

        The file is there with its size, opens as HDF5, and has the index that was noted; the source's files are those
        from which it was built; no image was skipped, unless they may be. Its records are not read: it was flushed to
        disk before it got its name.
        """
        try:
            result = ShardResult.from_json(read_record(self.shard_path(number).with_suffix(".json")))
        except (OSError, AttributeError, KeyError, TypeError, ValueError):
            return None
        if result.fingerprint != plan.fingerprint(number):
            return None
        if result.skipped and plan.packing.on_error != "skip":
            return None
        entry = result.entry
        if entry is None:
            return result
        for path in self.paths(entry.name):
            with suppress(OSError, StoreError):
                if path.stat().st_size == entry.bytes and read_shard(path).index.uuid == entry.uuid:
                    return result
        return None

    def paths(self, name: str) -> Iterator[Path]:
        """Where a finished shard may be: here, or in its place already."""
        yield self.folder / name
        with suppress(OSError, ValueError, KeyError, TypeError):
            yield self.destination / read_json(self.destination / MOVING_NAME)[name]

    def is_ending(self) -> bool:
        """Whether some process is making the store of the shards."""
        return (self.destination / MOVING_NAME).exists()

    def finish(self, plan: Plan) -> tuple[Manifest, list[Change], int]:
        """Check the results, move the shards into place, and write list of changes and manifest, in this order.

        Any number of processes may do so at once, or die in it.

        Returns:
            The manifest; the images that were changed, those that only lost metadata excepted; how many JPEGs stayed
            progressive.

        Raises:
            StoreError: a shard is missing or damaged, no image could be read, or the shards do not belong together.
            OSError: a file cannot be written.
        """
        results = []
        for number in range(len(plan)):
            result = self.result(plan, number)
            if result is None:
                raise StoreError(f"{self.shard_path(number)} was damaged since it was packed. Pack again.")
            results.append(result)
        packed = [entry for result in results if (entry := result.entry) is not None]
        if not packed:
            skipped = [omission for result in results for omission in result.skipped]
            self.discard()
            raise StoreError(
                f"none of the {len(skipped):,} images could be read; the first, {skipped[0].key!r}: "
                f"{skipped[0].reason}. Nothing was packed."
            )
        # A shard all of whose images were skipped has no file: the others close the gap.
        final = {entry.name: shard_name(number) for number, entry in enumerate(packed)}
        joined = build_index(self.folder, lambda: map(self._index, final))
        changes = [change for result in results for change in result.changes]
        entries = tuple(replace(entry, name=final[entry.name]) for entry in packed)
        manifest = _manifest(plan, results, changes, entries, joined)
        progressive = int(np.count_nonzero(joined["flags"] & FLAG_PROGRESSIVE))
        self._move_into_place(final | {INDEX_NAME: INDEX_NAME})
        if changes:
            lines = (f"{json.dumps(change.key)}\t{change.reason}\n" for change in changes)
            write_text(self.destination / CHANGES_NAME, "".join(lines))
        else:
            (self.destination / CHANGES_NAME).unlink(missing_ok=True)
        write_json(self.destination / MANIFEST_NAME, manifest.to_json())
        self.discard()
        return manifest, changes, progressive

    def _index(self, name: str) -> ShardIndex:
        """The index of a finished shard, wherever it is by now."""
        path = next((path for path in self.paths(name) if path.exists()), None)
        if path is None:
            raise _vanished(self.folder / name)
        return read_shard(path).index

    def _move_into_place(self, final: dict[str, str]) -> None:
        """Replace the files of the former store by the new ones; ``final`` has the name of each in the store.

        Another process that does the same may have moved some of them; StoreError if a shard is in neither place.
        """
        write_json(self.destination / MOVING_NAME, final)  # from here on a former store goes
        for path in self.destination.glob("shard-*.h5"):
            if path.name not in final.values():
                path.unlink(missing_ok=True)
        for name, place in final.items():
            try:
                os.replace(self.folder / name, self.destination / place)
            except FileNotFoundError as error:
                if not (self.destination / place).exists():
                    raise _vanished(self.folder / name) from error


def _vanished(path: Path) -> StoreError:
    return StoreError(f"{path} vanished while the store was finished. Pack again.")


def _manifest(
    plan: Plan,
    results: Sequence[ShardResult],
    changes: Sequence[Change],
    entries: tuple[ShardEntry, ...],
    joined: StoreIndex,
) -> Manifest:
    source = plan.source
    shapes = {result.shape for result in results if result.entry is not None}
    if len(shapes) > 1:
        raise StoreError(
            f"the {source.kind} source gives images of the shapes {sorted(map(str, shapes))}: raw needs one."
        )
    (shape,) = shapes
    histograms = [result.histogram for result in results if result.histogram is not None]
    if not histograms:
        raise StoreError(
            "every image that was to be counted in the statistics was left out; repair the images, or pack with "
            "another --seed."
        )
    reencoded = Counter(change.reason for change in changes if change.flags & FLAG_REENCODED)
    rewritten = Counter(change.reason for change in changes if not change.flags & FLAG_REENCODED)
    rewritten["metadata taken out"] += sum(result.stripped for result in results)
    return Manifest(
        encoding=source.encoding,
        shape=shape,
        count=len(joined),
        classes=source.classes,
        class_counts=tuple(np.bincount(joined.labels, minlength=len(source.classes)).tolist()),
        statistics=statistics(
            np.sum(histograms, axis=0), sum(result.counted for result in results), exact=plan.stride == 1
        ),
        digest=dataset_digest(joined, encoding=source.encoding, shape=shape, classes=source.classes),
        index_hash=joined.hash,
        origin=plan.origin,
        packing=plan.packing,
        reencoded=dict(sorted(reencoded.items())),
        rewritten={reason: count for reason, count in sorted(rewritten.items()) if count},
        recovered=tuple(Omission(change.key, change.reason) for change in changes if change.flags & FLAG_RECOVERED),
        skipped=tuple(omission for result in results for omission in result.skipped),
        shards=entries,
        version=VERSIONS[bool((joined["flags"] & FLAGS_OF_VERSION_4).any())],
    )


def statistics(histogram: NDArray[np.int64], images: int, *, exact: bool) -> Statistics:
    """Statistics of a histogram (C, 256), summed in integers, so that the order of images cannot matter."""
    mean, std = [], []
    for counts in histogram.tolist():  # Python's integers do not overflow
        pixels = sum(counts)
        total = sum(value * count for value, count in enumerate(counts))
        squares = sum(value * value * count for value, count in enumerate(counts))
        mean.append(total / pixels / 255)
        # n * sum(x^2) - sum(x)^2 is an exact integer: no cancellation.
        std.append((pixels * squares - total * total) ** 0.5 / pixels / 255)
    if len(mean) == 1:
        mean, std = mean * 3, std * 3
    return Statistics(
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        images=images,
        method="exact" if exact else "sample",
    )
