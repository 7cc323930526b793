"""The joined index of a store: what a reader needs to know of every record, in one file that is mapped into memory.

``index.bin`` is opened in the same time whatever its size: nothing is read but its header and a table of the hashes of
its 8 KiB blocks, and a block is checked when the first of its bytes is asked for. Keys and labels are read on demand.

Legend: N records of the store.
"""

from __future__ import annotations

import io
import mmap
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

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
_BLOCK = 8192
_HASH = np.dtype("<u8")
_BLOCKS_AHEAD = 512
_IN_MEMORY_BYTES = 256 << 20
_CHUNK = 1 << 16


class StoreIndex:
    """The index of N records, by position in the store. Safe to share between threads and through a fork.

    A mapped file must keep its bytes: the system kills a process (SIGBUS) that touches what was cut off. So every look
    first compares the file's length. What remains is a file that is cut within the microseconds of a look, or, on a
    network file system, before this node hears of it, or while somebody reads the array :attr:`labels` or a column
    that was handed out. Nothing here cuts a file: they are replaced by rename, which leaves the old one to its readers.

    Attributes:
        hash: 128-bit xxh3 of the table of block hashes and the size, 32 hexadecimal digits: it stands for every byte.
        checked: whether every byte was found to fit its hash.
    """

    def __init__(self, content: bytes | memoryview | mmap.mmap, *, name: str = INDEX_NAME) -> None:
        """Interpret the bytes of an index file.

        Raises:
            StoreError: they are not those of an index, or not of their length.
        """
        self._name = name
        self._mapped = content if isinstance(content, mmap.mmap) else None
        if self._mapped is not None:
            self._mapped.madvise(mmap.MADV_RANDOM)  # reading ahead would read sixteen times what is asked for
        self._content = whole = np.frombuffer(content, np.uint8)
        if len(whole) < _HEADER.size:
            raise StoreError(f"{name} is not an index: it has only {len(whole)} bytes.")
        magic, self._count, self._key_bytes = _HEADER.unpack(whole[: _HEADER.size].tobytes())
        self._labels_start = _HEADER.size + self._count * ROW.itemsize
        self._keys_start = self._labels_start + self._count * _LABEL.itemsize
        self._stop = self._keys_start + self._key_bytes
        blocks = -(-self._stop // _BLOCK)
        if magic != _MAGIC or len(whole) != self._stop + blocks * _HASH.itemsize:
            raise StoreError(f"{name} is not an index of this version, or was cut off.")
        self._hashes = np.frombuffer(whole[self._stop :].tobytes(), _HASH)
        self._checked = np.zeros(blocks, np.bool_)
        self.checked = False
        self._rows = whole[_HEADER.size : self._labels_start].view(ROW)
        self._labels = whole[self._labels_start : self._keys_start].view(_LABEL)
        self._labels.flags.writeable = False
        self.hash = xxhash.xxh3_128_hexdigest(self._hashes.tobytes() + self._stop.to_bytes(8, "little"))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, column: str) -> NDArray[Any]:
        """A whole column (N,): ``label``, or a field of :data:`ROW`; a view of the file."""
        if column == "label":
            return self.labels
        self._check(_HEADER.size, self._labels_start)
        values: NDArray[Any] = self._rows[column]
        return values

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) int64, a read-only view of the file, all of which is read and checked at the first use."""
        self._check(self._labels_start, self._keys_start)
        return self._labels

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.void]:
        """Copy the rows (n,) of type :data:`ROW` at n positions in [0, N).

        Raises:
            StoreError: they were damaged since they were written, or the file was cut off.
        """
        self._check_length()
        if not self.checked:
            starts = _HEADER.size + positions * ROW.itemsize
            self._check_blocks(starts // _BLOCK)
            self._check_blocks((starts + ROW.itemsize - 1) // _BLOCK)
        return self._rows.take(positions)  # half the time of self._rows[positions], which is read field by field

    def label(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Copy the labels (n,) int64 at n positions in [0, N); raises as :meth:`rows`."""
        self._check_length()
        self._check_blocks((self._labels_start + positions * _LABEL.itemsize) // _BLOCK)
        self._check_blocks((self._labels_start + (positions + 1) * _LABEL.itemsize - 1) // _BLOCK)
        labels: NDArray[np.int64] = self._labels[positions]
        return labels

    def keys(self, positions: NDArray[np.int64]) -> list[bytes]:
        """The keys in UTF-8 of n positions in [0, N)."""
        rows = self.rows(positions)
        starts = self._keys_start + rows["key_start"].astype(np.int64)
        stops = starts + rows["key_length"]
        for blocks in (starts // _BLOCK, (stops - 1) // _BLOCK):
            self._check_blocks(blocks)
        if len(rows) and int(rows["key_length"].max()) > _BLOCK:  # the blocks in between
            self._check(int(starts.min()), int(stops.max()))
        content = self._content
        return [content[start:stop].tobytes() for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]

    def check(self) -> None:
        """Read and check every byte.

        Raises:
            StoreError: the index is damaged.
        """
        self._check(0, self._stop)
        self.checked = True

    def save(self, file: BinaryIO) -> None:
        """Write the index to a file."""
        file.write(self._content.data)

    def _check_length(self) -> None:
        """Find out, while that is still an error and not the end of the process, that a mapped file was cut off."""
        if self._mapped is not None and (found := self._mapped.size()) < len(self._content):
            raise StoreError(
                f"{self._name} was cut off while it was in use: {found:,} of {len(self._content):,} bytes are there. "
                "End what writes into the store and start again; the file is made anew from the shards."
            )

    def _check(self, start: int, stop: int) -> None:
        """Check the blocks in which the bytes ``start`` to ``stop - 1`` lie."""
        self._check_length()
        first, last = start // _BLOCK, -(-stop // _BLOCK)
        if stop <= start or self._checked[first:last].all():
            return
        for block in range(first, last, _BLOCKS_AHEAD):
            blocks = np.arange(block, min(block + _BLOCKS_AHEAD, last))
            self._check_blocks(blocks)

    def _check_blocks(self, blocks: NDArray[np.int64]) -> None:
        """Check blocks that nobody has asked for yet; two threads that meet here do the same work twice."""
        unchecked = blocks[~self._checked[blocks]]
        if not len(unchecked):
            return
        new = np.unique(unchecked).tolist()
        if self._mapped is not None:
            for block in new:  # all at once, where one after the other would wait for the disk each time
                self._mapped.madvise(mmap.MADV_WILLNEED, block * _BLOCK, _BLOCK)
        for block in new:
            part = self._content[block * _BLOCK : min((block + 1) * _BLOCK, self._stop)]
            if xxhash.xxh3_64_intdigest(part.data) != self._hashes[block]:
                raise StoreError(
                    f"{self._name} is damaged: block {block} differs from its hash. Remove the file; it is made anew "
                    "from the shards."
                )
            self._checked[block] = True


def join_indexes(indexes: Iterable[ShardIndex]) -> StoreIndex:
    """Join the indexes of all shards, in memory: about 76 bytes per record. ``indexes`` is gone through four times."""
    file = io.BytesIO()
    _write(file, indexes)
    return StoreIndex(file.getbuffer())


def build_index(folder: Path, indexes: Iterable[ShardIndex]) -> StoreIndex:
    """Join the indexes of all shards into ``index.bin``; memory holds those of one shard at a time.

    Args:
        folder: the store.
        indexes: in the shards' order; gone through four times.

    Raises:
        OSError: the folder cannot be written.
    """
    with atomic_write(folder / INDEX_NAME) as file:
        _write(file, indexes)
    return _open(folder / INDEX_NAME)


def dataset_digest(
    joined: StoreIndex, *, encoding: Encoding, shape: tuple[int, int, int] | None, classes: Sequence[str]
) -> str:
    """Identity of the data set as training sees it: 32 hexadecimal digits.

    It covers the sequence of (key, label, length, CRC32C), the encoding, the shape and the class names. Two stores with
    the same digest give the same image at every position; the shard size does not matter.
    """
    header = {"encoding": encoding, "shape": shape, "classes": list(classes), "count": len(joined)}
    digest = xxhash.xxh3_128(value_digest(header).encode())
    joined.check()
    for start, stop in _chunks(len(joined)):
        digest.update(b"\0" * (start > 0) + b"\0".join(joined.keys(np.arange(start, stop))))
    for column, kind in (("label", "<i4"), ("length", "<u4"), ("crc32c", "<u4")):
        for start, stop in _chunks(len(joined)):
            digest.update(joined[column][start:stop].astype(kind).tobytes())
    return digest.hexdigest()


def load_index(folder: Path, manifest: Manifest) -> StoreIndex:
    """Return the joined index that the manifest describes.

    ``index.bin`` is used when its hash is the manifest's; otherwise it is derived from the shards again and written,
    unless the folder cannot be written, in which case it lives in memory.

    Raises:
        StoreError: a shard is missing or damaged, or its index is not the one that was packed; the shard is named.
    """
    cached = read_cached_index(folder, manifest)
    if cached is not None:
        return cached
    try:
        return make_index(folder, manifest)
    except OSError:  # a cache only: the folder may be read-only or its disk full
        return _that_fits(join_indexes(_ShardIndexes(folder, manifest)), folder, manifest)


def make_index(folder: Path, manifest: Manifest) -> StoreIndex:
    """Derive ``index.bin`` from the shards and write it in place of what is there.

    Raises:
        StoreError: as in :func:`load_index`.
        OSError: it cannot be written.
    """
    return _that_fits(build_index(folder, _ShardIndexes(folder, manifest)), folder, manifest)


def _that_fits(joined: StoreIndex, folder: Path, manifest: Manifest) -> StoreIndex:
    if joined.hash != manifest.index_hash:
        raise StoreError(f"{folder}: the shards' indexes do not give the manifest's index_hash. {REMEDY}")
    return joined


def read_cached_index(folder: Path, manifest: Manifest) -> StoreIndex | None:
    """Map ``index.bin`` into memory; None when it is absent, unreadable or not the manifest's.

    An index of at most 256 MiB (three million records) is read whole and checked: a mapped file that others truncate
    kills the process. Damage in a larger one is found at the first use of the damaged part.
    """
    try:
        index = _open(folder / INDEX_NAME)
    except (OSError, StoreError):
        return None
    return index if index.hash == manifest.index_hash and len(index) == manifest.count else None


def _open(path: Path) -> StoreIndex:
    """Read a small index file and check it; map a large one into memory."""
    with open(path, "rb") as file:
        small = file.seek(0, io.SEEK_END) <= _IN_MEMORY_BYTES
        file.seek(0)
        content = file.read() if small else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    index = StoreIndex(content, name=str(path))
    if small:
        index.check()
    return index


def write_index(folder: Path, joined: StoreIndex) -> None:
    """Write ``index.bin`` atomically.

    Raises:
        OSError: the folder cannot be written.
    """
    with atomic_write(folder / INDEX_NAME) as file:
        joined.save(file)


def _write(file: BinaryIO, indexes: Iterable[ShardIndex]) -> None:
    """Write header, rows, labels, keys and the hashes of all blocks, going through the shards once for each."""
    out = _BlockHasher(file)
    sizes = np.array([(len(index), len(index.key_blob)) for index in indexes], np.int64)
    count, key_bytes = sizes.sum(axis=0).tolist()
    out.write(_HEADER.pack(_MAGIC, count, key_bytes))
    before = 0
    for index in indexes:
        rows = np.empty(len(index), ROW)
        for column in ("offset", "length", "crc32c", "width", "height", "flags"):
            rows[column] = getattr(index, column)
        rows["key_start"] = before + index.key_offset[:-1]
        rows["key_length"] = np.diff(index.key_offset)
        out.write(rows.tobytes())
        before += len(index.key_blob)
    for index in indexes:
        out.write(index.label.astype(_LABEL).tobytes())
    for index in indexes:
        out.write(index.key_blob.tobytes())
    file.write(out.hashes())


class _BlockHasher:
    """Writes to a file and keeps the hash of each of its blocks."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._rest = file, b""
        self._hashes: list[NDArray[np.uint64]] = []

    def write(self, content: bytes) -> None:
        self._file.write(content)
        content = self._rest + content
        whole = len(content) // _BLOCK * _BLOCK
        self._add(content[:whole])
        self._rest = content[whole:]

    def hashes(self) -> bytes:
        """Those of all blocks, the last of which may be shorter, as 8 little-endian bytes each."""
        self._add(self._rest)
        return b"".join(part.tobytes() for part in self._hashes)

    def _add(self, content: bytes) -> None:
        parts = memoryview(content)
        starts = range(0, len(content), _BLOCK)
        self._hashes.append(np.array([xxhash.xxh3_64_intdigest(parts[at : at + _BLOCK]) for at in starts], _HASH))


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    """``range(count)`` as (start, stop) of parts that fit into memory."""
    return ((start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))


class _ShardIndexes(Iterable[ShardIndex]):
    """The indexes of a store's shards, read and checked each time they are gone through."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest

    def __iter__(self) -> Iterator[ShardIndex]:
        for entry in self._manifest.shards:
            path = self._folder / entry.name
            index = read_shard(path).index
            if index.uuid != entry.uuid:
                raise StoreError(
                    f"{path} holds another index than was packed (uuid {index.uuid}, not {entry.uuid}). {REMEDY}"
                )
            yield index
