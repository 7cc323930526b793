"""The store's on-disk contract as types: constants, the manifest, the columns of a shard's index (shards/FORMAT.md).

Legend: N records of the store, n records of one shard, H x W x C one raw image.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import xxhash
from numpy.typing import NDArray

from paws_hpc.command import program
from paws_hpc.files import read_record, value_digest

FORMAT = "paws-hpc-store"
SHARD_FORMAT = "paws-hpc-shard"
VERSIONS, SHARD_VERSIONS = (3, 4), (2, 3)
"""Stores and shards without records of :data:`FLAGS_OF_VERSION_4` are of the first, to the byte."""
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.bin"
UNDERWAY_NAME = ".packing"
MOVING_NAME = f"{UNDERWAY_NAME}/complete.json"
USERS_NAME = ".users"
"""In a node's local copy of a store: the lock that its readers share."""

Encoding = Literal["jpeg", "raw"]
"""How records are read: each as its flags say, by default a JPEG file; or all as H*W*C pixels of one shape."""

FLAG_REENCODED = 1
"""The pixels are not the source's: encoded as JPEG, reduced in size, or scaled from 16 bits."""
FLAG_PROGRESSIVE = 2
"""The record is a progressive JPEG, which decodes about three times slower than a baseline one."""
FLAG_RECOVERED = 4
"""The source file was damaged or unusual and only the lenient decoder could read it."""
FLAG_STRIPPED = 8
"""Metadata, a preview or bytes after the image were taken out of the source's JPEG; its pixels are the same."""
FLAG_MADE_BASELINE = 16
"""The source was a progressive JPEG; its coefficients were written anew as a baseline one, without loss."""
FLAG_TURNED = 32
"""The image was turned as the orientation in its metadata says, as viewers show it."""
FLAG_SHRUNK = 64
"""The image was reduced in size, as the packer was asked to."""
FLAG_GREY = 128
"""The record has one channel."""
FLAG_PIXELS = 256
"""The record is H*W*C pixels, of an image whose source is no JPEG."""
FLAG_PNG = 512
"""The record is a PNG file, of such an image whose file is small beside its pixels."""
FLAGS_OF_VERSION_4 = FLAG_GREY | FLAG_PIXELS | FLAG_PNG

INDEX_COLUMNS: dict[str, str] = {
    "offset": "<u8",
    "length": "<u4",
    "crc32c": "<u4",
    "label": "<i4",
    "width": "<u4",
    "height": "<u4",
    "flags": "<u4",
}
"""Data sets below ``/index`` of a shard and their little-endian types; each has n entries."""

REMEDY = f"`{program('verify')} --full` names all faults; restore the file or pack again with --force."
"""What to do about a damaged store."""

LARGE_ALIGNMENT = 4 << 20
"""Alignment of ``/data`` in shards with at least that much data: a stripe or block of most parallel file systems."""
SMALL_ALIGNMENT = 4096
"""Alignment of ``/data`` in smaller shards: one page, so that a tiny store stays tiny."""


class StoreError(ValueError):
    """A store that is absent, damaged or not what was asked for; the message names the file and the remedy."""


class RecordError(StoreError):
    """One record that cannot be used.

    Attributes:
        key: the record's key.
        shard: name of the shard that holds it; None before it is packed.
    """

    def __init__(self, message: str, *, key: str, shard: str | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.shard = shard

    def __reduce__(self) -> tuple[object, ...]:
        return partial(RecordError, **vars(self)), self.args


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says about one shard."""

    name: str
    count: int
    """Records."""
    bytes: int
    """Size of the whole file."""
    data_offset: int | None
    """Where ``/data`` begins in the file; None where HDF5 cannot say, then records are read through h5py."""
    data_bytes: int
    """Length of ``/data``."""
    file_hash: str
    """:func:`paws_hpc.files.file_hash` of the file."""
    uuid: str
    """:meth:`ShardIndex.uuid`."""


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of the pixels per channel, in units of the full scale ([0, 1]), channels RGB.

    A grey store has three equal values.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    images: int
    """Images that were counted."""
    method: Literal["exact", "sample"]
    """``exact``: all images; ``sample``: every k-th in packing order, at most 2,000."""

    @property
    def scale(self) -> tuple[float, float, float]:
        """By what normalised pixels are divided: ``std``, or 1 for a channel that is the same in every pixel."""
        red, green, blue = (value or 1.0 for value in self.std)
        return red, green, blue


@dataclass(frozen=True)
class Origin:
    """Where the images came from: the kind of source, its options and its digest. Never a path."""

    kind: str
    digest: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Packing:
    """How the store was packed; with the origin it determines every byte."""

    packer: str
    """Version of paws_hpc."""
    seed: int
    shard_bytes: int
    """Bytes of the source's images that make a shard."""
    on_error: Literal["stop", "skip"]
    max_short_side: int | None = None
    """Images with a longer short side, in pixels, were shrunk to it; None: none were."""
    check: Literal["decode", "structure"] = "decode"
    """How JPEGs that are stored as they are were checked: by decoding them, or in older stores by segments only."""
    transcoder: str | None = None
    """What wrote progressive JPEGs as baseline ones and turned images without loss; None: neither was done so."""


@dataclass(frozen=True)
class Omission:
    """An image that the packer changed or left out, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: the last file written, so that a folder which has one is a complete store."""

    encoding: Encoding
    shape: tuple[int, int, int] | None
    """(H, W, C) of every record of a raw store, C 1 or 3; None for JPEG."""
    count: int
    """N."""
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    statistics: Statistics
    digest: str
    """:func:`paws_hpc.store.index.dataset_digest`: the sequence of records, whatever the shard size."""
    index_hash: str
    """:attr:`paws_hpc.store.index.StoreIndex.hash`, by which ``index.bin`` is recognised."""
    origin: Origin
    packing: Packing
    reencoded: dict[str, int]
    """Reason → number of images that were encoded anew, at some loss."""
    rewritten: dict[str, int]
    """What was done → number of images whose file was changed but whose pixels are the same."""
    recovered: tuple[Omission, ...]
    skipped: tuple[Omission, ...]
    shards: tuple[ShardEntry, ...]
    version: int = VERSIONS[0]

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values, keys in the order of FORMAT.md, with a checksum of them all at the end."""
        values = {"format": FORMAT, "version": self.version, **asdict(self)}
        return values | {"checksum": value_digest(values)}

    @cached_property
    def checksum(self) -> str:
        """Identity of the store to the byte: SHA-256 of the manifest, which has the hash of every shard."""
        checksum: str = self.to_json()["checksum"]
        return checksum


def shard_name(number: int) -> str:
    """File name of a shard, counted from 0; names of many sort by number up to 100,000 of them."""
    return f"shard-{number:05d}.h5"


def read_manifest(folder: Path) -> Manifest:
    """Read a store's manifest.

    Raises:
        StoreError: there is none, it is not JSON, of another format or version, a field is missing, or the store is
            about to be replaced by another.
    """
    path = folder / MANIFEST_NAME
    if (folder / MOVING_NAME).exists():
        raise StoreError(
            f"{folder} is not a complete image store: the shards of a new pack are being moved into it. If no pack "
            "is running, finish it with the command that began it."
        )
    try:
        value = read_record(path)
    except FileNotFoundError as error:
        raise StoreError(
            f"{folder} is not a complete image store: it has no {MANIFEST_NAME}. "
            f"Check the path, or (re)pack it with `{program('pack')}`."
        ) from error
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}). Restore it or pack the store again with --force.") from error
    if value.get("format") != FORMAT:
        raise StoreError(f"{path} is not the manifest of an image store: 'format' is not {FORMAT!r}.")
    if value.get("version") not in VERSIONS:
        raise StoreError(
            f"{path} has store version {value.get('version')!r}, this program reads {VERSIONS}: "
            "use the matching paws_hpc or pack the store again with --force."
        )
    return _manifest(value, path)


def _manifest(value: dict[str, Any], path: Path) -> Manifest:
    """Build the dataclass from parsed JSON; every missing or mistyped field is an error that names ``path``."""
    try:
        statistics = value["statistics"]
        manifest = Manifest(
            encoding=value["encoding"],
            shape=None if value["shape"] is None else tuple(value["shape"]),
            count=int(value["count"]),
            classes=tuple(value["classes"]),
            class_counts=tuple(value["class_counts"]),
            statistics=Statistics(
                mean=tuple(statistics["mean"]),
                std=tuple(statistics["std"]),
                images=int(statistics["images"]),
                method=statistics["method"],
            ),
            digest=value["digest"],
            index_hash=value["index_hash"],
            origin=Origin(**value["origin"]),
            packing=Packing(**value["packing"]),
            reencoded=dict(value["reencoded"]),
            rewritten=dict(value.get("rewritten", {})),  # stores of before it was counted
            recovered=tuple(Omission(**entry) for entry in value["recovered"]),
            skipped=tuple(Omission(**entry) for entry in value["skipped"]),
            shards=tuple(ShardEntry(**entry) for entry in value["shards"]),
            version=value["version"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path} is damaged: field {error} is missing or wrong. Restore it or pack the store again with --force."
        ) from error
    if manifest.encoding not in get_args(Encoding):
        raise StoreError(f"{path}: encoding={manifest.encoding!r} is not one of {', '.join(get_args(Encoding))}.")
    if manifest.count != sum(shard.count for shard in manifest.shards):
        raise StoreError(f"{path} is damaged: count={manifest.count} is not the sum of its shards' counts.")
    for shard in manifest.shards:
        if shard.name != os.path.basename(shard.name) or not shard.name.endswith(".h5"):
            raise StoreError(f"{path}: shard {shard.name!r} is not the name of a file in the store's folder.")
    return manifest


@dataclass(frozen=True)
class ShardIndex:
    """The index of one shard: columns of :data:`INDEX_COLUMNS` with n entries, and the keys.

    ``key_blob`` (bytes,) uint8 is all keys in UTF-8 without separators; key i is ``[key_offset[i]:key_offset[i + 1]]``,
    ``key_offset`` (n + 1,) uint64.
    """

    offset: NDArray[np.uint64]
    length: NDArray[np.uint32]
    crc32c: NDArray[np.uint32]
    label: NDArray[np.int32]
    width: NDArray[np.uint32]
    height: NDArray[np.uint32]
    flags: NDArray[np.uint32]
    key_blob: NDArray[np.uint8]
    key_offset: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def key_bytes(self) -> list[bytes]:
        """The keys in UTF-8."""
        blob, bounds = self.key_blob.tobytes(), self.key_offset.tolist()
        return [blob[start:stop] for start, stop in pairwise(bounds)]

    @property
    def uuid(self) -> str:
        """Identity of the shard's content: a name-based UUID over all columns, CRC32C of the records included."""
        digest = xxhash.xxh3_128()
        for field in fields(self):
            column: NDArray[Any] = getattr(self, field.name)
            digest.update(f"{field.name} {len(column)}\n".encode())
            digest.update(np.ascontiguousarray(column).tobytes())
        raw = bytearray(digest.digest())
        raw[6] = (raw[6] & 0x0F) | 0x80  # version 8 of RFC 9562: bits of our own making
        raw[8] = (raw[8] & 0x3F) | 0x80
        text = raw.hex()
        return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
