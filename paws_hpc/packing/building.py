"""One shard, from its images to the file: what a worker does. The same task gives the same bytes anywhere."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from paws_hpc.files import atomic_write
from paws_hpc.packing.sources.base import Images
from paws_hpc.packing.standard import Standard, StandardImage, encoded_anew, standard_jpeg
from paws_hpc.packing.statistics import PixelSums, add_up, pixel_sums
from paws_hpc.store.format import (
    FLAG_RECOVERED,
    FLAG_REENCODED,
    FLAG_STRIPPED,
    Encoding,
    Omission,
    RecordError,
    ShardEntry,
    ShardIndex,
    StoreError,
)
from paws_hpc.store.shard import ShardHeader, ShardWriter, shard_entry
from paws_hpc.store.workers import in_order, slices

_IMAGES_PER_TASK = 8
_LARGEST_RECORD = (1 << 32) - 1


@dataclass(frozen=True)
class Recipe:
    """What, with its images and which of them are counted, determines a shard's bytes.

    Attributes:
        encoding: of the records.
        packer: version of paws_hpc.
        source_digest: of the whole source.
        on_error: stop at an image that cannot be read, or skip it.
        max_short_side: pixels to which the short side of larger images is shrunk; None leaves them.
        check: how JPEGs that are stored as they are are checked; see ``Packing.check``.
    """

    encoding: Encoding
    packer: str
    source_digest: str
    on_error: Literal["stop", "skip"]
    max_short_side: int | None
    check: Literal["decode", "structure"] = "decode"


@dataclass(frozen=True)
class ShardTask:
    """A shard to build.

    Attributes:
        number: position among the planned shards.
        path: the file to write.
        images: its images in order.
        counted: (n,) bool, which images are counted in the statistics. These are decoded whatever the recipe's check,
            so that faults are found in them, and mended, which in others may not be looked for.
        fingerprint: of the source files at the time; kept with the result.
    """

    number: int
    path: Path
    images: Images
    counted: NDArray[np.bool_]
    fingerprint: str
    recipe: Recipe


@dataclass(frozen=True)
class ShardResult:
    """What building a shard gave, apart from the file.

    Attributes:
        number: position among the planned shards.
        fingerprint: of the source files from which it was built.
        entry: for the manifest; None if every image was skipped, so that there is no file.
        shape: (H, W, C) of the records of a raw shard.
        sums: pixel sums of the images that were counted.
        changes: images whose file is another than the source's, but for metadata taken out.
        stripped: number of images from which only metadata was taken out.
        recovered, skipped: as in the manifest.
    """

    number: int
    fingerprint: str
    entry: ShardEntry | None
    shape: tuple[int, int, int] | None
    sums: PixelSums | None
    changes: tuple[Change, ...] = ()
    stripped: int = 0
    recovered: tuple[Omission, ...] = ()
    skipped: tuple[Omission, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ShardResult:
        """Build the result from parsed JSON; raises KeyError or TypeError where it is something else."""
        return cls(
            number=value["number"],
            fingerprint=value["fingerprint"],
            entry=None if value["entry"] is None else ShardEntry(**value["entry"]),
            shape=None if value["shape"] is None else tuple(value["shape"]),
            sums=None if value["sums"] is None else PixelSums.from_json(value["sums"]),
            changes=tuple(Change(**change) for change in value["changes"]),
            stripped=value["stripped"],
            recovered=tuple(Omission(**omission) for omission in value["recovered"]),
            skipped=tuple(Omission(**omission) for omission in value["skipped"]),
        )


@dataclass(frozen=True)
class Change:
    """An image whose stored file is not the source's.

    Attributes:
        key: of the image.
        reason: what was done, for people.
        lossless: its pixels are those of the source.
    """

    key: str
    reason: str
    lossless: bool


class Board:
    """Where a builder says how far it is; another process may look on.

    Attributes:
        cells: int64 numbers: images done, then for each thread the position of its image in the shard + 1, or 0.
    """

    def __init__(self, cells: memoryview) -> None:
        """Take the cells, at least one for the count and one per thread."""
        self.cells = cells

    @classmethod
    def private(cls, threads: int) -> Board:
        """A board that only this process sees."""
        return cls(memoryview(bytearray(8 * (1 + threads))).cast("q"))

    @property
    def done(self) -> int:
        """Images done."""
        return int(self.cells[0])

    def add(self, images: int) -> None:
        """Count images as done."""
        self.cells[0] += images

    @property
    def current(self) -> list[int]:
        """Positions in the shard of the images that are being looked at."""
        return [cell - 1 for cell in self.cells[1:].tolist() if cell]


def build_shard(task: ShardTask, *, threads: int, board: Board | None = None) -> ShardResult:
    """Load, check and store the images of one shard; its file appears when it is whole.

    Raises:
        RecordError: an image cannot be read and the recipe says to stop; its key is named.
        SourceChangedError: the source is not what it was when it was listed.
        StoreError: a raw image has another shape than the others.
        OSError: the file cannot be written.
    """
    board = board or Board.private(threads)
    tally = _Tally(task)
    try:
        with closing(task.images), atomic_write(task.path) as file:
            writer = ShardWriter(file)
            for batch in _prepared(task, threads, board):
                for outcome in batch:
                    if isinstance(record := tally.take(outcome), _Record):
                        writer.add(record.image.payload)
                board.add(len(batch))
            header, index = tally.header_and_index()
            offset, size = writer.finish(index, header)
    except _NothingLeftError:
        return tally.result(None)
    return tally.result(shard_entry(task.path, header, offset, size))


class _NothingLeftError(Exception):
    """Every image of the shard was skipped."""


@dataclass(frozen=True)
class _Record:
    """One image ready to be stored."""

    key: str
    label: int
    image: StandardImage
    crc32c: int
    sums: PixelSums | None


@dataclass
class _Tally:
    """What is known of the records so far: all but their payloads."""

    task: ShardTask
    shape: tuple[int, ...] | None = None
    keys: list[bytes] = field(default_factory=list)
    columns: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    sums: list[PixelSums] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    stripped: int = 0
    recovered: list[Omission] = field(default_factory=list)
    skipped: list[Omission] = field(default_factory=list)

    def take(self, outcome: _Record | Omission) -> _Record | None:
        """Note a record, which is to be stored, or an unreadable image: skip it or stop there."""
        if isinstance(outcome, Omission):
            if self.task.recipe.on_error == "stop":
                raise RecordError(
                    f"image {outcome.key!r} cannot be packed: {outcome.reason}. "
                    "Repair or remove it, or leave such images out with --on-error skip.",
                    key=outcome.key,
                )
            self.skipped.append(outcome)
            return None
        image = outcome.image
        if self.task.recipe.encoding == "raw" and image.pixels is not None:
            self.shape = self.shape or image.pixels.shape
            if image.pixels.shape != self.shape:
                raise StoreError(
                    f"image {outcome.key!r} is {image.pixels.shape}, the others {self.shape}: raw needs one shape."
                )
        self.keys.append(outcome.key.encode())
        self.columns.append((len(image.payload), outcome.crc32c, outcome.label, image.width, image.height, image.flags))
        self.sums += [outcome.sums] if outcome.sums is not None else []
        if image.changed is not None:
            self._note_change(outcome.key, image.changed, image.flags)
        return outcome

    def _note_change(self, key: str, reason: str, flags: int) -> None:
        if flags == FLAG_STRIPPED:
            self.stripped += 1  # half of a data set may be so, and the flag tells which
            return
        self.changes.append(Change(key, reason, lossless=not flags & FLAG_REENCODED))
        if flags & FLAG_RECOVERED:
            self.recovered.append(Omission(key, reason))

    def header_and_index(self) -> tuple[ShardHeader, ShardIndex]:
        """The index of the records, one after another, and the header that fits."""
        if not self.keys:
            raise _NothingLeftError
        length, crc32c, label, width, height, flags = (np.array(column) for column in zip(*self.columns, strict=True))
        index = ShardIndex(
            offset=(np.cumsum(length, dtype="<u8") - length.astype("<u8")).astype("<u8"),
            length=length.astype("<u4"),
            crc32c=crc32c.astype("<u4"),
            label=label.astype("<i4"),
            width=width.astype("<u4"),
            height=height.astype("<u4"),
            flags=flags.astype("<u4"),
            key_blob=np.frombuffer(b"".join(self.keys), dtype="u1"),
            key_offset=np.concatenate([[0], np.cumsum([len(key) for key in self.keys])]).astype("<u8"),
        )
        recipe = self.task.recipe
        header = ShardHeader(
            count=len(index),
            uuid=index.uuid,
            encoding=recipe.encoding,
            shape=self.raw_shape,
            packer=recipe.packer,
            source_digest=recipe.source_digest,
        )
        return header, index

    @property
    def raw_shape(self) -> tuple[int, int, int] | None:
        """(H, W, C) of raw records."""
        if self.shape is None:
            return None
        height, width, channels = self.shape
        return height, width, channels

    def result(self, entry: ShardEntry | None) -> ShardResult:
        """All that is to be remembered."""
        return ShardResult(
            number=self.task.number,
            fingerprint=self.task.fingerprint,
            entry=entry,
            shape=self.raw_shape,
            sums=add_up(self.sums) if self.sums else None,
            changes=tuple(self.changes),
            stripped=self.stripped,
            recovered=tuple(self.recovered),
            skipped=tuple(self.skipped),
        )


def _prepared(task: ShardTask, threads: int, board: Board) -> Iterator[list[_Record | Omission]]:
    """Load and check the images on threads (decoding releases the GIL), giving them back in order."""
    slots = itertools.count(1)
    mine = threading.local()

    def take_slot() -> None:
        mine.slot = next(slots)

    def prepare(places: Sequence[int]) -> list[_Record | Omission]:
        outcomes = []
        for place in places:
            board.cells[mine.slot] = place + 1
            outcomes.append(_prepare(task, place))
        board.cells[mine.slot] = 0
        return outcomes

    with ThreadPoolExecutor(threads, initializer=take_slot) as pool:
        yield from in_order(pool, prepare, slices(len(task.images.keys), _IMAGES_PER_TASK))


def _prepare(task: ShardTask, place: int) -> _Record | Omission:
    """Load and check one image; one that cannot be read becomes an omission with the reason."""
    images, recipe = task.images, task.recipe
    key, label = images.keys[place], int(images.labels[place])
    count = bool(task.counted[place])
    try:
        content = images.load(place)
        if recipe.encoding == "raw":
            assert not isinstance(content, bytes), "a raw source gives pixels"
            height, width, _ = content.shape
            image = StandardImage(content.tobytes(), height, width, content, flags=0, changed=None)
        else:
            standard = Standard(recipe.max_short_side, pixels=count, decode=recipe.check == "decode")
            image = (
                standard_jpeg(content, standard)
                if isinstance(content, bytes)
                else encoded_anew(content, "pixels of a data set", 0, standard)
            )
    except StoreError:
        raise  # not this image but the whole source
    except OSError as error:
        return Omission(key, f"it cannot be read: {error.strerror}")
    except ValueError as error:
        return Omission(key, str(error))
    if len(image.payload) > _LARGEST_RECORD:
        return Omission(key, f"it takes {len(image.payload):,} bytes, a record can have {_LARGEST_RECORD:,}")
    sums = pixel_sums(image.pixels) if count and image.pixels is not None else None
    if recipe.encoding == "jpeg":
        image = replace(image, pixels=None)  # many records wait for their turn
    return _Record(key, label, image, google_crc32c.value(image.payload), sums)


def counted(changes: Sequence[Change], *, lossless: bool) -> Counter[str]:
    """Reason → number of changes of one kind."""
    return Counter(change.reason for change in changes if change.lossless == lossless)
