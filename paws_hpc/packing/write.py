"""One shard, from its images to the file: what a worker does. The same task gives the same bytes anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paws_hpc.files import atomic_write, file_hash
from paws_hpc.packing.sources.base import Images
from paws_hpc.packing.standard import ImagePolicy, StandardImage, from_pixels, standard_image, transcoder
from paws_hpc.store.format import (
    FLAG_GREY,
    FLAG_STRIPPED,
    FLAGS_OF_VERSION_4,
    SHARD_VERSIONS,
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

_IMAGES_PER_SLICE = {"jpeg": 2, "raw": 8}  # few where an image may take tens of megabytes: several slices wait
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
    """(n,) which images the statistics count. These are decoded whatever ``packing.check``."""
    fingerprint: str
    """Of the source files at the time; kept with the result."""
    encoding: Encoding
    lossless: bool
    """Whether images that are no colour JPEGs keep their pixels."""
    source_digest: str
    packing: Packing


@dataclass(frozen=True)
class Change:
    """An image whose stored file is not the source's, and what was done, for people."""

    key: str
    reason: str
    flags: int
    """Bits ``FLAG_*``."""


@dataclass
class ShardResult:
    """What building a shard gave, apart from the file."""

    number: int
    fingerprint: str
    entry: ShardEntry | None = None
    """For the manifest; None if every image was skipped, so that there is no file."""
    shape: tuple[int, int, int] | None = None
    """(H, W, C) of the records of a raw shard."""
    counted: int = 0
    """Images that the statistics count."""
    histogram: list[list[int]] | None = None
    """For each channel (3, or 1 if grey) how many of their pixels have each value 0..255; None without any."""
    changes: list[Change] = field(default_factory=list)
    """Images whose file is not the source's, but for metadata taken out."""
    stripped: int = 0
    """Images from which only metadata was taken out: perhaps half of a data set, so they are not listed."""
    skipped: list[Omission] = field(default_factory=list)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ShardResult:
        """Build the result from parsed JSON; raises KeyError or TypeError where it is something else."""
        return cls(
            **value
            | {
                "entry": None if value["entry"] is None else ShardEntry(**value["entry"]),
                "shape": None if value["shape"] is None else tuple(value["shape"]),
                "changes": [Change(**change) for change in value["changes"]],
                "skipped": [Omission(**omission) for omission in value["skipped"]],
            }
        )


_Prepared: TypeAlias = tuple[StandardImage, int, NDArray[np.int64] | None]
"""An image ready to be stored, the CRC32C of its record, and its histogram if the statistics count it."""


def build_shard(
    task: ShardTask,
    *,
    threads: int,
    advance: Callable[[int], None] = lambda _: None,
) -> ShardResult:
    """Load, check and store the images of one shard; its file appears when it is whole.

    ``advance`` is called with the number of images done since the last call.

    Raises:
        RecordError: an image cannot be read and ``packing.on_error`` is ``stop``; its key is named.
        SourceChangedError: the source is not what it was when it was listed.
        StoreError: a raw image has another shape than the others.
        OSError: the file cannot be written.
    """
    result = ShardResult(task.number, task.fingerprint)
    keys: list[bytes] = []
    rows: list[tuple[int, ...]] = []
    histogram: NDArray[np.int64] | None = None

    def prepare(positions: range) -> list[tuple[str, int, _Prepared | str]]:
        return [(task.keys[at], int(task.labels[at]), _prepare(task, at)) for at in positions]

    with closing(task.images), atomic_write(task.path) as file, ThreadPoolExecutor(threads) as pool:
        writer = ShardWriter(file)
        # Decoding releases the GIL.
        for batch in in_order(pool, prepare, slices(len(task.keys), _IMAGES_PER_SLICE[task.encoding])):
            for key, label, prepared in batch:
                if isinstance(prepared, str):
                    result.skipped.append(Omission(key, prepared))
                    continue
                image, crc32c, of_image = prepared
                if task.encoding == "raw":
                    assert image.pixels is not None, "a raw source gives pixels"
                    result.shape = result.shape or image.pixels.shape
                    if image.pixels.shape != result.shape:
                        raise StoreError(
                            f"image {key!r} is {image.pixels.shape}, the others {result.shape}: raw needs one shape."
                        )
                writer.add(image.payload)
                keys.append(key.encode())
                rows.append((len(image.payload), crc32c, label, image.width, image.height, image.flags))
                if of_image is not None:
                    result.counted += 1
                    histogram = of_image if histogram is None else histogram + of_image
                if image.flags & ~FLAG_GREY == FLAG_STRIPPED:
                    result.stripped += 1
                elif image.changed is not None:
                    result.changes.append(Change(key, image.changed, image.flags))
            advance(len(batch))
        if rows:
            index = _index(keys, rows)
            header = ShardHeader(
                count=len(index),
                uuid=index.uuid,
                encoding=task.encoding,
                shape=result.shape,
                packer=task.packing.packer,
                source_digest=task.source_digest,
                version=SHARD_VERSIONS[bool((index.flags & FLAGS_OF_VERSION_4).any())],
            )
            offset, data_bytes = writer.finish(index, header)
    if not rows:
        task.path.unlink()
        return result
    if histogram is not None:
        result.histogram = histogram.tolist()
    result.entry = ShardEntry(
        name=task.path.name,
        count=header.count,
        bytes=task.path.stat().st_size,
        data_offset=offset,
        data_bytes=data_bytes,
        file_hash=file_hash(task.path),
        uuid=header.uuid,
    )
    return result


def _index(keys: Sequence[bytes], rows: Sequence[tuple[int, ...]]) -> ShardIndex:
    """The index of records that lie one after another, from their lengths, CRC32Cs, labels, widths, heights, flags."""
    lengths, crc32c, labels, widths, heights, flags = np.array(rows, dtype=np.int64).T
    return ShardIndex(
        offset=(np.cumsum(lengths) - lengths).astype("<u8"),
        length=lengths.astype("<u4"),
        crc32c=crc32c.astype("<u4"),
        label=labels.astype("<i4"),
        width=widths.astype("<u4"),
        height=heights.astype("<u4"),
        flags=flags.astype("<u4"),
        key_blob=np.frombuffer(b"".join(keys), dtype="u1"),
        key_offset=np.cumsum([0, *map(len, keys)]).astype("<u8"),
    )


def _prepare(task: ShardTask, position: int) -> _Prepared | str:
    """Load and check one image; one that cannot be read stops packing, or gives the reason why it is left out."""
    count = bool(task.counted[position])
    try:
        image = _image(task, task.images.load(position), count=count)
    except StoreError:
        raise  # not this image but the whole source
    except (OSError, ValueError) as error:
        reason = f"it cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        if task.packing.on_error == "skip":
            return reason
        key = task.keys[position]
        raise RecordError(
            f"image {key!r} cannot be packed: {reason}. "
            "Repair or remove it, or leave such images out with --on-error skip.",
            key=key,
        ) from error
    histogram = pixel_histogram(image.pixels) if count and image.pixels is not None else None
    if task.encoding == "jpeg":
        image.pixels = None  # many images wait for their turn
    return image, google_crc32c.value(image.payload), histogram


def _image(task: ShardTask, content: bytes | NDArray[np.uint8], *, count: bool) -> StandardImage:
    """What the store holds of an image; ValueError if it cannot."""
    policy = ImagePolicy(
        max_short_side=task.packing.max_short_side,
        pixels=count,
        decode=task.packing.check == "decode",
        # Repair may run where the transcoder is not installed: shards that do not need it can be repaired.
        transcode=task.packing.transcoder is not None and transcoder() is not None,
        lossless=task.lossless,
    )
    if isinstance(content, bytes):
        assert task.encoding == "jpeg", "a raw source gives pixels"
        image = standard_image(content, policy)
    elif task.encoding == "jpeg":
        image = from_pixels(content, "pixels of a data set", 0, policy, kept_from=content.size * task.lossless)
    else:
        height, width, _ = content.shape
        image = StandardImage(content.tobytes(), height, width, content, flags=0, changed=None)
    if len(image.payload) > _LARGEST_RECORD:
        raise ValueError(f"it takes {len(image.payload):,} bytes, a record can have {_LARGEST_RECORD:,}")
    return image


def pixel_histogram(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each value 0..255 occurs in each channel of an image (H, W, C); (C, 256) int64."""
    channels = pixels.shape[-1]
    # PIL counts four times as fast as numpy.
    counts = Image.fromarray(pixels if channels == 3 else pixels[..., 0]).histogram()
    return np.array(counts, dtype=np.int64).reshape(channels, 256)
