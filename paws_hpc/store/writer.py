"""Packing: a source of labelled images → a store. The same source, seed and shard size give the same bytes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import google_crc32c
import numpy as np
import xxhash
from numpy.typing import NDArray

from paws_hpc import __version__
from paws_hpc.files import write_json
from paws_hpc.store.faults import check_sizes
from paws_hpc.store.format import (
    FLAG_RECOVERED,
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    Omission,
    Origin,
    Packing,
    RecordError,
    ShardEntry,
    ShardIndex,
    StoreError,
    read_manifest,
)
from paws_hpc.store.joined import dataset_digest, index_hash, join_indexes, write_index
from paws_hpc.store.progress import progress
from paws_hpc.store.shard import ShardHeader, write_shard
from paws_hpc.store.sources.base import Source
from paws_hpc.store.standard import standard_jpeg
from paws_hpc.store.statistics import PixelSums, combine, pixel_sums
from paws_hpc.store.workers import in_order, slices, usable_cores

_STATISTICS_IMAGES = 2_000
_IMAGES_PER_TASK = 32


@dataclass
class PackOptions:
    """How to pack; the first three decide the store's bytes."""

    shard_bytes: int = 256 << 20
    """Target size of a shard's data: a shard ends before the record that would exceed it."""
    seed: int = 0
    """Shuffles the images before they are divided into shards, so that reading in order is reading at random."""
    on_error: str = "stop"
    """stop at an image that cannot be read, or skip it and report it."""
    force: bool = False
    """Replace a different or damaged store at the destination."""
    workers: int | None = None
    """Threads that load and check images; None: one per core this process may use."""

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise ValueError(f"pack.shard_bytes={self.shard_bytes} must be positive; 268435456 (256 MiB) is usual.")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"pack.seed={self.seed} must lie in [0, 2**64).")
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"pack.on_error={self.on_error!r} must be 'stop' or 'skip'.")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"pack.workers={self.workers} must be at least 1.")


@dataclass(frozen=True)
class PackReport:
    """What packing did.

    Attributes:
        path: the store's folder.
        manifest: its manifest; ``manifest.skipped`` names the images that were left out.
        packed: False where the same complete store was there already and nothing was done.
        reencoded: the images whose bytes are not the source's, with the reason; empty where ``packed`` is False.
        seconds: duration.
    """

    path: Path
    manifest: Manifest
    packed: bool
    reencoded: tuple[Omission, ...]
    seconds: float


def pack(
    source: Source, destination: Path, *, options: PackOptions | None = None, show_progress: bool = False
) -> PackReport:
    """Pack ``source`` into the folder ``destination``.

    A complete store of the same source and options is left as it is; an incomplete one (without manifest) is replaced.
    The manifest is written last, so that an interrupted run never looks like a store.

    Raises:
        RecordError: an image cannot be read and ``options.on_error`` is ``stop``; its key is named.
        StoreError: the source has no images or ambiguous keys, or another store is at ``destination``.
        OSError: the disk is full or the folder cannot be written; finished shards stay, the temporary file goes.
    """
    options = options or PackOptions()
    started = time.monotonic()
    _check_source(source)
    origin = Origin(kind=source.kind, digest=source.digest, options=source.options)
    packing = _packing(options)
    if not options.force and (there := _same_store(destination, origin, packing)) is not None:
        return PackReport(destination, there, packed=False, reencoded=(), seconds=time.monotonic() - started)
    _clear(destination)
    order = packing_order(source.keys, seed=options.seed)
    run = _Run(source, destination, options)
    with progress(f"packing {destination.name}", len(order), show=show_progress) as advance:
        for batch in _prepared(source, order, workers=options.workers):
            for outcome in batch:
                run.take(outcome)
            advance(len(batch))
    manifest = run.finish(origin, packing)
    return PackReport(
        destination, manifest, packed=True, reencoded=tuple(run.reencoded), seconds=time.monotonic() - started
    )


def packing_order(keys: Sequence[str], *, seed: int) -> NDArray[np.int64]:
    """The shuffled order (N,) int64: images sorted by a hash of (seed, key), so it depends on nothing else."""
    ranks = np.fromiter((xxhash.xxh3_64_intdigest(key.encode(), seed) for key in keys), np.uint64, count=len(keys))
    return np.argsort(ranks, kind="stable")


def _packing(options: PackOptions) -> Packing:
    on_error: Literal["stop", "skip"] = "skip" if options.on_error == "skip" else "stop"
    return Packing(packer=__version__, seed=options.seed, shard_bytes=options.shard_bytes, on_error=on_error)


def _check_source(source: Source) -> None:
    """Refuse what could not be found again by key."""
    if not len(source.keys):
        raise StoreError(f"the {source.kind} source has no images.")
    assert len(source.labels) == len(source.keys), "a source gives one label per key"
    key, times = Counter(source.keys).most_common(1)[0]
    if times > 1:
        raise StoreError(f"key {key!r} occurs {times} times in the {source.kind} source: keys must be distinct.")
    for key in source.keys:
        if not key or "\0" in key or any("\ud800" <= character <= "\udfff" for character in key):
            raise StoreError(f"key {key!r} cannot be stored: it is empty, has a zero byte or is not UTF-8. Rename it.")


def _same_store(destination: Path, origin: Origin, packing: Packing) -> Manifest | None:
    """The manifest of the store at ``destination`` if packing would only repeat it; None if there is none."""
    if not (destination / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(destination)
    there = asdict(manifest.origin) | asdict(replace(manifest.packing, packer=packing.packer))
    wanted = asdict(origin) | asdict(packing)
    differing = [f"{name}={there[name]!r} (wanted {wanted[name]!r})" for name in wanted if there[name] != wanted[name]]
    if differing:
        raise StoreError(
            f"{destination} already holds another store: {', '.join(differing)}. "
            "Choose another folder, or replace the store with --force."
        )
    check_sizes(destination, manifest)
    return manifest


def _clear(destination: Path) -> None:
    """Remove a former store; the manifest goes first, so that what is left never looks complete."""
    leftovers = (f".{name}.*.tmp" for name in (MANIFEST_NAME, INDEX_NAME, "shard-*.h5"))  # of a killed packer
    for pattern in (MANIFEST_NAME, INDEX_NAME, "shard-*.h5", *leftovers):
        for path in sorted(destination.glob(pattern)):
            path.unlink()


@dataclass(frozen=True)
class _Record:
    """One image ready to be stored."""

    key: str
    label: int
    payload: bytes
    crc32c: int
    shape: tuple[int, ...]
    flags: int
    changed: str | None
    sums: PixelSums | None


class _Run:
    """The state of one packing: the shard being filled and what the manifest will say."""

    def __init__(self, source: Source, destination: Path, options: PackOptions) -> None:
        self.source, self.destination, self.options = source, destination, options
        self.records: list[_Record] = []
        self.size = 0
        self.entries: list[ShardEntry] = []
        self.indexes: list[ShardIndex] = []
        self.sums: list[PixelSums] = []
        self.shape: tuple[int, ...] | None = None
        self.reencoded: list[Omission] = []
        self.recovered: list[Omission] = []
        self.skipped: list[Omission] = []

    def take(self, outcome: _Record | Omission) -> None:
        """Add a record, writing the shard before it if it is full; skip an unreadable image or stop there."""
        if isinstance(outcome, Omission):
            if self.options.on_error == "stop":
                raise RecordError(
                    f"image {outcome.key!r} cannot be packed: {outcome.reason}. "
                    "Repair or remove it, or leave such images out with --on-error skip.",
                    key=outcome.key,
                )
            self.skipped.append(outcome)
            return
        if self.source.encoding == "raw":
            self.shape = self.shape or outcome.shape
            if outcome.shape != self.shape:
                raise StoreError(
                    f"image {outcome.key!r} is {outcome.shape}, the others {self.shape}: raw needs one shape."
                )
        if self.records and self.size + len(outcome.payload) > self.options.shard_bytes:
            self._write()
        self.records.append(outcome)
        self.size += len(outcome.payload)
        if outcome.sums is not None:
            self.sums.append(outcome.sums)
        if outcome.changed is not None:
            self.reencoded.append(Omission(outcome.key, outcome.changed))
        if outcome.flags & FLAG_RECOVERED:
            self.recovered.append(self.reencoded[-1])

    def _write(self) -> None:
        """Write the filled shard."""
        index = _shard_index(self.records)
        header = ShardHeader(
            count=len(index),
            uuid=index.uuid,
            encoding=self.source.encoding,
            shape=_triple(self.shape),
            packer=__version__,
            source_digest=self.source.digest,
        )
        path = self.destination / f"shard-{len(self.entries):05d}.h5"
        self.entries.append(write_shard(path, [record.payload for record in self.records], index, header))
        self.indexes.append(index)
        self.records, self.size = [], 0

    def finish(self, origin: Origin, packing: Packing) -> Manifest:
        """Write the last shard, the joined index and then the manifest."""
        if self.records:
            self._write()
        if not self.entries:
            raise StoreError(
                f"none of the {len(self.skipped):,} images could be read; the first, {self.skipped[0].key!r}: "
                f"{self.skipped[0].reason}. Nothing was packed."
            )
        source, joined, shape = self.source, join_indexes(self.indexes), _triple(self.shape)
        manifest = Manifest(
            encoding=source.encoding,
            shape=shape,
            count=len(joined),
            classes=source.classes,
            class_counts=tuple(np.bincount(joined["label"], minlength=len(source.classes)).tolist()),
            statistics=combine(self.sums, exact=len(self.sums) == len(joined)),
            digest=dataset_digest(joined, encoding=source.encoding, shape=shape, classes=source.classes),
            index_hash=index_hash(joined),
            origin=origin,
            packing=packing,
            reencoded=dict(sorted(Counter(change.reason for change in self.reencoded).items())),
            recovered=tuple(self.recovered),
            skipped=tuple(self.skipped),
            shards=tuple(self.entries),
        )
        write_index(self.destination, joined)
        write_json(self.destination / MANIFEST_NAME, manifest.to_json())
        return manifest


def _triple(shape: tuple[int, ...] | None) -> tuple[int, int, int] | None:
    if shape is None:
        return None
    height, width, channels = shape
    return height, width, channels


def _shard_index(records: Sequence[_Record]) -> ShardIndex:
    """The index of records that are stored one after another."""
    length = np.array([len(record.payload) for record in records], dtype="<u4")
    keys = [record.key.encode() for record in records]
    return ShardIndex(
        offset=np.concatenate([[0], np.cumsum(length[:-1], dtype="<u8")]).astype("<u8"),
        length=length,
        crc32c=np.array([record.crc32c for record in records], dtype="<u4"),
        label=np.array([record.label for record in records], dtype="<i4"),
        width=np.array([record.shape[1] for record in records], dtype="<u4"),
        height=np.array([record.shape[0] for record in records], dtype="<u4"),
        flags=np.array([record.flags for record in records], dtype="<u4"),
        key_blob=np.frombuffer(b"".join(keys), dtype="u1"),
        key_offset=np.concatenate([[0], np.cumsum([len(key) for key in keys])]).astype("<u8"),
    )


def _prepared(source: Source, order: NDArray[np.int64], *, workers: int | None) -> Iterator[list[_Record | Omission]]:
    """Load and check the images in ``order`` on threads (decoding releases the GIL), giving them back in order."""
    # All raw images are counted in the statistics; of JPEGs every k-th.
    stride = 1 if source.encoding == "raw" else -(-len(order) // _STATISTICS_IMAGES)

    def prepare(places: Sequence[int]) -> list[_Record | Omission]:
        return [_prepare(source, int(order[place]), count=place % stride == 0) for place in places]

    with ThreadPoolExecutor(workers or usable_cores()) as pool:
        yield from in_order(pool, prepare, slices(len(order), _IMAGES_PER_TASK))


def _prepare(source: Source, index: int, *, count: bool) -> _Record | Omission:
    """Load and check one image; one that cannot be read becomes an omission with the reason."""
    key, label = source.keys[index], int(source.labels[index])
    try:
        content = source.load(index)
        if isinstance(content, bytes):
            image = standard_jpeg(content)
            payload, pixels, flags, changed = image.payload, image.pixels, image.flags, image.changed
        else:
            payload, pixels, flags, changed = content.tobytes(), content, 0, None
    except OSError as error:
        return Omission(key, f"it cannot be read: {error.strerror}")
    except ValueError as error:
        return Omission(key, str(error))
    return _Record(
        key=key,
        label=label,
        payload=payload,
        crc32c=google_crc32c.value(payload),
        shape=pixels.shape,
        flags=flags,
        changed=changed,
        sums=pixel_sums(pixels) if count else None,
    )
