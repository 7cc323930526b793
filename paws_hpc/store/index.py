"""The index of a store, ``index.bin`` (shards/FORMAT.md): size, checksum and key of every record, mapped into memory.

Legend: N records of the store, n records that are looked up.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from paws_hpc.files import atomic_write, value_digest
from paws_hpc.store.format import INDEX_NAME, REMEDY, Encoding, Manifest, ShardIndex, StoreError
from paws_hpc.store.shard import read_shard

ROW = np.dtype(
    [
        ("offset", "<u8"),
        ("key_start", "<u8"),
        ("length", "<u4"),
        ("crc32c", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("flags", "<u4"),
        ("key_length", "<u4"),
    ]
)
"""One record: columns of its shard's index (``offset`` counts from the shard's ``/data``), and where its key lies."""

_MAGIC = b"paws-hpc-index\0\1"
_HEADER = struct.Struct("<16sQQ")  # magic, records, bytes of keys
_LABEL = np.dtype("<i8")
_HASH = np.dtype("<u8")
_BLOCK = 8192
CHECKED_BYTES = 256 << 20
"""An index up to this size (three million records) is read and checked when it is opened."""
_CHUNK = 1 << 16

Indexes = Callable[[], Iterable[ShardIndex]]
"""Reads the indexes of all shards. It is called four times, so that memory holds one shard's at a time."""


class StoreIndex:
    """The index of N records, by position in the store. Safe to share between threads and through a fork.

    A mapped file must keep its bytes: the system kills a process (SIGBUS) that reads what was cut off. Nothing here
    cuts an index file; it is replaced by a rename, which leaves the old one to its readers.

    Attributes:
        hash: 128-bit xxh3 of the block hashes and the size, 32 hexadecimal digits: it stands for every byte.
        labels: (N,) int64, a read-only view of the file.
    """

    def __init__(self, content: NDArray[np.uint8], *, name: str = INDEX_NAME) -> None:
        """Interpret the bytes of an index file; StoreError if they are not those of an index."""
        self._name, self._content = name, content
        if len(content) < _HEADER.size:
            raise StoreError(f"{name} is not an index: it has only {len(content)} bytes.")
        magic, self._count, key_bytes = _HEADER.unpack(content[: _HEADER.size].tobytes())
        labels_start = _HEADER.size + self._count * ROW.itemsize
        self._keys_start = labels_start + self._count * _LABEL.itemsize
        self._stop = self._keys_start + key_bytes
        if magic != _MAGIC or len(content) != self._stop + -(-self._stop // _BLOCK) * _HASH.itemsize:
            raise StoreError(f"{name} is not an index of this version, or was cut off.")
        self._rows = content[_HEADER.size : labels_start].view(ROW)
        self.labels: NDArray[np.int64] = content[labels_start : self._keys_start].view(_LABEL)
        self.labels.flags.writeable = False
        self.hash = xxhash.xxh3_128_hexdigest(content[self._stop :].tobytes() + self._stop.to_bytes(8, "little"))

    @classmethod
    def open(cls, path: Path) -> StoreIndex:
        """Map an index file into memory; one of at most :data:`CHECKED_BYTES` is checked, a larger one by ``verify``.

        Raises StoreError if the file is no index, or damaged.
        """
        if not path.stat().st_size:
            raise StoreError(f"{path} is empty.")  # which cannot be mapped
        index = cls(np.asarray(np.memmap(path, np.uint8, mode="r")), name=str(path))
        if len(index._content) <= CHECKED_BYTES:
            index.check()
        return index

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, column: str) -> NDArray[Any]:
        """A field of :data:`ROW` of all records (N,), a view of the file."""
        values: NDArray[Any] = self._rows[column]
        return values

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.void]:
        """Copy the rows (n,) of type :data:`ROW` at n positions in [0, N)."""
        return self._rows.take(positions)  # half the time of self._rows[positions], which is read field by field

    def keys(self, positions: NDArray[np.int64]) -> list[bytes]:
        """The keys in UTF-8 of n positions in [0, N)."""
        rows = self.rows(positions)
        starts = self._keys_start + rows["key_start"].astype(np.int64)
        stops, content = starts + rows["key_length"], self._content
        return [content[start:stop].tobytes() for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]

    def check(self) -> None:
        """Compare every byte with its block's hash; StoreError if one differs."""
        stored = np.frombuffer(self._content[self._stop :].tobytes(), _HASH)
        for block, start in enumerate(range(0, self._stop, _BLOCK)):
            content = self._content[start : min(start + _BLOCK, self._stop)]
            if xxhash.xxh3_64_intdigest(content.data) != stored[block]:
                raise StoreError(
                    f"{self._name} is damaged: block {block} differs from its hash. Remove the file; it is made anew "
                    "from the shards."
                )

    def find(self, keys: Sequence[str], *, seed: int) -> NDArray[np.int64]:
        """Positions (n,) int64 of n keys, -1 where a key is not in the store, which was packed with this seed."""
        encoded = [key.encode() for key in keys]
        wanted = key_hashes(encoded, seed)
        if 8 * len(keys) >= len(self):  # reading all keys once is faster
            everything = (np.arange(start, stop) for start, stop in _chunks(len(self)))
            ranks = np.concatenate([self._ranks(positions, seed) for positions in everything])
            return self._settle(encoded, wanted, np.searchsorted(ranks, wanted).astype(np.int64), seed)
        positions = [
            self._settle(encoded[start:stop], wanted[start:stop], self._search(wanted[start:stop], seed), seed)
            for start, stop in _chunks(len(keys))
        ]
        return np.concatenate(positions) if positions else np.empty(0, np.int64)

    def in_order(self, *, seed: int, samples: int = 64) -> bool:
        """Whether some records across the store are in the order of (seed, key), as packing left them."""
        ranks = self._ranks(np.unique(np.linspace(0, len(self) - 1, samples).astype(np.int64)), seed)
        return bool((ranks[1:] >= ranks[:-1]).all())

    def _ranks(self, positions: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
        """The hashes that the records are sorted by."""
        return key_hashes(self.keys(positions), seed)

    def _search(self, wanted: NDArray[np.uint64], seed: int) -> NDArray[np.int64]:
        """First positions (n,) whose rank is at least the wanted one, by halving."""
        low, high = np.zeros(len(wanted), np.int64), np.full(len(wanted), len(self), np.int64)
        while (open_ := np.flatnonzero(low < high)).size:
            middle = (low[open_] + high[open_]) // 2
            below = self._ranks(middle, seed) < wanted[open_]
            low[open_[below]], high[open_[~below]] = middle[below] + 1, middle[~below]
        return low

    def _settle(
        self, keys: Sequence[bytes], wanted: NDArray[np.uint64], positions: NDArray[np.int64], seed: int
    ) -> NDArray[np.int64]:
        """Compare the keys at ``positions`` with ``keys``; where another key has the same hash, look behind it."""
        settled = np.full(len(keys), -1, np.int64)
        inside = np.flatnonzero(positions < len(self))
        for number, key in zip(inside.tolist(), self.keys(positions[inside]), strict=True):
            position, here = int(positions[number]), key
            while here != keys[number] and xxhash.xxh3_64_intdigest(here, seed) == wanted[number]:
                position += 1
                if position == len(self):
                    break
                here = self.keys(np.array([position]))[0]
            if here == keys[number]:
                settled[number] = position
        return settled


class Keys(Sequence[str]):
    """The N keys in store order, read on demand: a hundred million strings would fill the memory."""

    def __init__(self, index: StoreIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> list[str]: ...
    def __getitem__(self, item: int | slice) -> str | list[str]:
        if isinstance(item, slice):
            return list(self.at(np.arange(*item.indices(len(self)))))
        if not -len(self) <= item < len(self):
            raise IndexError(f"key {item} of {len(self):,}")
        return self._index.keys(np.array([item % len(self)]))[0].decode()

    def __iter__(self) -> Iterator[str]:
        for start, stop in _chunks(len(self)):
            yield from self[start:stop]

    def at(self, positions: NDArray[np.int64]) -> Iterator[str]:
        """Yield the keys at n positions in [0, N), in their order."""
        for start, stop in _chunks(len(positions)):
            yield from (key.decode() for key in self._index.keys(positions[start:stop]))


def join_indexes(indexes: Indexes) -> StoreIndex:
    """Join the indexes of all shards in memory: about 76 bytes per record, and one shard's."""
    file = io.BytesIO()
    _write(file, indexes)
    return StoreIndex(np.frombuffer(file.getbuffer(), np.uint8))


def build_index(folder: Path, indexes: Indexes) -> StoreIndex:
    """Join the indexes of all shards into ``index.bin``, in memory of one shard's."""
    with atomic_write(folder / INDEX_NAME) as file:
        _write(file, indexes)
    return StoreIndex.open(folder / INDEX_NAME)


def load_index(folder: Path, manifest: Manifest) -> StoreIndex:
    """Return the index that the manifest describes.

    ``index.bin`` is used if its hash is the manifest's. Otherwise it is made from the shards again and written; where
    the folder cannot be written, it lives in memory.

    Raises:
        StoreError: a shard is missing or damaged, or its index is not the one that was packed; the shard is named.
    """
    cached = read_cached_index(folder, manifest)
    if cached is not None:
        return cached
    indexes = partial(_shard_indexes, folder, manifest)
    try:
        index = build_index(folder, indexes)
    except OSError:
        index = join_indexes(indexes)
    if index.hash != manifest.index_hash:
        raise StoreError(f"{folder}: the shards' indexes do not give the manifest's index_hash. {REMEDY}")
    return index


def read_cached_index(folder: Path, manifest: Manifest, *, check: bool = False) -> StoreIndex | None:
    """Open ``index.bin``; None when it is absent, unreadable, not the manifest's or, as far as it is read, damaged.

    ``check`` reads all of it, whatever its size.
    """
    try:
        index = StoreIndex.open(folder / INDEX_NAME)
        if check:
            index.check()
    except (OSError, StoreError):
        return None
    return index if index.hash == manifest.index_hash and len(index) == manifest.count else None


def dataset_digest(
    index: StoreIndex, *, encoding: Encoding, shape: tuple[int, int, int] | None, classes: Sequence[str]
) -> str:
    """Identity of the data set as training sees it: 32 hexadecimal digits.

    It covers the sequence of (key, label, length, CRC32C), the encoding, the shape and the class names. Two stores with
    the same digest give the same image at every position; the shard size does not matter.
    """
    header = {"encoding": encoding, "shape": shape, "classes": list(classes), "count": len(index)}
    digest = xxhash.xxh3_128(value_digest(header).encode())
    for start, stop in _chunks(len(index)):
        digest.update(b"\0" * (start > 0) + b"\0".join(index.keys(np.arange(start, stop))))
    for column, kind in ((index.labels, "<i4"), (index["length"], "<u4"), (index["crc32c"], "<u4")):
        for start, stop in _chunks(len(index)):
            digest.update(column[start:stop].astype(kind).tobytes())
    return digest.hexdigest()


def _write(file: BinaryIO, indexes: Indexes) -> None:
    """Write header, rows, labels and keys, then the hash of every block of them."""
    hashes: list[int] = []
    rest = b""
    for content in _pieces(indexes):
        file.write(content)
        blocks = memoryview(rest + content)
        whole = len(blocks) // _BLOCK * _BLOCK
        hashes += [xxhash.xxh3_64_intdigest(blocks[at : at + _BLOCK]) for at in range(0, whole, _BLOCK)]
        rest = bytes(blocks[whole:])
    if rest:
        hashes.append(xxhash.xxh3_64_intdigest(rest))
    file.write(np.array(hashes, _HASH).tobytes())


def _pieces(indexes: Indexes) -> Iterator[bytes]:
    """The content of ``index.bin`` before the hashes, in order."""
    count, key_bytes = (
        np.array([(len(index), len(index.key_blob)) for index in indexes()], np.int64).sum(axis=0).tolist()
    )
    yield _HEADER.pack(_MAGIC, count, key_bytes)
    before = 0
    for index in indexes():
        rows = np.empty(len(index), ROW)
        for column in ("offset", "length", "crc32c", "width", "height", "flags"):
            rows[column] = getattr(index, column)
        rows["key_start"] = before + index.key_offset[:-1]
        rows["key_length"] = np.diff(index.key_offset)
        yield rows.tobytes()
        before += len(index.key_blob)
    for index in indexes():
        yield index.label.astype(_LABEL).tobytes()
    for index in indexes():
        yield index.key_blob.tobytes()


def key_hashes(keys: Sequence[bytes], seed: int) -> NDArray[np.uint64]:
    """The hashes (n,) by which records of a store are sorted."""
    return np.fromiter((xxhash.xxh3_64_intdigest(key, seed) for key in keys), np.uint64, count=len(keys))


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    """``range(count)`` as (start, stop) of pieces that fit into memory."""
    return ((start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))


def _shard_indexes(folder: Path, manifest: Manifest) -> Iterator[ShardIndex]:
    """Read and check the indexes of a store's shards."""
    for entry in manifest.shards:
        path = folder / entry.name
        index = read_shard(path).index
        if index.uuid != entry.uuid:
            raise StoreError(
                f"{path} holds another index than was packed (uuid {index.uuid}, not {entry.uuid}). {REMEDY}"
            )
        yield index
