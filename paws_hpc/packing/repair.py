"""Repair: damaged shards are built again from the source, to the byte what they were, or left as they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paws_hpc.packing.jpeg_policy import transcoder
from paws_hpc.packing.plan import packing_order, packing_ranks, statistics_stride
from paws_hpc.packing.sources import Source, SourceConfig, open_source
from paws_hpc.packing.write import ShardTask, build_shard
from paws_hpc.store.faults import Fault
from paws_hpc.store.format import INDEX_NAME, Manifest, StoreError, read_manifest
from paws_hpc.store.index import StoreIndex, make_index
from paws_hpc.store.progress import progress
from paws_hpc.store.shard import read_shard
from paws_hpc.store.verify import Level, sound_index, verify
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
    index = sound_index(folder, manifest)
    damaged = {fault.shard for fault in faults if fault.shard is not None}
    numbers = [number for number, entry in enumerate(manifest.shards) if entry.name in damaged]
    if numbers:
        rebuilder = _Rebuilder(folder, manifest, _open_source(manifest, root, labels), index)
        total = sum(manifest.shards[number].count for number in numbers)
        with progress(f"repairing {folder.name}", total, show=show_progress) as advance:
            for number in numbers:
                entry = manifest.shards[number]
                problem = rebuilder.rebuild(number, threads=workers or usable_cores())
                if problem is None:
                    report.repaired.append(entry.name)
                else:
                    report.refused[entry.name] = problem
                advance(entry.count)
    if not report.refused and index is None:
        make_index(folder, manifest)
        report.index_made = True
    report.whole = not report.refused and not (faults and verify(folder, level="quick")[0])
    return report


def _open_source(manifest: Manifest, root: Path | None, labels: Path | None) -> Source:
    """The source that the manifest names, at the place that the user names."""
    options = {"dataset" if name == "class" else name: value for name, value in manifest.origin.options.items()}
    return open_source(
        SourceConfig(
            kind=manifest.origin.kind,
            root=None if root is None else str(root),
            labels=None if labels is None else str(labels),
            **options,
        )
    )


class _Rebuilder:
    """Builds shards of one store from its source."""

    def __init__(self, folder: Path, manifest: Manifest, source: Source, index: StoreIndex | None) -> None:
        self._folder, self._manifest, self._source, self._index = folder, manifest, source, index
        self._starts = np.cumsum([0, *(entry.count for entry in manifest.shards)])

    def rebuild(self, number: int, *, threads: int) -> str | None:
        """Replace one shard; returns why that is not possible."""
        entry, manifest = self._manifest.shards[number], self._manifest
        built = self._folder / f".{entry.name}.repair.tmp"
        try:
            positions = self._positions(number)
            keys = [self._source.keys[position] for position in positions.tolist()]
            task = ShardTask(
                number=number,
                path=built,
                images=self._source.select(positions),
                keys=keys,
                labels=self._source.labels[positions],
                counted=self._counted(number, keys),
                fingerprint="",
                encoding=manifest.encoding,
                source_digest=manifest.origin.digest,
                packing=replace(manifest.packing, on_error="stop"),
            )
            result = build_shard(task, threads=threads)
            if result.entry is None or result.entry.file_hash != entry.file_hash:
                return self._difference(built, number)
            os.replace(built, self._folder / entry.name)
        except StoreError as error:
            return str(error)
        finally:
            with suppress(FileNotFoundError):
                built.unlink()
        return None

    def _positions(self, number: int) -> NDArray[np.int64]:
        """Positions (n,) in the source of a shard's images, in their order.

        Raises:
            StoreError: the source does not have them; one is named.
        """
        first, stop = self._starts[number : number + 2].tolist()
        if self._index is None:
            if len(self._kept) != self._manifest.count:
                raise StoreError(
                    f"the source has {len(self._kept):,} images that were not skipped, the store "
                    f"{self._manifest.count:,}, and {INDEX_NAME}, which could name those of this shard, is missing or "
                    "damaged: restore the source as it was when it was packed"
                )
            return self._kept[first:stop]
        keys = [key.decode() for key in self._index.keys(np.arange(first, stop))]
        missing = [key for key in keys if key not in self._position_of]
        if missing:
            raise StoreError(f"the source has no image {missing[0]!r}, nor {len(missing) - 1:,} others of this shard")
        return np.array([self._position_of[key] for key in keys], dtype=np.int64)

    def _counted(self, number: int, keys: Sequence[str]) -> NDArray[np.bool_]:
        """Which images (n,) of a shard the statistics counted; skipped ones had their places in the packing order."""
        seed, skipped = self._manifest.packing.seed, [omission.key for omission in self._manifest.skipped]
        before = np.searchsorted(np.sort(packing_ranks(skipped, seed=seed)), packing_ranks(keys, seed=seed))
        places = self._starts[number] + np.arange(len(keys)) + before
        return places % statistics_stride(self._manifest.encoding, self._manifest.count + len(skipped)) == 0

    @cached_property
    def _position_of(self) -> dict[str, int]:
        """Key → position in the source."""
        return {key: position for position, key in enumerate(self._source.keys)}

    @cached_property
    def _kept(self) -> NDArray[np.int64]:
        """(N,) positions in the source of the images that were packed, in packing order."""
        skipped = {omission.key for omission in self._manifest.skipped}
        order = packing_order(self._source.keys, seed=self._manifest.packing.seed)
        return order[[self._source.keys[position] not in skipped for position in order.tolist()]]

    def _difference(self, built: Path, number: int) -> str:
        """Say how a shard that was built differs from the one that was packed."""
        digest, origin = self._source.digest, self._manifest.origin.digest
        lines = ["what the source gives now is not what was packed"]
        if digest != origin:
            lines.append(f"the source's digest is {digest[:16]}, the manifest says {origin[:16]}")
        packed_with = self._manifest.packing.transcoder
        if packed_with is not None and packed_with != transcoder():
            lines.append(f"packing used {packed_with}, this environment has {transcoder()}")
        if self._index is None:
            return "; ".join([*lines, f"{INDEX_NAME}, which could name the images, is missing or damaged"])
        now = read_shard(built).index
        positions = self._starts[number] + np.arange(len(now))
        packed, rows = self._index.keys(positions), self._index.rows(positions)
        other = [key for key, there in zip(packed, now.key_bytes, strict=True) if key != there]
        changed = np.flatnonzero(rows["crc32c"] != now.crc32c)
        if other:
            lines.append(f"image {other[0].decode()!r} is another one, and {len(other) - 1:,} more")
        elif len(changed):
            lines.append(f"image {packed[changed[0]].decode()!r} gives other bytes, and {len(changed) - 1:,} more")
        else:
            lines.append(
                "all records are the same, the rest of the file is not: another version of this program or of HDF5?"
            )
        return "; ".join(lines)
