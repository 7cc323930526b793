"""One shard, from its images to the file: what a worker does. The same task gives the same bytes anywhere."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paws_hpc.files import atomic_write, file_hash
from paws_hpc.packing.jpeg_policy import JpegPolicy, StandardImage, encoded_anew, standard_jpeg, transcoder
from paws_hpc.packing.sources.base import Images
from paws_hpc.store.format import (
    FLAG_RECOVERED,
    FLAG_REENCODED,
    FLAG_STRIPPED,
    Encoding,
    Omission,
    Packing,
    RecordError,
    ShardEntry,
    ShardIndex,
    StoreError,
)
from paws_hpc.store.shard import ShardHeader, ShardWriter
from paws_hpc.store.workers import in_order, slices

_IMAGES_PER_SLICE = 8
_LARGEST_RECORD = (1 << 32) - 1


@dataclass(frozen=True)
class ShardTask:
    """A shard of n images to build. All but ``number``, ``path`` and ``fingerprint`` decides its bytes."""

    number: int
    """Position among the planned shards."""
    path: Path
    """The file to write."""
    images: Images
    keys: Sequence[str]
    labels: NDArray[np.int64]
    counted: NDArray[np.bool_]
    """(n,) which images are counted in the statistics. These are decoded whatever ``packing.check``, so faults are
    found in them, and repaired, which others may keep."""
    fingerprint: str
    """Of the source files at the time; kept with the result."""
    encoding: Encoding
    source_digest: str
    packing: Packing


@dataclass(frozen=True)
class Change:
    """An image whose stored file is not the source's, and what was done, for people."""

    key: str
    reason: str
    lossless: bool
    """Its pixels are those of the source."""


@dataclass(frozen=True)
class ShardResult:
    """What building a shard gave, apart from the file."""

    number: int
    fingerprint: str
    entry: ShardEntry | None
    """For the manifest; None if every image was skipped, so that there is no file."""
    shape: tuple[int, int, int] | None
    """(H, W, C) of the records of a raw shard."""
    counted: int
    """Images that were counted in the statistics."""
    histogram: list[list[int]] | None
    """For each channel (3, or 1 if grey) how many of their pixels have each value 0..255; None without any."""
    changes: tuple[Change, ...]
    """Images whose file is not the source's, but for metadata taken out."""
    stripped: int
    """Images from which only metadata was taken out."""
    recovered: tuple[Omission, ...]
    skipped: tuple[Omission, ...]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ShardResult:
        """Build the result from parsed JSON; raises KeyError or TypeError where it is something else."""
        return cls(
            **value
            | {
                "entry": None if value["entry"] is None else ShardEntry(**value["entry"]),
                "shape": None if value["shape"] is None else tuple(value["shape"]),
                "changes": tuple(Change(**change) for change in value["changes"]),
                "recovered": tuple(Omission(**omission) for omission in value["recovered"]),
                "skipped": tuple(Omission(**omission) for omission in value["skipped"]),
            }
        )


@dataclass
class _Record:
    """One image ready to be stored; its payload is given up once it is written."""

    key: str
    label: int
    length: int
    crc32c: int
    image: StandardImage
    histogram: NDArray[np.int64] | None


def build_shard(
    task: ShardTask,
    *,
    threads: int,
    advance: Callable[[int], None] = lambda _: None,
    current: list[int] | memoryview | None = None,
) -> ShardResult:
    """Load, check and store the images of one shard; its file appears when it is whole.

    ``advance`` is called with the number of images done since the last call. ``current`` has one number per thread,
    kept at the position of its image + 1, or 0 where it has none.

    Raises:
        RecordError: an image cannot be read and ``packing.on_error`` is ``stop``; its key is named.
        SourceChangedError: the source is not what it was when it was listed.
        StoreError: a raw image has another shape than the others.
        OSError: the file cannot be written.
    """
    records: list[_Record] = []
    skipped: list[Omission] = []
    entry = shape = histogram = None
    with closing(task.images), atomic_write(task.path) as file:
        writer = ShardWriter(file)
        for batch in _prepared(task, threads, [0] * threads if current is None else current):
            for record in batch:
                if isinstance(record, Omission):
                    skipped.append(record)
                    continue
                if task.encoding == "raw":
                    assert record.image.pixels is not None, "a raw source gives pixels"
                    shape = shape or record.image.pixels.shape
                    if record.image.pixels.shape != shape:
                        raise StoreError(
                            f"image {record.key!r} is {record.image.pixels.shape}, the others {shape}: raw needs one "
                            "shape."
                        )
                    record.image.pixels = None
                writer.add(record.image.payload)
                record.image.payload = b""
                if record.histogram is not None:
                    histogram = record.histogram if histogram is None else histogram + record.histogram
                records.append(record)
            advance(len(batch))
        if records:
            index = _index(records)
            header = ShardHeader(
                count=len(index),
                uuid=index.uuid,
                encoding=task.encoding,
                shape=shape,
                packer=task.packing.packer,
                source_digest=task.source_digest,
            )
            offset, size = writer.finish(index, header)
    if records:
        entry = ShardEntry(
            name=task.path.name,
            count=header.count,
            bytes=task.path.stat().st_size,
            data_offset=offset,
            data_bytes=size,
            file_hash=file_hash(task.path),
            uuid=header.uuid,
        )
    else:
        task.path.unlink()
    changed = [
        (Change(record.key, record.image.changed, not record.image.flags & FLAG_REENCODED), record.image.flags)
        for record in records
        if record.image.changed is not None
    ]
    # Half of a data set may have lost its metadata, and the flag tells which: these images are counted, not listed.
    listed = [(change, flags) for change, flags in changed if flags != FLAG_STRIPPED]
    return ShardResult(
        number=task.number,
        fingerprint=task.fingerprint,
        entry=entry,
        shape=shape,
        counted=sum(record.histogram is not None for record in records),
        histogram=None if histogram is None else histogram.tolist(),
        changes=tuple(change for change, _ in listed),
        stripped=len(changed) - len(listed),
        recovered=tuple(Omission(change.key, change.reason) for change, flags in listed if flags & FLAG_RECOVERED),
        skipped=tuple(skipped),
    )


def _index(records: Sequence[_Record]) -> ShardIndex:
    """The index of records that lie one after another."""
    length = np.array([record.length for record in records], dtype="<u8")
    keys = [record.key.encode() for record in records]
    return ShardIndex(
        offset=(np.cumsum(length, dtype="<u8") - length).astype("<u8"),
        length=length.astype("<u4"),
        crc32c=np.array([record.crc32c for record in records], dtype="<u4"),
        label=np.array([record.label for record in records], dtype="<i4"),
        width=np.array([record.image.width for record in records], dtype="<u4"),
        height=np.array([record.image.height for record in records], dtype="<u4"),
        flags=np.array([record.image.flags for record in records], dtype="<u4"),
        key_blob=np.frombuffer(b"".join(keys), dtype="u1"),
        key_offset=np.cumsum([0, *map(len, keys)]).astype("<u8"),
    )


def _prepared(task: ShardTask, threads: int, current: list[int] | memoryview) -> Iterator[list[_Record | Omission]]:
    """Load and check the images on threads (decoding releases the GIL), giving them back in order."""
    slots = itertools.count()
    mine = threading.local()

    def take_slot() -> None:
        mine.slot = next(slots)

    def prepare(positions: Sequence[int]) -> list[_Record | Omission]:
        outcomes = []
        for position in positions:
            current[mine.slot] = position + 1
            outcomes.append(_prepare(task, position))
        current[mine.slot] = 0
        return outcomes

    with ThreadPoolExecutor(threads, initializer=take_slot) as pool:
        yield from in_order(pool, prepare, slices(len(task.keys), _IMAGES_PER_SLICE))


def _prepare(task: ShardTask, position: int) -> _Record | Omission:
    """Load and check one image; one that cannot be read becomes an omission with the reason, or stops packing."""
    key, packing, count = task.keys[position], task.packing, bool(task.counted[position])
    try:
        content = task.images.load(position)
        if task.encoding == "raw":
            assert not isinstance(content, bytes), "a raw source gives pixels"
            height, width, _ = content.shape
            image = StandardImage(content.tobytes(), height, width, content, flags=0, changed=None)
        else:
            policy = JpegPolicy(
                max_short_side=packing.max_short_side,
                pixels=count,
                decode=packing.check == "decode",
                # Repair may run where the transcoder is not installed: shards that do not need it can be repaired.
                transcode=packing.transcoder is not None and transcoder() is not None,
            )
            image = (
                standard_jpeg(content, policy)
                if isinstance(content, bytes)
                else encoded_anew(content, "pixels of a data set", 0, policy)
            )
    except StoreError:
        raise  # not this image but the whole source
    except OSError as error:
        return _omitted(task, key, f"it cannot be read: {error.strerror}")
    except ValueError as error:
        return _omitted(task, key, str(error))
    length = len(image.payload)
    if length > _LARGEST_RECORD:
        return _omitted(task, key, f"it takes {length:,} bytes, a record can have {_LARGEST_RECORD:,}")
    histogram = pixel_histogram(image.pixels) if count and image.pixels is not None else None
    if task.encoding == "jpeg":
        image.pixels = None  # many records wait for their turn
    return _Record(key, int(task.labels[position]), length, google_crc32c.value(image.payload), image, histogram)


def _omitted(task: ShardTask, key: str, reason: str) -> Omission:
    if task.packing.on_error == "skip":
        return Omission(key, reason)
    raise RecordError(
        f"image {key!r} cannot be packed: {reason}. "
        "Repair or remove it, or leave such images out with --on-error skip.",
        key=key,
    )


def pixel_histogram(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each value 0..255 occurs in each channel of an image (H, W, C); (C, 256) int64."""
    channels = pixels.shape[-1]
    # PIL counts four times as fast as numpy.
    counts = Image.fromarray(pixels if channels == 3 else pixels[..., 0]).histogram()
    return np.array(counts, dtype=np.int64).reshape(channels, 256)
