"""ImageStore: random access to packed images from any number of threads and forked processes.

The files are opened once, by plain ``open``; records are read with ``preadv``, which has no file position to share. No
h5py handle stays open: those must not cross a fork, and h5py reads under one lock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paws_hpc.store.faults import check_sizes
from paws_hpc.store.format import REMEDY, Encoding, Manifest, RecordError, StoreError, read_manifest
from paws_hpc.store.index import StoreIndex, load_index, read_cached_index
from paws_hpc.store.keys import Keys, find_keys, in_order
from paws_hpc.store.local import LocalFolder
from paws_hpc.store.records import Records
from paws_hpc.store.shardset import ShardSet, UnreadableError
from paws_hpc.store.substitutes import Substitutes

Read = TypeVar("Read")


class ImageStore:
    """A packed image data set, read-only.

    Safe to share between threads, to inherit through a fork and to pickle (the other process opens it anew).

    Attributes:
        path: the store's folder.
        manifest: everything that is known about the store.
        shards: the open files; knows how many of them are local copies.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        index: StoreIndex,
        shards: ShardSet,
        *,
        check: bool,
        copy_to: Path | None,
        max_substitutes: int,
    ) -> None:
        """Use :meth:`open`."""
        self.path = path
        self.manifest = manifest
        self.check = check
        self.copy_to = copy_to
        self.shards = shards
        self._index = index
        self._keys = Keys(index)
        self._records = Records(path, manifest, index, shards, check=check)
        self._substitutes = Substitutes(index, limit=max_substitutes)

    @classmethod
    def open(
        cls, path: Path | str, *, check: bool = True, copy_to: Path | str | None = None, max_substitutes: int = 0
    ) -> ImageStore:
        """Open a store, which takes the same time and memory whatever its number of records.

        Args:
            path: the folder with ``manifest.json``.
            check: compare the CRC32C of every record that is read (about 25 µs per 110 KB).
            copy_to: folder on the node's own disk to which :func:`paws_hpc.store.start_staging` copies the store. A
                shard is read from there as soon as its copy is complete, and from ``path`` before, or if the copy turns
                out missing or damaged.
            max_substitutes: how many damaged records may be replaced by the next good one of their class, each with a
                warning. 0: a damaged record is an error.

        Raises:
            StoreError: the store is incomplete, or a shard is missing, truncated or damaged; the shard is named, and
                where the cached index is at hand the first record that is lost. Or ``copy_to`` cannot be written.
        """
        path = Path(path)
        manifest = read_manifest(path)
        check_sizes(path, manifest)
        copy_to = None if copy_to is None else Path(copy_to)
        index = _local_index(copy_to, manifest) or load_index(path, manifest)
        shards = ShardSet(path, manifest, copy_to=copy_to)
        return cls(path, manifest, index, shards, check=check, copy_to=copy_to, max_substitutes=max_substitutes)

    def strict(self) -> ImageStore:
        """The same store, of which every record is checked and every damaged one an error, whatever this one allows.

        It shares the open files: closing either closes both. Reading from it leaves :attr:`substitutes` as they are.
        """
        return ImageStore(
            self.path, self.manifest, self._index, self.shards, check=True, copy_to=self.copy_to, max_substitutes=0
        )

    def close(self) -> None:
        """Close the shards; reading afterwards is an error."""
        self.shards.close()

    def __enter__(self) -> ImageStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.path, self.check, self.copy_to, self._substitutes.limit)

    def __repr__(self) -> str:
        return f"ImageStore({str(self.path)!r}, {len(self):,} images, {len(self.classes)} classes, {self.encoding})"

    def __len__(self) -> int:
        return len(self._index)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) int64, positions in :attr:`classes`; read-only, mapped into memory where the store is large."""
        return self._index.labels

    @property
    def widths(self) -> NDArray[np.int64]:
        """(N,) int64, pixels, a new array; :meth:`sizes` gives those of some records."""
        return self._index["width"].astype(np.int64)

    @property
    def heights(self) -> NDArray[np.int64]:
        """(N,) int64, pixels, a new array; :meth:`sizes` gives those of some records."""
        return self._index["height"].astype(np.int64)

    @property
    def flags(self) -> NDArray[np.int64]:
        """(N,) int64, the bits ``FLAG_*`` of :mod:`paws_hpc.store.format`; a new array."""
        return self._index["flags"].astype(np.int64)

    @property
    def keys(self) -> Keys:
        """The N keys in store order."""
        return self._keys

    @property
    def substitutes(self) -> dict[int, int]:
        """Position of each damaged record that was replaced so far → position of the record that stands in for it."""
        return self._substitutes.found

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
        """Find those of n ``keys`` that are in the store.

        Returns:
            their positions (m,) int64, in their order, and which of the n they are (n,) bool.

        Raises:
            StoreError: a key was not found, and the records are not in the order in which it would have been.
        """
        seed = self.manifest.packing.seed
        positions = find_keys(self._index, keys, seed=seed)
        known = positions >= 0
        if not known.all() and not in_order(self._index, seed=seed):
            raise StoreError(f"{self.path}: its records are not in the order of packing.seed={seed}. {REMEDY}")
        return positions[known], known

    def sizes(self, indices: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Heights and widths (n,) int64 in pixels of n images, as they are read: of the substitute where one stands in.

        Raises:
            ValueError: an index is outside the store.
        """
        rows = self._index.rows(self._substitutes.apply(self._positions(indices)))
        return rows["height"].astype(np.int64), rows["width"].astype(np.int64)

    def lengths(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Bytes (n,) int64 of n records as stored: of the substitute where one stands in.

        Raises:
            ValueError: an index is outside the store.
        """
        return self._index.rows(self._substitutes.apply(self._positions(indices)))["length"].astype(np.int64)

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
        return self._with_substitutes(self._records.decoded, self._positions(indices))

    def read_encoded(self, indices: ArrayLike) -> list[bytes]:
        """Read n encoded images of a JPEG store.

        Raises:
            ValueError: an index is outside the store, or the store is raw.
            RecordError: a record cannot be read or its CRC32C is wrong; shard and key are named.
        """
        if self.encoding != "jpeg":
            raise ValueError(f"{self.path} holds raw pixels, not encoded images: use read_raw or images.")
        return self._with_substitutes(self._records.encoded, self._positions(indices))

    def each(self, indices: ArrayLike) -> Iterator[NDArray[np.uint8]]:
        """Yield n records as stored, one after the other, each (bytes,) in a buffer of this thread's.

        The next record, or anything else that the thread reads from the store, overwrites it. Twice as fast as
        :meth:`read` where every record is used up at once: new memory costs as much as reading.

        Raises:
            ValueError: an index is outside the store.
            RecordError: a record cannot be read or its CRC32C is wrong; shard and key are named.
        """
        remaining = self._positions(indices)
        while True:
            asked = self._substitutes.apply(remaining)
            try:
                yield from self._records.each(asked)
            except UnreadableError as error:
                self._substitutes.add(self._records.unreadable(asked, error))
                remaining = remaining[error.number :]
            else:
                return

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
        self._with_substitutes(lambda asked: self._records.fill(asked, pixels), positions)
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

    def _with_substitutes(self, read: Callable[[NDArray[np.int64]], Read], positions: NDArray[np.int64]) -> Read:
        """Read records, others in place of damaged ones as far as that is allowed."""
        while True:
            try:
                return read(self._substitutes.apply(positions))
            except RecordError as error:
                self._substitutes.add(error)


def _local_index(copy_to: Path | None, manifest: Manifest) -> StoreIndex | None:
    """The index of the node's own copy if it was checked whole; None if there is none, or it is too large for that.

    Damage in one that is mapped into memory is found only when it is used, where the store's own would be whole.
    """
    if copy_to is None:
        return None
    index = read_cached_index(LocalFolder(copy_to, manifest).path, manifest)
    return index if index is not None and index.checked else None


def _three_channels(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, H, W, C) → (n, H, W, 3); grey is repeated."""
    if pixels.shape[-1] == 3:
        return pixels
    repeated = np.empty((*pixels.shape[:-1], 3), dtype=np.uint8)
    for channel in range(3):  # half the time of np.repeat along the short axis
        repeated[..., channel] = pixels[..., 0]
    return repeated


def _reopen(path: Path, check: bool, copy_to: Path | None, max_substitutes: int) -> ImageStore:
    """Unpickle by opening the store in this process."""
    return ImageStore.open(path, check=check, copy_to=copy_to, max_substitutes=max_substitutes)
