"""ImageStore: random access to packed images from any number of threads and forked processes.

Records are read with ``preadv``: h5py handles must not cross a fork, and h5py reads under one lock.
Legend: N records of the store, n records that are read.
"""

from __future__ import annotations

import errno
import fcntl
import math
import operator
import os
import resource
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import google_crc32c
import numpy as np
from numpy.typing import ArrayLike, NDArray

from paws_hpc.store.decode import decode_record
from paws_hpc.store.faults import check_sizes
from paws_hpc.store.format import REMEDY, USERS_NAME, Encoding, Manifest, RecordError, StoreError, read_manifest
from paws_hpc.store.index import Keys, load_index
from paws_hpc.store.shard import ShardFile

Extent = tuple[int, int, int, int | None]
"""Of a record: number of its shard, offset in its ``/data``, length in bytes, and its CRC32C if that is compared."""


class ImageStore:
    """A packed image data set, read-only.

    Safe to share between threads, to inherit through a fork and to pickle (the other process opens it anew).
    ``check`` is whether the CRC32C of every record is compared; ``keys`` are the N keys in store order.
    """

    def __init__(self, path: Path | str, *, check: bool = True) -> None:
        """Open a store, which takes the same time and memory whatever its number of records.

        ``check`` compares the CRC32C of every record that is read (about 25 µs per 110 KB).

        Raises:
            StoreError: the store is incomplete, or a shard is missing, truncated or damaged; the shard is named, and
                where the cached index is at hand the first record that is lost.
        """
        self.path, self.check = Path(path), check
        self._use: _Use | None = _Use(self.path) if (self.path / USERS_NAME).exists() else None
        self.manifest = read_manifest(self.path)
        check_sizes(self.path, self.manifest)
        self._index = load_index(self.path, self.manifest)
        self.keys = Keys(self._index)
        self._ends = list(accumulate(shard.count for shard in self.manifest.shards))
        self._local = threading.local()
        # A thread that reads refers to the open shard, whose descriptor is closed with the last reference. So the store
        # can be closed without a lock, and never closes what a thread is reading.
        self._files: list[ShardFile] | None = _open_shards(self.path, self.manifest)

    def close(self) -> None:
        """Close the shards; reading afterwards is an error."""
        self._files = self._use = None

    def __enter__(self) -> ImageStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return partial(ImageStore, check=self.check), (self.path,)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """Image ``index``, from the end if it is negative, as in :meth:`images`; IndexError where there is none."""
        if not -len(self) <= (position := operator.index(index)) < len(self):
            raise IndexError(f"{self.path}: index {index} is outside the store's {len(self):,} images.")
        return self.images([position % len(self)])[0]

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) int64, positions in :attr:`classes`; read-only, a view of the mapped index."""
        return self._index.labels

    @property
    def flags(self) -> NDArray[np.int64]:
        """(N,) int64, the bits ``FLAG_*`` of :mod:`paws_hpc.store.format`; a new array."""
        return self._index["flags"].astype(np.int64)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is a position here."""
        return self.manifest.classes

    @property
    def encoding(self) -> Encoding:
        """``jpeg`` or ``raw``."""
        return self.manifest.encoding

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(H, W, C) of every image of a raw store; None for JPEG."""
        return self.manifest.shape

    @property
    def digest(self) -> str:
        """Identity of the data set: the same digest means the same image at every position."""
        return self.manifest.digest

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of the pixels per RGB channel, in [0, 1]."""
        return self.manifest.statistics.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of the pixels per RGB channel, in [0, 1]; 1 for a channel that never changes."""
        return self.manifest.statistics.scale

    def find(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Return the positions (n,) int64 of ``keys``, in their order.

        Raises:
            ValueError: a key is not in the store; it is named.
            StoreError: as in :meth:`look_up`.
        """
        positions, known = self.look_up(keys)
        if len(unknown := np.flatnonzero(~known)):
            raise ValueError(
                f"key {keys[unknown[0]]!r} is not in the store {self.path} ({len(unknown):,} of {len(keys):,} keys are "
                f"unknown; the store's look like {self.keys[0]!r}). Use keys of this store, or draw the split again."
            )
        return positions

    def look_up(self, keys: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Positions (m,) int64 of those of n ``keys`` that are in the store, in their order, and (n,) bool which.

        Raises:
            StoreError: a key is missing, and the records are not in the order by which keys are looked up.
        """
        seed = self.manifest.packing.seed
        positions = self._index.find(keys, seed=seed)
        known = positions >= 0
        if not known.all() and not self._index.in_order(seed=seed):
            raise StoreError(f"{self.path}: its records are not in the order of packing.seed={seed}. {REMEDY}")
        return positions[known], known

    def sizes(self, indices: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Heights and widths (n,) int64 in pixels of n images; ValueError if an index is outside the store."""
        rows = self._index.rows(self._positions(indices))
        return rows["height"].astype(np.int64), rows["width"].astype(np.int64)

    def images(self, indices: ArrayLike) -> list[NDArray[np.uint8]]:
        """Read and decode n images, each (H, W, 3) uint8 RGB; grey pixels are repeated to three channels.

        Raises:
            ValueError: an index is outside the store.
            RecordError: a record cannot be read, its CRC32C is wrong or it cannot be decoded; shard and key are named.
        """
        if self.encoding == "raw":
            pixels = self.read_raw(indices)
            return list(pixels if pixels.shape[-1] == 3 else np.repeat(pixels, 3, axis=-1))
        positions = self._positions(indices)
        rows = self._index.rows(positions)
        columns, images = [rows[name].tolist() for name in ("height", "width", "flags")], []
        for number, (record, height, width, flags) in enumerate(
            zip(self._each(positions, rows), *columns, strict=True)
        ):
            try:
                images.append(decode_record(record, flags=flags, size=(height, width)))
            except ValueError as error:
                raise self._error(int(positions[number]), f"cannot be decoded: {error}") from error
        return images

    def read_encoded(self, indices: ArrayLike) -> list[bytes]:
        """Read n records as stored, by default JPEG files; errors as in :meth:`images`, ValueError for a raw store."""
        if self.encoding != "jpeg":
            raise ValueError(f"{self.path} holds raw pixels, not encoded images: use read_raw or images.")
        return [record.tobytes() for record in self.each(indices)]

    def each(self, indices: ArrayLike) -> Iterator[NDArray[np.uint8]]:
        """Yield n records as stored, each (bytes,) in a buffer that this thread's next read from the store overwrites.

        Twice as fast as :meth:`read_encoded`: new memory costs as much as reading. Errors as in :meth:`images`.
        """
        positions = self._positions(indices)
        yield from self._each(positions, self._index.rows(positions))

    def read_raw(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """Read n images of a raw store as (n, H, W, C) uint8, C 1 or 3; errors as in :meth:`images`, or JPEG store."""
        if self.shape is None:
            raise ValueError(f"{self.path} holds encoded images, not raw pixels: use read_encoded or images.")
        positions = self._positions(indices)
        pixels = np.empty((len(positions), math.prod(self.shape)), dtype=np.uint8)
        extents = self._extents(positions, self._index.rows(positions))
        for position, extent, buffer in zip(positions.tolist(), extents, pixels, strict=True):
            self._read_into(position, extent, buffer)
        return pixels.reshape(len(positions), *self.shape)

    def _positions(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Check indices: (n,) integers in [0, N)."""
        positions = np.asarray(indices)
        if positions.ndim != 1 or (positions.size and positions.dtype.kind not in "iu"):
            raise ValueError(f"{self.path}: indices must be a list of integers, got {indices!r}.")
        positions = positions.astype(np.int64)
        if positions.size:  # negative ones are the greatest here; two comparisons take twice as long for a batch
            unsigned = positions.view(np.uint64)
            if int(unsigned[worst := unsigned.argmax()]) >= len(self):
                raise ValueError(f"{self.path}: index {positions[worst]} is outside the store's {len(self):,} images.")
        return positions

    def _extents(self, positions: NDArray[np.int64], rows: NDArray[np.void]) -> list[Extent]:
        """The extents of n records."""
        # Column by column: ten times as fast as the rows of a structured array one by one.
        shards = [bisect_right(self._ends, position) for position in positions.tolist()]
        offsets, lengths = rows["offset"].tolist(), rows["length"].tolist()
        sums = rows["crc32c"].tolist() if self.check else [None] * len(rows)
        return list(zip(shards, offsets, lengths, sums, strict=True))

    def _each(self, positions: NDArray[np.int64], rows: NDArray[np.void]) -> Iterator[NDArray[np.uint8]]:
        """Yield n records in this thread's buffer."""
        buffer = self._buffer(max(rows["length"].tolist(), default=0))
        for position, extent in zip(positions.tolist(), self._extents(positions, rows), strict=True):
            record = buffer[: extent[2]]
            self._read_into(position, extent, record)
            yield record

    def _buffer(self, length: int) -> NDArray[np.uint8]:
        """At least so many bytes of this thread's own, used again: new memory costs half as much as reading."""
        buffer: NDArray[np.uint8] | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < length:
            buffer = self._local.buffer = np.empty(2 * length, np.uint8)
        return buffer

    def _read_into(self, position: int, extent: Extent, buffer: NDArray[np.uint8]) -> None:
        """Fill ``buffer`` with a record, or raise the RecordError that says why that is impossible."""
        shard, offset, length, crc32c = extent
        files = self._files
        if files is None:
            raise ValueError(f"the store {self.path} was closed: open it again to read.")
        try:
            read = files[shard].read_into(buffer, offset)
        except OSError as error:
            raise self._error(position, f"cannot be read: {error}") from error
        if read < length:
            raise self._error(position, f"is cut off: {read:,} of {length:,} bytes are there")
        if crc32c is not None and google_crc32c.value(buffer) != crc32c:
            raise self._error(position, "is damaged: its CRC32C differs from the index")

    def _error(self, position: int, problem: str) -> RecordError:
        """Name a record that cannot be used."""
        key, shard = self.keys[position], self.manifest.shards[bisect_right(self._ends, position)].name
        remedy = REMEDY if self._use is None else f"Remove {self.path}: this copy on the node is made anew."
        return RecordError(f"record {key!r} in {self.path / shard} {problem}. {remedy}", key=key, shard=shard)


class _Use:
    """Shares the lock of a node's local copy, which protects it from eviction, as long as this object exists."""

    def __init__(self, path: Path) -> None:
        self.descriptor: int | None = None
        self.descriptor = os.open(path / USERS_NAME, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_SH)
        except OSError as error:
            fault = f"{path} cannot be locked: {error.strerror}. Name a folder for local copies on another file system."
            raise StoreError(fault) from error

    def __del__(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)


def _open_shards(folder: Path, manifest: Manifest) -> list[ShardFile]:
    _allow_open_files(len(manifest.shards))
    shards: list[ShardFile] = []
    for entry in manifest.shards:
        try:
            shards.append(ShardFile(folder / entry.name, entry.data_offset))
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise StoreError(
                    f"{folder} has {len(manifest.shards):,} shards, more files than this process may open (as "
                    "`ulimit -Hn` says): pack with a larger --shard-mib, or have whoever set the limit raise it to "
                    f"{4 * len(manifest.shards):,}."
                ) from error
            raise StoreError(f"{folder / entry.name} cannot be opened: {error.strerror}. {REMEDY}") from error
    return shards


def _allow_open_files(count: int) -> None:
    """Raise this process's soft limit, often 1,024, as far as its hard limit allows."""
    wanted = 2 * count + 256  # for another store, and other files
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft not in (resource.RLIM_INFINITY, hard) and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
