"""Verify a store at three depths; every fault is named with its shard and, where it is one record's, the key."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import google_crc32c
import numpy as np

from paws_hpc.files import file_hash
from paws_hpc.progress import Progress
from paws_hpc.store.decode import decode_record
from paws_hpc.store.faults import Fault, size_fault
from paws_hpc.store.format import (
    INDEX_NAME,
    Manifest,
    ShardEntry,
    ShardIndex,
    StoreError,
    read_manifest,
)
from paws_hpc.store.index import dataset_digest, join_indexes, read_cached_index
from paws_hpc.store.shard import ShardContents, ShardFile, read_shard
from paws_hpc.store.workers import in_order, slices, usable_cores

Level = Literal["quick", "full", "deep"]
_RECORDS_PER_TASK = 64


def verify(
    folder: Path, *, level: Level, workers: int | None = None, show_progress: bool = False
) -> tuple[list[Fault], int]:
    """Look for faults.

    ``quick`` reads sizes, headers and indexes and compares them with the manifest; ``full`` also reads every record
    (CRC32C) and every file (hash); ``deep`` also decodes every image and compares its size. ``workers`` are threads;
    None: one per core this process may use.

    Returns:
        The faults, and the number of records that were looked at: all whose shard could be opened, 0 at ``quick``.
    """
    try:
        manifest = read_manifest(folder)
    except StoreError as error:
        return [Fault(None, None, f"has no usable manifest: {error}")], 0
    faults: list[Fault] = []
    indexes: list[ShardIndex | None] = []
    for number in range(len(manifest.shards)):
        found, index = _check_shard(folder, manifest, number)
        faults += found
        indexes.append(index)
    whole = [index for index in indexes if index is not None]
    if len(whole) == len(indexes):
        faults += _check_join(manifest, whole)
    # Its absence is no fault.
    if (folder / INDEX_NAME).exists() and read_cached_index(folder, manifest, check=level != "quick") is None:
        faults.append(Fault(None, None, f"has a damaged {INDEX_NAME}; remove it, it is made anew from the shards"))
    if level == "quick":
        return faults, 0
    with (
        ThreadPoolExecutor(workers or usable_cores()) as pool,
        Progress(f"verifying {folder.name}", total=sum(map(len, whole)), show=show_progress) as shown,
    ):
        for entry, index in zip(manifest.shards, indexes, strict=True):
            if index is None:
                continue
            damaged = False
            decode = level == "deep" and manifest.encoding == "jpeg"
            for records, found in _check_records(folder / entry.name, entry, index, pool, decode=decode):
                faults += found
                damaged = damaged or bool(found)
                shown.advance(records)
            if not damaged and file_hash(folder / entry.name) != entry.file_hash:
                faults.append(Fault(entry.name, None, "is not the file that was packed, though its records are whole"))
    return faults, sum(map(len, whole))


def _check_shard(folder: Path, manifest: Manifest, number: int) -> tuple[list[Fault], ShardIndex | None]:
    """Quick checks of one shard; returns its index where that is the one that was packed."""
    entry = manifest.shards[number]
    fault = size_fault(folder, manifest, number)
    if fault is not None:
        return [fault], None
    try:
        contents = read_shard(folder / entry.name)
    except StoreError as error:
        return [Fault(entry.name, None, f"cannot be opened: {error}")], None
    problems = list(_header_problems(contents, manifest, entry))
    intact = contents.index.uuid == entry.uuid
    if not intact:
        problems.append("has another index or other keys than were packed; its records cannot be checked")
    return [Fault(entry.name, None, problem) for problem in problems], contents.index if intact else None


def _header_problems(contents: ShardContents, manifest: Manifest, entry: ShardEntry) -> Iterator[str]:
    """Compare a shard's attributes and layout with the manifest."""
    expected = {
        "count": (contents.header.count, entry.count),
        "uuid": (contents.header.uuid, entry.uuid),
        "encoding": (contents.header.encoding, manifest.encoding),
        "shape": (contents.header.shape, manifest.shape),
        "packer": (contents.header.packer, manifest.packing.packer),
        "source_digest": (contents.header.source_digest, manifest.origin.digest),
        "number of index entries": (len(contents.index), entry.count),
        "offset of /data": (contents.data_offset, entry.data_offset),
        "length of /data": (contents.data_bytes, entry.data_bytes),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            yield f"has {name} {found!r}, the manifest says {wanted!r}"
    length = contents.index.length.astype(np.uint64)
    if not np.array_equal(contents.index.offset, np.cumsum(length) - length) or length.sum() != contents.data_bytes:
        yield "has records that do not fill /data one after another"
    if manifest.shape is not None and not (length == math.prod(manifest.shape)).all():
        yield f"has records that are not {' x '.join(map(str, manifest.shape))} pixels"


def _check_join(manifest: Manifest, indexes: list[ShardIndex]) -> Iterator[Fault]:
    """Compare what all shards give together with the manifest."""
    joined = join_indexes(lambda: indexes)
    digest = dataset_digest(joined, encoding=manifest.encoding, shape=manifest.shape, classes=manifest.classes)
    counts = np.bincount(joined.labels, minlength=len(manifest.classes)).tolist()
    for name, found, wanted in (
        ("digest", digest, manifest.digest),
        ("index_hash", joined.hash, manifest.index_hash),
        ("class_counts", counts, list(manifest.class_counts)),
    ):
        if found != wanted:
            yield Fault(None, None, f"has {name} {wanted} in its manifest, its shards give {found}")


def _check_records(
    path: Path, entry: ShardEntry, index: ShardIndex, pool: ThreadPoolExecutor, *, decode: bool
) -> Iterator[tuple[int, list[Fault]]]:
    """Read all records of one shard; yields how many were read, with their faults."""
    keys = index.key_bytes
    file = ShardFile(path, entry.data_offset)

    def check(records: range) -> tuple[int, list[Fault]]:
        problems = [(record, _record_problem(file, index, record, decode=decode)) for record in records]
        return len(records), [
            Fault(entry.name, keys[record].decode(), problem) for record, problem in problems if problem
        ]

    try:
        yield from in_order(pool, check, slices(len(index), _RECORDS_PER_TASK))
    finally:
        file.close()


def _record_problem(file: ShardFile, index: ShardIndex, record: int, *, decode: bool) -> str | None:
    """What is wrong with one record; None if nothing is."""
    buffer = np.empty(int(index.length[record]), dtype=np.uint8)
    try:
        read = file.read_into(buffer, int(index.offset[record]))
    except OSError as error:
        return f"cannot be read: {error}"
    if read < len(buffer):
        return f"is cut off: {read:,} of {len(buffer):,} bytes are there"
    if google_crc32c.value(buffer) != index.crc32c[record]:
        return "is damaged: its CRC32C differs from the index"
    if decode:
        try:
            size = int(index.height[record]), int(index.width[record])
            decode_record(buffer, flags=int(index.flags[record]), size=size)
        except ValueError as error:
            return f"cannot be decoded: {error}"
    return None
