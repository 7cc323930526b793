"""One shard as an HDF5 file: laid out by h5py, filled and read by plain file operations (shards/FORMAT.md)."""

from __future__ import annotations

import errno
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

from paws_hpc.store.format import (
    INDEX_COLUMNS,
    LARGE_ALIGNMENT,
    REMEDY,
    SHARD_FORMAT,
    SHARD_VERSIONS,
    SMALL_ALIGNMENT,
    Encoding,
    ShardIndex,
    StoreError,
)

_LIBVER = ("v108", "v110")
"""Format bounds: site tools of HDF5 1.10 read the files, and metadata blocks carry checksums.

All but one kind of block: the heap of strings of variable length, in whose damaged sizes HDF5 can loop for ever. So
strings are of fixed length here, and a file with others is refused before HDF5 looks at them.
"""


_MOST_EXPANSION = 64
"""Of numbers that other tools compressed, over the size of the file: a small file must not ask for all memory."""


@dataclass(frozen=True)
class ShardHeader:
    """The root attributes of a shard."""

    count: int
    uuid: str
    encoding: Encoding
    shape: tuple[int, int, int] | None
    packer: str
    """Version of paws_hpc that wrote the file."""
    source_digest: str
    format: str = SHARD_FORMAT
    version: int = SHARD_VERSIONS[0]


class ShardWriter:
    """Writes a shard as its records come, so that memory holds their index only.

    h5py lays out the HDF5 file in memory, and that is put before and after the records. So HDF5 never meets a full
    disk, which it takes badly. Shards of less than 4 MiB wait in memory: their records begin at another place.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Write to a new binary file, from its beginning."""
        self._file = file
        self._waiting: list[bytes] | None = []
        self._size = 0

    def add(self, payload: bytes) -> None:
        """Append a record; OSError if the file cannot be written."""
        self._size += len(payload)
        if self._waiting is None:
            self._file.write(payload)
            return
        self._waiting.append(payload)
        if self._size >= LARGE_ALIGNMENT:
            self._file.write(bytes(LARGE_ALIGNMENT))  # the head comes last
            self._file.writelines(self._waiting)
            self._waiting = None

    def finish(self, index: ShardIndex, header: ShardHeader) -> tuple[int, int]:
        """Write all but the records, and return offset and length of ``/data``; OSError if that is impossible."""
        assert self._size, "a shard has at least one record"
        head, tail = _lay_out(self._size, index, header)
        if self._waiting is None:
            assert len(head) == LARGE_ALIGNMENT, "attributes and headers take less than 4 MiB"
            self._file.write(tail)
            self._file.seek(0)
            self._file.write(head)
        else:
            self._file.writelines((head, *self._waiting, tail))
        return len(head), self._size


def _lay_out(size: int, index: ShardIndex, header: ShardHeader) -> tuple[bytes, bytes]:
    """Make the HDF5 file and return what lies before and after the ``size`` bytes of its ``/data``."""
    image = _SparseFile()
    with h5py.File(
        image,
        "w",
        libver=_LIBVER,
        alignment_threshold=size,
        alignment_interval=LARGE_ALIGNMENT if size >= LARGE_ALIGNMENT else SMALL_ALIGNMENT,
    ) as file:
        for name, value in vars(header).items():
            if value is not None:
                file.attrs[name] = np.bytes_(value, "utf-8") if isinstance(value, str) else value
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        properties.set_obj_track_times(False)  # a time stamp would make equal shards differ
        space = h5py.h5s.create_simple((size,))
        # Before the index, so that the records begin at the same place however many there are.
        data = h5py.h5d.create(file.id, b"data", h5py.h5t.STD_U8LE, space, dcpl=properties)
        offset = data.get_offset()
        for column, kind in INDEX_COLUMNS.items():
            file.create_dataset(f"index/{column}", data=getattr(index, column), dtype=kind)
        file.create_dataset("keys/blob", data=index.key_blob, dtype="u1")
        file.create_dataset("keys/offset", data=index.key_offset, dtype="<u8")
    assert offset is not None, "a contiguous data set that is allocated early has an offset"
    return image.part(0, offset), image.part(offset + size, image.size)


class _SparseFile:
    """A file in memory that keeps only what is written: the 256 MiB in the middle of a shard take nothing."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, bytes]] = []
        self._place = 0
        self.size = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def write(self, content: bytes | memoryview) -> int:
        piece = bytes(content)
        self._pieces.append((self._place, piece))
        self._place += len(piece)
        self.size = max(self.size, self._place)
        return len(piece)

    def read(self, count: int) -> bytes:
        """Read what was written, zeros where nothing was."""
        content = self.part(self._place, min(self._place + count, self.size))
        self._place += len(content)
        return content

    def readinto(self, buffer: memoryview) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def truncate(self, size: int) -> None:
        self.size = size

    def flush(self) -> None:
        pass

    def part(self, start: int, stop: int) -> bytes:
        content = bytearray(max(stop - start, 0))
        for place, piece in self._pieces:
            first, last = max(place, start), min(place + len(piece), stop)
            if first < last:
                content[first - start : last - start] = piece[first - place : last - place]
        return bytes(content)


@dataclass(frozen=True)
class ShardContents:
    """Everything in a shard but the records: header, index and where ``/data`` lies."""

    header: ShardHeader
    index: ShardIndex
    data_offset: int | None
    data_bytes: int


def read_shard(path: Path) -> ShardContents:
    """Read a shard's header and index; the records are not touched.

    Raises:
        StoreError: the file is missing, is not HDF5 (truncated, metadata damaged) or not a shard of this version.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            attributes = _attributes(file)
            contents = _contents(file, attributes)
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing. {REMEDY}") from error
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:  # what h5py raises on damaged metadata
        raise StoreError(f"{path} is damaged or not a shard: HDF5 says {error}. {REMEDY}") from error
    if contents.header.format != SHARD_FORMAT or contents.header.version not in SHARD_VERSIONS:
        raise StoreError(f"{path} is no shard of versions {SHARD_VERSIONS}, its attributes are {attributes}. {REMEDY}")
    return contents


def _attributes(file: h5py.File) -> dict[str, Any]:
    """The root attributes, strings decoded; ValueError if one is a string of variable length."""
    attributes = {}
    for name in file.attrs:
        text = h5py.check_string_dtype(file.attrs.get_id(name).dtype)
        if text is not None and text.length is None:
            raise ValueError(f"attribute {name!r} is a string of variable length, which no shard of ours has")
        value = file.attrs[name]
        attributes[name] = value.decode() if isinstance(value, bytes) else value
    return attributes


def _contents(file: h5py.File, attributes: dict[str, Any]) -> ShardContents:
    """Read everything but the records from an open shard."""
    shape = _whole_numbers(attributes, "shape", 3) if "shape" in attributes else None
    header = ShardHeader(
        count=_whole_numbers(attributes, "count")[0],
        uuid=str(attributes["uuid"]),
        encoding=attributes["encoding"],
        shape=None if shape is None else (shape[0], shape[1], shape[2]),
        packer=str(attributes["packer"]),
        source_digest=str(attributes["source_digest"]),
        format=str(attributes["format"]),
        version=_whole_numbers(attributes, "version")[0],
    )
    index = ShardIndex(
        **{column: _column(file, f"index/{column}")[()].astype(kind) for column, kind in INDEX_COLUMNS.items()},
        key_blob=_column(file, "keys/blob")[()].astype("u1"),
        key_offset=_column(file, "keys/offset")[()].astype("<u8"),
    )
    if {len(getattr(index, column)) for column in INDEX_COLUMNS} != {len(index.key_offset) - 1}:
        raise ValueError("the columns of its index are of unequal lengths")
    if np.any(np.diff(index.key_offset.astype(np.int64)) < 0) or index.key_offset[-1] != len(index.key_blob):
        raise ValueError("keys/offset does not divide keys/blob")
    data = _column(file, "data")
    offset = data.id.get_offset()
    return ShardContents(header, index, None if offset is None else int(offset), int(data.size))


def _whole_numbers(attributes: dict[str, Any], name: str, count: int = 1) -> list[int]:
    """An attribute of ``count`` whole numbers; ValueError if it is anything else."""
    value = np.asarray(attributes[name])
    if value.dtype.kind not in "iu" or value.shape != (() if count == 1 else (count,)):
        raise ValueError(f"attribute {name!r} is {attributes[name]!r}, not {count} whole numbers")
    return [int(number) for number in value.flat]


def _column(file: h5py.File, name: str) -> h5py.Dataset:
    """A 1-d integer data set; external, virtual and oversized ones are refused before they are read."""
    found = file[name]
    if not isinstance(found, h5py.Dataset) or found.ndim != 1 or found.dtype.kind not in "iu":
        raise ValueError(f"{name} is no list of whole numbers")
    if found.is_virtual or found.external or found.file.filename != file.filename:
        raise ValueError(f"{name} refers to another file, which no shard of ours does")
    # HDF5 allocates whole chunks, which may be longer than a data set that can grow.
    claimed = max(found.nbytes, found.dtype.itemsize * (found.chunks or (0,))[0])
    if claimed > _MOST_EXPANSION * file.id.get_filesize():
        raise ValueError(f"{name} claims to have {claimed:,} bytes")
    return found


class ShardFile:
    """The records of one shard, open for reading from any thread or forked process.

    Where ``data_offset``, of ``/data`` in the file, is None (a file that other tools wrote anew), h5py opens the file
    for every record. ``descriptor`` is None there, and after closing.
    """

    def __init__(self, path: Path, data_offset: int | None) -> None:
        """Open the file; raises OSError."""
        self.descriptor: int | None = None
        self.path = path
        self.data_offset = data_offset
        if data_offset is not None:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        self.close()

    def read_into(self, buffer: NDArray[np.uint8], offset: int) -> int:
        """Fill ``buffer`` from ``/data`` at ``offset``; returns the bytes read, fewer only where the file ends.

        Raises:
            OSError: the file cannot be read, or no ``/data`` is in it any more.
        """
        if self.data_offset is None:
            part = self._read_through_hdf5(len(buffer), offset)
            buffer[: len(part)] = part
            return len(part)
        assert self.descriptor is not None, "nobody reads a shard after closing it"
        place = self.data_offset + offset
        # The array itself: a memoryview of it costs a hundredth of the read. Stubs know its buffer from Python 3.12 on.
        read = os.preadv(self.descriptor, [buffer], place)  # type: ignore[list-item]
        while 0 < read < len(buffer):
            more = os.preadv(self.descriptor, [buffer[read:].data], place + read)
            if not more:
                break
            read += more
        return read

    def _read_through_hdf5(self, length: int, offset: int) -> NDArray[np.uint8]:
        try:
            with h5py.File(self.path, "r", locking=False) as file:
                data = _column(file, "data")
                part: NDArray[np.uint8] = data[offset : offset + length].astype(np.uint8, copy=False)
                return part
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # h5py on damaged metadata
            raise OSError(errno.EIO, f"HDF5 says {error}", str(self.path)) from error

    def close(self) -> None:
        """Close the file. A second call would close whoever got the descriptor's number next, so it does nothing."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)
