"""Repair: damaged shards are built again from the source, to the byte what they were, or left as they are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paws_hpc.packing.plan import packing_order, statistics_stride
from paws_hpc.packing.sources import Source, SourceConfig, open_source
from paws_hpc.packing.write import ShardTask, build_shard
from paws_hpc.progress import Progress
from paws_hpc.store.faults import Fault
from paws_hpc.store.format import INDEX_NAME, VERSIONS, Manifest, StoreError, read_manifest
from paws_hpc.store.index import Keys, key_hashes, load_index, read_cached_index
from paws_hpc.store.verify import Level, verify
from paws_hpc.store.workers import usable_cores


@dataclass
class RepairReport:
    """What repairing did."""

    faults: list[Fault]
    """What verification had found."""
    repaired: list[str] = field(default_factory=list)
    """Names of the shards that are again what was packed."""
    refused: dict[str, str] = field(default_factory=dict)
    """Name of each shard that was left as it is → why."""
    index_made: bool = False
    """Whether ``index.bin`` was made anew."""
    whole: bool = True
    """No fault is left."""


def repair(
    folder: Path,
    root: Path | None,
    *,
    labels: Path | None = None,
    level: Level = "full",
    workers: int | None = None,
    show_progress: bool = False,
) -> RepairReport:
    """Verify a store and build its damaged shards again from the images it was packed from.

    A shard is replaced, in one step, only by a file that has the manifest's hash. So nothing that can still be read is
    lost, and programs that are reading the store go on.

    ``root`` is where its source is now, None for kinds that need none; ``labels`` is the file of labels, if packing
    was given one. ``level`` and ``workers`` are those of :func:`paws_hpc.store.verify.verify`.

    Raises:
        StoreError: the manifest is damaged, or the source cannot be opened.
        OSError: the store cannot be written.
    """
    manifest = read_manifest(folder)
    faults, _ = verify(folder, level=level, workers=workers, show_progress=show_progress)
    report = RepairReport(faults)
    index = read_cached_index(folder, manifest, check=True)
    damaged = {fault.shard for fault in faults if fault.shard is not None}
    numbers = [number for number, entry in enumerate(manifest.shards) if entry.name in damaged]
    if numbers:
        source = _open_source(manifest, root, labels)
        position_of = {key: position for position, key in enumerate(source.keys)}
        keys = _packed_keys(manifest, source) if index is None else Keys(index)
        total = sum(manifest.shards[number].count for number in numbers)
        with Progress(f"repairing {folder.name}", total=total, show=show_progress) as shown:
            for number in numbers:
                entry = manifest.shards[number]
                built = folder / f".{entry.name}.repair.tmp"
                try:
                    task = _task(manifest, source, keys, position_of, number=number, path=built)
                    result = build_shard(task, threads=workers or usable_cores())
                    if result.entry is not None and result.entry.file_hash == entry.file_hash:
                        os.replace(built, folder / entry.name)
                        report.repaired.append(entry.name)
                    else:
                        report.refused[entry.name] = (
                            f"what the source gives now is not what was packed: its digest is {source.digest[:16]}, "
                            f"the manifest says {manifest.origin.digest[:16]}; equal ones mean another packer"
                        )
                except StoreError as error:
                    report.refused[entry.name] = str(error)
                finally:
                    built.unlink(missing_ok=True)
                shown.advance(entry.count)
    if not report.refused and index is None:
        (folder / INDEX_NAME).unlink(missing_ok=True)
        load_index(folder, manifest)
        report.index_made = (folder / INDEX_NAME).exists()
        if not report.index_made:
            report.refused[INDEX_NAME] = "it cannot be written; is the disk full?"
    report.whole = not report.refused and not (faults and verify(folder, level="quick")[0])
    return report


def _open_source(manifest: Manifest, root: Path | None, labels: Path | None) -> Source:
    """The source that the manifest names, at the place that the user names."""
    options = {"dataset" if name == "class" else name: value for name, value in manifest.origin.options.items()}
    options |= {"root": None if root is None else str(root), "labels": None if labels is None else str(labels)}
    return open_source(SourceConfig(kind=manifest.origin.kind, **options))


def _packed_keys(manifest: Manifest, source: Source) -> list[str]:
    """Keys of the images of the source that were not skipped, in packing order."""
    skipped = {omission.key for omission in manifest.skipped}
    keys = (source.keys[position] for position in packing_order(source.keys, seed=manifest.packing.seed).tolist())
    return [key for key in keys if key not in skipped]


def _task(
    manifest: Manifest,
    source: Source,
    keys: Sequence[str],
    position_of: Mapping[str, int],
    *,
    number: int,
    path: Path,
) -> ShardTask:
    """What builds a shard again; ``keys`` (N,) are those of the store. StoreError if the source lacks its images."""
    if len(keys) != manifest.count:
        raise StoreError(
            f"the source has {len(keys):,} images that were not skipped, the store {manifest.count:,}, and "
            f"{INDEX_NAME}, which could name those of this shard, is missing or damaged: restore the source as it was "
            "when it was packed"
        )
    first = _first(manifest, number)
    mine = keys[first : first + manifest.shards[number].count]
    missing = [key for key in mine if key not in position_of]
    if missing:
        raise StoreError(f"the source has no image {missing[0]!r}, nor {len(missing) - 1:,} others of this shard")
    positions = np.array([position_of[key] for key in mine], dtype=np.int64)
    return ShardTask(
        number=number,
        path=path,
        images=source.select(positions),
        keys=mine,
        labels=source.labels[positions],
        counted=_counted(manifest, first, mine),
        fingerprint="",
        encoding=manifest.encoding,
        lossless=manifest.version > VERSIONS[0],
        source_digest=manifest.origin.digest,
        packing=replace(manifest.packing, on_error="stop"),
    )


def _first(manifest: Manifest, number: int) -> int:
    """Position in the store of a shard's first record."""
    return sum(entry.count for entry in manifest.shards[:number])


def _counted(manifest: Manifest, first: int, keys: Sequence[str]) -> NDArray[np.bool_]:
    """Which images (n,) of a shard the statistics count; skipped ones had their places in the packing order."""
    seed, skipped = manifest.packing.seed, [omission.key.encode() for omission in manifest.skipped]
    hashes = key_hashes([key.encode() for key in keys], seed)
    before = np.searchsorted(np.sort(key_hashes(skipped, seed)), hashes)
    places = first + np.arange(len(keys)) + before
    return places % statistics_stride(manifest.encoding, manifest.count + len(skipped)) == 0
