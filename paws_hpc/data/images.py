"""Where the images of a stream come from: their store, or memory that the processes of a node share.

Decoding is most of the cost of labelled images, which every step needs. So one process of a node decodes them into a
file in ``/dev/shm``, or in the temporary folder if there is no room, and every process with the same labels maps that
file. Its name is a digest of its content: M images one after another, then the CRC32C of each as uint32, with which
every image is compared when it is read.

A process that opens, writes or removes files holds the user's ``lock``. A file appears when it is complete. Its readers
share its lock (flock); the last one removes it. If all were killed, the user's next process on the node removes it.

Legend: M images that are cached, n records that are read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import google_crc32c
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from paws_hpc.data.samplers import Positions
from paws_hpc.files import atomic_write, exclusive, try_lock
from paws_hpc.store import ImageStore, RecordError

_LOG = logging.getLogger(__name__)
_FOLDERS = (Path("/dev/shm"), Path(tempfile.gettempdir()))
_SHARE_OF_MEMORY = 0.25
_SHARE_OF_FREE_SPACE = 0.5  # others need shared memory too, NCCL above all
_SUM = np.dtype("<u4")


class StoreImages:
    """Images read from their store; a context manager, as :class:`CachedImages` is one."""

    def __init__(self, store: ImageStore) -> None:
        self.store = store

    def pixels(self, records: Positions) -> list[NDArray[np.uint8]]:
        """n images, each (H, W, 3) uint8 RGB; errors as in ``ImageStore.images``."""
        return self.store.images(records)

    def close(self) -> None:
        """Release shared memory; the store stays open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CachedImages(StoreImages):
    """Images of which M are in memory, in the file ``path``; the others are read, and all of them after closing."""

    def __init__(self, store: ImageStore, records: Positions, folder: Path) -> None:
        """Open the file of M ascending ``records`` in ``folder``; make it first if there is none.

        Raises:
            OSError: ``folder`` has no room or cannot be used.
            RecordError: an image is damaged, in the store or in the file.
        """
        super().__init__(store)
        self._records = records
        self._heights, self._widths = store.sizes(records)
        self._offsets = np.concatenate(([0], np.cumsum(self._heights * self._widths * 3)))
        self.size = int(self._offsets[-1]) + _SUM.itemsize * len(records)
        own = folder / f"paws-hpc-{os.geteuid()}"
        own.mkdir(mode=0o700, exist_ok=True)
        if own.lstat().st_uid != os.geteuid():
            raise PermissionError(errno.EACCES, "belongs to somebody else", str(own))
        content = f"{store.manifest.checksum} {simplejpeg.__version__} ".encode() + records.astype("<i8").tobytes()
        self.path = own / f"{hashlib.sha256(content).hexdigest()[:32]}.pixels"
        with exclusive(own / "lock"):
            for leftover in [*own.glob("*.pixels"), *own.glob(".*.tmp")]:
                with open(leftover, "rb") as file:
                    if try_lock(file):
                        leftover.unlink()
            if not self.path.exists():
                self._write()
            self._file: BinaryIO | None = open(self.path, "rb")  # noqa: SIM115 - held until close
            fcntl.flock(self._file, fcntl.LOCK_SH)
        mapped = np.asarray(np.memmap(self.path, np.uint8, mode="r"))
        self._pixels, self._sums = mapped[: self._offsets[-1]], mapped[self._offsets[-1] :].view(_SUM)

    def pixels(self, records: Positions) -> list[NDArray[np.uint8]]:
        """As :meth:`StoreImages.pixels`; those in memory are read-only, and a RecordError if their CRC32C differs."""
        rows = np.minimum(np.searchsorted(self._records, records), len(self._records) - 1)
        cached = (self._records[rows] == records) & (self._file is not None)
        read = iter(self.store.images(records[~cached]))
        return [self._image(row) if here else next(read) for row, here in zip(rows.tolist(), cached, strict=True)]

    def close(self) -> None:
        """Remove the file if this is its last reader. Arrays that :meth:`pixels` returned stay valid."""
        if self._file is None:
            return
        with self._file, exclusive(self.path.parent / "lock"):
            if try_lock(self._file):
                self.path.unlink()
        self._file = None

    def _image(self, row: int) -> NDArray[np.uint8]:
        pixels = self._pixels[self._offsets[row] : self._offsets[row + 1]]
        if google_crc32c.value(pixels) != self._sums[row]:
            key = self.store.keys[int(self._records[row])]
            raise RecordError(
                f"image {key!r} of {self.store.path} is damaged in {self.path}: its CRC32C differs. Start again: the "
                "file is made anew. If it happens again, the memory of this node is faulty.",
                key=key,
            )
        return pixels.reshape(self._heights[row], self._widths[row], 3)

    def _write(self) -> None:
        """Decode all images into the file, on all cores: the other processes of the node wait for this one."""
        started = time.monotonic()
        free = shutil.disk_usage(self.path.parent).free
        if self.size > free * _SHARE_OF_FREE_SPACE:
            text = f"{free / 1e9:.2f} GB free, of which it may take {_SHARE_OF_FREE_SPACE:.0%}"
            raise OSError(errno.ENOSPC, text, str(self.path.parent))
        with atomic_write(self.path) as file:
            os.posix_fallocate(file.fileno(), 0, self.size)  # a full disk is an error here, and a signal when mapped
            content = np.memmap(file.name, np.uint8, mode="r+")
            sums = content[self._offsets[-1] :].view(_SUM)

            def decode(row: int) -> None:
                image = self.store.images(self._records[row : row + 1])[0]
                sums[row] = google_crc32c.value(image)
                content[self._offsets[row] : self._offsets[row + 1]] = image.reshape(-1)

            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                for _ in pool.map(decode, range(len(self._records))):
                    pass
        _LOG.info(
            "Decoded %s labelled images into %s (%.2f GB) in %.1f s; the processes of this node share them.",
            f"{len(self._records):,}", self.path, self.size / 1e9, time.monotonic() - started,
        )  # fmt: skip


def cached_images(
    store: ImageStore, records: Positions, *, folders: Sequence[Path] = _FOLDERS, limit_bytes: int | None = None
) -> StoreImages:
    """The images of a store, with the labelled ``records`` decoded in memory once per node where there is room.

    Where there is none, which is logged, and for raw stores images are read from the store; pixels are the same. The
    file is in the first of ``folders`` that has room, and at most ``limit_bytes`` long: None means a quarter of the
    memory that this job may use.

    Raises:
        RecordError: an image is damaged.
    """
    if store.encoding != "jpeg":
        return StoreImages(store)
    records = np.unique(records)
    limit = round(available_memory() * _SHARE_OF_MEMORY) if limit_bytes is None else limit_bytes
    heights, widths = store.sizes(records)
    size = int((heights * widths).sum()) * 3
    refusals = [f"{size / 1e9:.2f} GB is more than a quarter of the memory, {limit / 1e9:.2f} GB"]
    if size <= limit:
        refusals = []
        for folder in folders:
            try:
                return CachedImages(store, records, folder)
            except OSError as error:
                refusals.append(f"{folder}: {error.strerror}")
    _LOG.warning(
        "%s labelled images are decoded anew in every step, as memory has no room for them (%s).",
        f"{len(records):,}", "; ".join(refusals),
    )  # fmt: skip
    return StoreImages(store)


def available_memory() -> int:
    """Bytes of memory that this job may use: what is available on the node, or its control group's limit if lower."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    amounts = [int(meminfo["MemAvailable"].split()[0]) * 1024]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        root, name = Path("/sys/fs/cgroup"), "memory.max"  # version 2; the lines of version 1 name controllers
        if "memory" in controllers.split(","):
            root, name = root / "memory", "memory.limit_in_bytes"
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # the root has no such file, and "max" is no limit
                amounts.append(int((folder / name).read_text()))
    return min(amounts)
