"""One shard as an HDF5 file: laid out by h5py, filled and read by plain file operations (shards/FORMAT.md)."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from paws_hpc.files import atomic_write, file_hash
from paws_hpc.store.format import (
    INDEX_COLUMNS,
    LARGE_ALIGNMENT,
    REMEDY,
    SHARD_FORMAT,
    SHARD_VERSION,
    SMALL_ALIGNMENT,
    Encoding,
    ShardEntry,
    ShardIndex,
    StoreError,
)

_LIBVER = ("v108", "v110")
"""Format bounds: site tools of HDF5 1.10 read the files, and metadata blocks carry checksums."""


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
    version: int = SHARD_VERSION


def write_shard(path: Path, payloads: Sequence[bytes], index: ShardIndex, header: ShardHeader) -> ShardEntry:
    """Write a shard whole: temporary file → fsync → rename.

    h5py lays the file out in memory, with ``/data`` allocated but unwritten; then head, payloads and tail are written
    as to any file. So HDF5 never meets a full disk, which it takes badly: errors in destructors, files left open.

    Raises:
        OSError: the file cannot be written, the disk is full included; nothing stays at ``path``.
    """
    size = sum(len(payload) for payload in payloads)
    head, tail = _lay_out(size, index, header)
    with atomic_write(path) as file:
        file.writelines((head, *payloads, tail))
    return ShardEntry(
        name=path.name,
        count=len(index),
        bytes=path.stat().st_size,
        data_offset=len(head),
        data_bytes=size,
        file_hash=file_hash(path),
        uuid=header.uuid,
    )


def _lay_out(size: int, index: ShardIndex, header: ShardHeader) -> tuple[bytes, bytes]:
    """Make the HDF5 file and return what lies before and after the ``size`` bytes of its ``/data``."""
    image = io.BytesIO()
    with h5py.File(
        image,
        "w",
        libver=_LIBVER,
        alignment_threshold=size,  # only /data is as large as that
        alignment_interval=LARGE_ALIGNMENT if size >= LARGE_ALIGNMENT else SMALL_ALIGNMENT,
    ) as file:
        for name, value in vars(header).items():
            if value is not None:
                file.attrs[name] = value
        for column, kind in INDEX_COLUMNS.items():
            file.create_dataset(f"index/{column}", data=getattr(index, column), dtype=kind)
        file.create_dataset("keys/blob", data=index.key_blob, dtype="u1")
        file.create_dataset("keys/offset", data=index.key_offset, dtype="<u8")
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        properties.set_obj_track_times(False)  # a time stamp would make equal shards differ
        space = h5py.h5s.create_simple((size,))
        data = h5py.h5d.create(file.id, b"data", h5py.h5t.STD_U8LE, space, dcpl=properties)
        offset = data.get_offset()
    assert offset is not None, "a contiguous data set that is allocated early has an offset"
    whole = image.getvalue()
    return whole[:offset].ljust(offset, b"\0"), whole[offset + size :]


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
            attributes = dict(file.attrs)
            contents = _contents(file, attributes)
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing. {REMEDY}") from error
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:  # what h5py raises on damaged metadata
        raise StoreError(f"{path} is damaged or not a shard: HDF5 says {error}. {REMEDY}") from error
    if contents.header.format != SHARD_FORMAT or contents.header.version != SHARD_VERSION:
        raise StoreError(f"{path} is not a shard of version {SHARD_VERSION}, its attributes are {attributes}. {REMEDY}")
    return contents


def _contents(file: h5py.File, attributes: dict[str, Any]) -> ShardContents:
    """Read everything but the records from an open shard."""
    shape = attributes.get("shape")
    header = ShardHeader(
        count=int(attributes["count"]),
        uuid=str(attributes["uuid"]),
        encoding=attributes["encoding"],
        shape=None if shape is None else (int(shape[0]), int(shape[1]), int(shape[2])),
        packer=str(attributes["packer"]),
        source_digest=str(attributes["source_digest"]),
        format=str(attributes["format"]),
        version=int(attributes["version"]),
    )
    index = ShardIndex(
        **{column: file[f"index/{column}"][()].astype(kind) for column, kind in INDEX_COLUMNS.items()},
        key_blob=file["keys/blob"][()].astype("u1"),
        key_offset=file["keys/offset"][()].astype("<u8"),
    )
    offset = file["data"].id.get_offset()
    return ShardContents(header, index, None if offset is None else int(offset), int(file["data"].size))


class ShardFile:
    """The records of one shard, open for reading from any thread or forked process.

    ``preadv`` at an offset needs no shared file position. Without an offset of ``/data`` (a file that other tools wrote
    anew), h5py reads instead: it opens the file for every record, which is slow but works for any layout.
    """

    def __init__(self, path: Path, data_offset: int | None) -> None:
        """Open the file; raises OSError."""
        self._descriptor: int | None = None
        self.path = path
        self.data_offset = data_offset
        if data_offset is not None:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        self.close()

    def read_into(self, buffer: NDArray[np.uint8], offset: int) -> int:
        """Fill ``buffer`` from ``/data`` at ``offset``; returns the bytes read, fewer only where the file ends.

        Raises:
            OSError: the file cannot be read, or no ``/data`` is in it any more.
        """
        if self.data_offset is None:
            try:
                with h5py.File(self.path, "r", locking=False) as file:
                    part = file["data"][offset : offset + len(buffer)]
                buffer[: len(part)] = part
            except (KeyError, RuntimeError, TypeError, ValueError) as error:  # h5py on damaged metadata
                raise OSError(errno.EIO, f"HDF5 says {error}", str(self.path)) from error
            return len(part)
        assert self._descriptor is not None, "nobody reads a shard after closing it"
        place = self.data_offset + offset
        read = os.preadv(self._descriptor, [buffer.data], place)
        while 0 < read < len(buffer):  # network file systems may give less than was asked for
            more = os.preadv(self._descriptor, [buffer[read:].data], place + read)
            if not more:
                break
            read += more
        return read

    def close(self) -> None:
        """Close the file. A second call would close whoever got the descriptor's number next, so it does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
