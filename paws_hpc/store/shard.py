"""One shard as an HDF5 file: laid out by h5py, filled and read by plain file operations (shards/FORMAT.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from paws_hpc.files import atomic_write, file_hash
from paws_hpc.store.format import (
    INDEX_COLUMNS,
    LARGE_ALIGNMENT,
    SHARD_FORMAT,
    SMALL_ALIGNMENT,
    VERSION,
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
    version: int = VERSION


def write_shard(path: Path, payloads: Sequence[bytes], index: ShardIndex, header: ShardHeader) -> ShardEntry:
    """Write a shard whole: temporary file → fsync → rename.

    h5py lays the file out with ``/data`` allocated but unwritten; the payloads are then written at its offset as to any
    file. So the records exist once in memory, and a full disk is an ordinary error of ``write``.

    Raises:
        OSError: the file cannot be written, the disk is full included; nothing stays at ``path``.
    """
    size = sum(len(payload) for payload in payloads)
    with atomic_write(path) as file:
        data_offset = _lay_out(Path(file.name), size, index, header)
        file.seek(data_offset)
        file.writelines(payloads)
    return ShardEntry(
        name=path.name,
        count=len(index),
        bytes=path.stat().st_size,
        data_offset=data_offset,
        data_bytes=size,
        file_hash=file_hash(path),
        uuid=header.uuid,
    )


def _lay_out(path: Path, size: int, index: ShardIndex, header: ShardHeader) -> int:
    """Create the HDF5 structure with everything but the bytes of ``/data`` and return their offset in the file."""
    with h5py.File(
        path,
        "w",
        libver=_LIBVER,
        locking=False,
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
    return int(offset)


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
    remedy = "Restore the file or pack the store again with --force."
    try:
        with h5py.File(path, "r", locking=False) as file:
            attributes = dict(file.attrs)
            if attributes.get("format") != SHARD_FORMAT or int(attributes.get("version", 0)) != VERSION:
                raise StoreError(f"{path} is not a shard of version {VERSION}: {attributes}. {remedy}")
            shape = attributes.get("shape")
            header = ShardHeader(
                count=int(attributes["count"]),
                uuid=str(attributes["uuid"]),
                encoding=attributes["encoding"],
                shape=None if shape is None else (int(shape[0]), int(shape[1]), int(shape[2])),
                packer=str(attributes["packer"]),
                source_digest=str(attributes["source_digest"]),
            )
            columns = {column: file[f"index/{column}"][()].astype(kind) for column, kind in INDEX_COLUMNS.items()}
            index = ShardIndex(
                **columns,
                key_blob=file["keys/blob"][()].astype("u1"),
                key_offset=file["keys/offset"][()].astype("<u8"),
            )
            data = file["data"]
            offset = data.id.get_offset()
            return ShardContents(header, index, None if offset is None else int(offset), int(data.size))
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing. {remedy}") from error
    except (OSError, KeyError, RuntimeError, TypeError) as error:
        raise StoreError(f"{path} is damaged: HDF5 says {error}. {remedy}") from error


def read_through_h5py(path: Path, start: int, stop: int) -> NDArray[np.uint8]:
    """Read ``/data[start:stop]``, shorter where the data set ends; slow (it opens the file), but works for any layout.

    Raises:
        OSError: HDF5 refuses the file.
    """
    with h5py.File(path, "r", locking=False) as file:
        part: NDArray[np.uint8] = file["data"][start:stop]
        return part
