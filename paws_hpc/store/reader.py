"""ImageStore: random access to packed images from any number of threads and forked processes.

The files are opened once, by plain ``open``; records are read with ``preadv``, which has no file position to share. No
h5py handle stays open: those must not cross a fork, and h5py reads under one lock.
"""

from __future__ import annotations

import errno
import math
import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import overload

import google_crc32c
import numpy as np
from numpy.typing import ArrayLike, NDArray

from paws_hpc.store.decode import decode_jpeg
from paws_hpc.store.faults import check_sizes
from paws_hpc.store.format import REMEDY, Encoding, Manifest, RecordError, StoreError, read_manifest
from paws_hpc.store.joined import load_index
from paws_hpc.store.shard import ShardFile


class ImageStore:
    """A packed image data set, read-only.

    Safe to share between threads, to inherit through a fork and to pickle (the other process opens it anew).

    Attributes:
        path: the store's folder.
        manifest: everything that is known about the store.
    """

    def __init__(self, path: Path, manifest: Manifest, index: NDArray[np.void], *, check: bool) -> None:
        """Use :meth:`open`."""
        self.path = path
        self.manifest = manifest
        self.check = check
        self._index = index
        self._labels = _frozen(index["label"].astype(np.int64))
        self._keys = Keys(index["key"])
        self._shards = _open_shards(path, manifest)
        self._close = weakref.finalize(self, _close_all, self._shards)

    @classmethod
    def open(cls, path: Path | str, *, check: bool = True) -> ImageStore:
        """Open a store.

        Args:
            path: the folder with ``manifest.json``.
            check: compare the CRC32C of every record that is read (about 25 µs per 110 KB).

        Raises:
            StoreError: the store is incomplete, or a shard is missing, truncated or damaged; the shard is named, and
                where the cached index is at hand the first record that is lost.
        """
        path = Path(path)
        manifest = read_manifest(path)
        check_sizes(path, manifest)
        return cls(path, manifest, load_index(path, manifest), check=check)

    def close(self) -> None:
        """Close the shards; reading afterwards is an error."""
        self._close()

    def __enter__(self) -> ImageStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.path, self.check)

    def __repr__(self) -> str:
        return f"ImageStore({str(self.path)!r}, {len(self):,} images, {len(self.classes)} classes, {self.encoding})"

    def __len__(self) -> int:
        return len(self._index)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) int64, positions in :attr:`classes`; read-only."""
        return self._labels

    @cached_property
    def widths(self) -> NDArray[np.int64]:
        """(N,) int64, pixels; read-only."""
        return _frozen(self._index["width"].astype(np.int64))

    @cached_property
    def heights(self) -> NDArray[np.int64]:
        """(N,) int64, pixels; read-only."""
        return _frozen(self._index["height"].astype(np.int64))

    @cached_property
    def flags(self) -> NDArray[np.int64]:
        """(N,) int64, the bits ``FLAG_*`` of :mod:`paws_hpc.store.format`; read-only."""
        return _frozen(self._index["flags"].astype(np.int64))

    @property
    def keys(self) -> Keys:
        """The N keys in store order."""
        return self._keys

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
        """Standard deviation of the pixels per RGB channel, in [0, 1]."""
        return self.manifest.statistics.std

    def find(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Return the positions (n,) int64 of ``keys``, in their order.

        Raises:
            ValueError: a key is not in the store; it is named.
        """
        wanted = np.array([key.encode() for key in keys], dtype=bytes)
        if not len(wanted):
            return np.empty(0, dtype=np.int64)
        names, order = self._sorted_keys
        places = np.minimum(np.searchsorted(names, wanted), len(names) - 1)
        unknown = np.flatnonzero(names[places] != wanted)
        if len(unknown):
            raise ValueError(
                f"key {keys[unknown[0]]!r} is not in the store {self.path} ({len(unknown):,} of {len(keys):,} keys are "
                f"unknown; the store's look like {self.keys[0]!r}). Use keys of this store, or draw the split again."
            )
        return order[places]

    @cached_property
    def _sorted_keys(self) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
        """The keys in byte order (N,), and their positions in the store (N,)."""
        names = self._index["key"]
        order = np.argsort(names, kind="stable")
        return names[order], order

    def read(self, indices: ArrayLike) -> list[bytes] | NDArray[np.uint8]:
        """Read n records as stored: :meth:`read_encoded` of a JPEG store, :meth:`read_raw` of a raw one."""
        return self.read_encoded(indices) if self.encoding == "jpeg" else self.read_raw(indices)

    def images(self, indices: ArrayLike) -> list[NDArray[np.uint8]]:
        """Read and decode n images, each (H, W, 3) uint8 RGB; grey pixels are repeated to three channels.

        Raises:
            ValueError: an index is outside the store.
            RecordError: a record cannot be read, its CRC32C is wrong or it cannot be decoded; shard and key are named.
        """
        if self.encoding == "raw":
            return list(_three_channels(self.read_raw(indices)))
        positions = self._positions(indices)
        return [self._decode(*pair) for pair in zip(positions.tolist(), self._read_buffers(positions), strict=True)]

    def read_encoded(self, indices: ArrayLike) -> list[bytes]:
        """Read n encoded images of a JPEG store.

        Raises:
            ValueError: an index is outside the store, or the store is raw.
            RecordError: a record cannot be read or its CRC32C is wrong; shard and key are named.
        """
        if self.encoding != "jpeg":
            raise ValueError(f"{self.path} holds raw pixels, not encoded images: use read_raw or images.")
        return [buffer.tobytes() for buffer in self._read_buffers(self._positions(indices))]

    def read_raw(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """Read n images of a raw store as (n, H, W, C) uint8, C 1 or 3.

        Raises:
            ValueError: an index is outside the store, or the store is JPEG.
            RecordError: a record cannot be read or its CRC32C is wrong; shard and key are named.
        """
        if self.shape is None:
            raise ValueError(f"{self.path} holds encoded images, not raw pixels: use read_encoded or images.")
        positions = self._positions(indices)
        pixels = np.empty((len(positions), math.prod(self.shape)), dtype=np.uint8)
        self._fill(positions, pixels)
        return pixels.reshape(len(positions), *self.shape)

    def _positions(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Check indices: (n,) integers in [0, N)."""
        positions = np.asarray(indices)
        if positions.ndim != 1 or (positions.size and positions.dtype.kind not in "iu"):
            raise ValueError(f"{self.path}: indices must be a list of integers, got {indices!r}.")
        outside = positions[(positions < 0) | (positions >= len(self))]
        if outside.size:
            raise ValueError(f"{self.path}: index {outside[0]} is outside the store's {len(self):,} images.")
        return positions.astype(np.int64)

    def _read_buffers(self, positions: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Read n records into parts of one new buffer."""
        bounds = [0, *np.cumsum(self._index["length"][positions], dtype=np.int64).tolist()]
        whole = np.empty(bounds[-1], dtype=np.uint8)
        buffers = [whole[start:stop] for start, stop in pairwise(bounds)]
        self._fill(positions, buffers)
        return buffers

    def _fill(self, positions: NDArray[np.int64], buffers: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> None:
        """Read n records into n buffers of their lengths and check them."""
        if not self._close.alive:
            raise ValueError(f"the store {self.path} was closed: open it again to read.")
        rows = self._index[positions]
        shards, offsets, checksums = rows["shard"].tolist(), rows["offset"].tolist(), rows["crc32c"].tolist()
        for i, buffer in enumerate(buffers):
            try:
                read = self._shards[shards[i]].read_into(buffer, offsets[i])
            except OSError as error:
                raise self._fault(int(positions[i]), f"cannot be read: {error}") from error
            if read < len(buffer):
                raise self._fault(int(positions[i]), f"is cut off: {read:,} of {len(buffer):,} bytes are there")
            if self.check and google_crc32c.value(buffer) != checksums[i]:
                raise self._fault(int(positions[i]), "is damaged: its CRC32C differs from the index")

    def _decode(self, position: int, buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
        try:
            return decode_jpeg(buffer)
        except ValueError as error:
            raise self._fault(position, f"cannot be decoded: {error}") from error

    def _fault(self, position: int, problem: str) -> RecordError:
        """Name a record that cannot be used."""
        key, shard = self.keys[position], self.manifest.shards[int(self._index["shard"][position])].name
        return RecordError(f"record {key!r} in {self.path / shard} {problem}. {REMEDY}", key=key, shard=shard)


class Keys(Sequence[str]):
    """The keys of a store, decoded when asked for: a million strings would cost 100 MB in every process."""

    def __init__(self, column: NDArray[np.bytes_]) -> None:
        """Wrap the (N,) column of UTF-8 keys."""
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> list[str]: ...
    def __getitem__(self, item: int | slice) -> str | list[str]:
        if isinstance(item, slice):
            return [key.decode() for key in self._column[item].tolist()]
        return str(self._column[item].decode())

    def __iter__(self) -> Iterator[str]:
        return iter(self[:])


def _open_shards(path: Path, manifest: Manifest) -> list[ShardFile]:
    """Open all shards for reading."""
    shards: list[ShardFile] = []
    for entry in manifest.shards:
        try:
            shards.append(ShardFile(path / entry.name, entry.data_offset))
        except OSError as error:
            _close_all(shards)
            if error.errno == errno.EMFILE:
                raise StoreError(
                    f"{path} has {len(manifest.shards):,} shards, more files than this process may open: "
                    f"raise the limit (`ulimit -n {4 * len(manifest.shards)}`) or pack with a larger --shard-mib."
                ) from error
            raise StoreError(f"{path / entry.name} cannot be opened: {error.strerror}. {REMEDY}") from error
    return shards


def _close_all(shards: list[ShardFile]) -> None:
    for shard in shards:
        shard.close()


def _three_channels(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, H, W, C) → (n, H, W, 3); grey is repeated."""
    if pixels.shape[-1] == 3:
        return pixels
    repeated = np.empty((*pixels.shape[:-1], 3), dtype=np.uint8)
    for channel in range(3):  # half the time of np.repeat along the short axis
        repeated[..., channel] = pixels[..., 0]
    return repeated


def _frozen(values: NDArray[np.int64]) -> NDArray[np.int64]:
    values.flags.writeable = False
    return values


def _reopen(path: Path, check: bool) -> ImageStore:
    """Unpickle by opening the store in this process."""
    return ImageStore.open(path, check=check)
