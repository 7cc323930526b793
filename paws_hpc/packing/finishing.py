"""The end of packing: finished shards → a store. Any number of processes may come to it at once, or die in it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from paws_hpc.files import write_json, write_text
from paws_hpc.packing.building import Change, ShardResult, counted
from paws_hpc.packing.plan import Plan
from paws_hpc.packing.statistics import combine
from paws_hpc.packing.underway import CHANGES_NAME, Identity, Underway
from paws_hpc.store.faults import check_sizes
from paws_hpc.store.format import (
    FLAG_PROGRESSIVE,
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    Omission,
    ShardEntry,
    ShardIndex,
    StoreError,
    read_manifest,
    shard_name,
)
from paws_hpc.store.index import StoreIndex, build_index, dataset_digest
from paws_hpc.store.shard import read_shard

_OTHERS_FINISH_S = 10.0


@dataclass(frozen=True)
class PackReport:
    """What packing did.

    Attributes:
        path: the store's folder.
        manifest: its manifest; ``manifest.skipped`` names the images that were left out.
        packed: False where the same complete store was there already and nothing was done.
        changes: the images whose pixels or coding are not the source's, with the reason; empty where ``packed`` is
            False. Images that only lost metadata are counted in the manifest and flagged in the index.
        kept: shards that an interrupted run, or other parts of the work, had finished.
        progressive: JPEGs that stayed progressive, because turbojpeg is not installed.
        newer: images whose files were written after the store that was there; names and sizes are the same.
        seconds: duration.
    """

    path: Path
    manifest: Manifest
    packed: bool
    changes: tuple[Change, ...] = ()
    kept: int = 0
    progressive: int = 0
    newer: int = 0
    seconds: float = 0.0

    @property
    def reencoded(self) -> tuple[Omission, ...]:
        """The images that were encoded anew, with the reason."""
        return tuple(Omission(change.key, change.reason) for change in self.changes if not change.lossless)


def same_store(destination: Path, identity: Identity) -> Manifest | None:
    """The manifest of the store at ``destination`` if packing would only repeat it; None if there is none."""
    underway = Underway(destination)
    if underway.is_ending() or not (destination / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(destination)
    # A store of another version of this program, or packed without turbojpeg, holds the same images.
    like = replace(manifest.packing, packer=identity.packing.packer, transcoder=identity.packing.transcoder)
    differing = identity.differences(asdict(manifest.origin) | asdict(like))
    if differing:
        raise StoreError(
            f"{destination} already holds another store: {', '.join(differing)}. "
            "Choose another folder, or replace the store with --force."
        )
    check_sizes(destination, manifest)
    underway.remove_leftovers()
    return manifest


Stamp = tuple[int, int]


def stamp(destination: Path) -> Stamp | None:
    """What tells the manifest that is there from another, though equal, one that is written later; None without one."""
    try:
        status = (destination / MANIFEST_NAME).stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def finished_by_others(plan: Plan, underway: Underway, former: Stamp | None) -> PackReport | None:
    """The store, if another process has finished it meanwhile, so that there is nothing left to do; else None.

    Args:
        plan: of the pack.
        underway: its files, which are removed then.
        former: stamp of the store that was there in the beginning, such as one that is to be replaced.
    """
    deadline = time.monotonic() + _OTHERS_FINISH_S
    while underway.is_ending() and time.monotonic() < deadline:
        time.sleep(0.1)
    if stamp(underway.destination) == former:
        return None
    if (there := same_store(underway.destination, plan.identity)) is None:
        return None
    underway.discard()  # what this process wrote since
    return PackReport(underway.destination, there, packed=False)


def done_before(plan: Plan, underway: Underway, number: int) -> ShardResult | None:
    """The result of a shard that is done; None if it must be built."""
    return underway.result(number, plan.fingerprint(number), skipping=plan.recipe.on_error == "skip")


def finish(plan: Plan, underway: Underway) -> PackReport:
    """Check the results, move the shards into place, and write list of changes and manifest, in this order.

    Raises:
        StoreError: a shard is missing or damaged, no image could be read, or the shards do not belong together.
        OSError: a file cannot be written.
    """
    results = []
    for number in range(len(plan)):
        result = done_before(plan, underway, number)
        if result is None:
            raise StoreError(f"{underway.shard_path(number)} was damaged since it was packed. Pack again.")
        results.append(result)
    with_records = [(result, result.entry) for result in results if result.entry is not None]
    if not with_records:
        skipped = [omission for result in results for omission in result.skipped]
        underway.discard()
        raise StoreError(
            f"none of the {len(skipped):,} images could be read; the first, {skipped[0].key!r}: {skipped[0].reason}. "
            "Nothing was packed."
        )
    # A shard all of whose images were skipped has no file: the others close the gap.
    final = {entry.name: shard_name(place) for place, (_, entry) in enumerate(with_records)}
    entries = tuple(replace(entry, name=final[entry.name]) for _, entry in with_records)
    joined = build_index(underway.folder, _Indexes(underway, [entry.name for _, entry in with_records]))
    manifest = _manifest(plan, results, entries, joined)
    changes = tuple(change for result in results for change in result.changes)
    progressive = int(np.count_nonzero(joined["flags"] & FLAG_PROGRESSIVE))
    final[INDEX_NAME] = INDEX_NAME
    underway.complete(final)
    underway.move_into_place(final)
    if changes:
        lines = (f"{json.dumps(change.key)}\t{change.reason}\n" for change in changes)
        write_text(underway.destination / CHANGES_NAME, "".join(lines))
    else:
        (underway.destination / CHANGES_NAME).unlink(missing_ok=True)
    write_json(underway.destination / MANIFEST_NAME, manifest.to_json())
    underway.discard()
    return PackReport(underway.destination, manifest, packed=True, changes=changes, progressive=progressive)


class _Indexes:
    """The indexes of finished shards, read again whenever they are gone through, so that memory holds one."""

    def __init__(self, underway: Underway, names: Sequence[str]) -> None:
        self._underway, self._names = underway, names

    def __iter__(self) -> Iterator[ShardIndex]:
        return (read_shard(self._underway.find_shard(name)).index for name in self._names)


def _manifest(
    plan: Plan, results: Sequence[ShardResult], entries: tuple[ShardEntry, ...], joined: StoreIndex
) -> Manifest:
    """Everything that is known about the store."""
    source, identity = plan.source, plan.identity
    shapes = {result.shape for result in results if result.entry is not None}
    if len(shapes) > 1:
        raise StoreError(
            f"the {source.kind} source gives images of the shapes {sorted(map(str, shapes))}: raw needs one."
        )
    (shape,) = shapes
    sums = [result.sums for result in results if result.sums is not None]
    if not sums:
        raise StoreError(
            "every image that was to be counted in the statistics was left out; repair the images, or pack with "
            "another --seed."
        )
    statistics = combine(sums, exact=plan.stride == 1)
    changes = [change for result in results for change in result.changes]
    rewritten = counted(changes, lossless=True)
    rewritten["metadata taken out"] += sum(result.stripped for result in results)
    return Manifest(
        encoding=source.encoding,
        shape=shape,
        count=len(joined),
        classes=source.classes,
        class_counts=tuple(np.bincount(joined.labels, minlength=len(source.classes)).tolist()),
        statistics=statistics,
        digest=dataset_digest(joined, encoding=source.encoding, shape=shape, classes=source.classes),
        index_hash=joined.hash,
        origin=identity.origin,
        packing=identity.packing,
        reencoded=dict(sorted(counted(changes, lossless=False).items())),
        rewritten={reason: count for reason, count in sorted(rewritten.items()) if count},
        recovered=tuple(omission for result in results for omission in result.recovered),
        skipped=tuple(omission for result in results for omission in result.skipped),
        shards=entries,
    )
