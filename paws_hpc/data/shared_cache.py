"""Some records of a JPEG store in memory that all processes of a node share: one file, mapped by each of them.

The file lies in ``/dev/shm`` or, where that has no room, in the temporary folder. Its name says what it holds (data-set
digest, records, pixels or bytes) and for which boot of the machine, so that equal names mean equal content and runs
with the same labels, such as the cells of a sweep on one node, share it too.

One file, one lock on it (``flock``, which the kernel gives up when a process ends, however it ends):

- whoever gets the exclusive lock on a file without its mark of completeness is the leader and fills it; the mark is
  written last. The others wait for the shared lock, which they hold as long as they use the file. If they find no
  mark then, the leader died, and one of them is the next leader.
- whoever leaves tries for the exclusive lock: the last one gets it and removes the file. Where all were killed at
  once nobody is left to do so; the next start on this node removes all files of this user that nobody holds.
- after each lock it is checked that the name still means the locked file, since it may have been removed meanwhile.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import mmap
import os
import stat
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from paws_hpc.data.order import Positions
from paws_hpc.store import ImageStore, decode_jpeg

_LOG = logging.getLogger(__name__)

Form = Literal["pixels", "bytes"]
Blob = NDArray[np.uint8]

_MARK = b"paws-hpc cache 1\n"
_PAGE = 4096  # the mark has the first page for itself
_ENTRY = np.dtype([("offset", "<i8"), ("length", "<i8"), ("height", "<i4"), ("width", "<i4")])
_RECORDS_AT_ONCE = 32
_SHARE_OF_FREE_SPACE = 0.5  # others need shared memory too, NCCL above all
_RETRY_S = 0.02


class SharedCache:
    """This process's hold on a cache; safe to share between threads and to inherit through a fork.

    Attributes:
        path: of the file, as long as somebody uses it.
        form: what it holds of each image.
        description: for the log.
    """

    def __init__(self, descriptor: int, path: Path, records: Positions, form: Form) -> None:
        """Use :func:`open_shared_cache`."""
        self.path, self.form, self._records = path, form, records
        # Private, so that a stray write could spoil this process's view alone; pages are shared until written.
        self._bytes = np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY), np.uint8)
        self._entries = self._bytes[_PAGE : _PAGE + len(records) * _ENTRY.itemsize].view(_ENTRY)
        self._release = weakref.finalize(self, _leave, descriptor, path, os.getpid())
        self.description = (
            f"{len(records):,} labelled images as {form} in {path} ({len(self._bytes) / 1e9:.2f} GB), shared by the "
            "processes of this node"
        )

    def close(self) -> None:
        """Leave; the last process to do so removes the file. Arrays handed out stay valid."""
        self._release()

    def pixels(self, records: Positions, store: ImageStore) -> list[Blob]:
        """n decoded images (H, W, 3) uint8; records that are not here are read from ``store``."""
        found = [None if entry is None else self._pixels(entry) for entry in self._find(records)]
        absent = [record for record, image in zip(records, found, strict=True) if image is None]
        read = iter(store.images(absent) if absent else [])
        return [next(read) if image is None else image for image in found]

    def encoded(self, records: Positions, store: ImageStore) -> list[Blob]:
        """n JPEG files (bytes,) uint8; records that are not here, or only as pixels, are read from ``store``."""
        found = self._find(records) if self.form == "bytes" else [None] * len(records)
        absent = [record for record, entry in zip(records, found, strict=True) if entry is None]
        read = iter(store.read_encoded(absent) if absent else [])
        return [np.frombuffer(next(read), np.uint8) if entry is None else self._blob(entry) for entry in found]

    def _find(self, records: Positions) -> list[np.void | None]:
        places = np.minimum(np.searchsorted(self._records, records), len(self._records) - 1)
        here = (self._records[places] == records) & (self._entries["length"][places] > 0)
        return [self._entries[place] if there else None for place, there in zip(places, here, strict=True)]

    def _blob(self, entry: np.void) -> Blob:
        start = int(entry["offset"])
        return self._bytes[start : start + int(entry["length"])]

    def _pixels(self, entry: np.void) -> Blob | None:
        """(H, W, 3) uint8; None where the bytes are no image, which the store knows how to report or replace."""
        blob = self._blob(entry)
        if self.form == "pixels":
            return blob.reshape(int(entry["height"]), int(entry["width"]), 3)
        try:
            return decode_jpeg(blob)
        except ValueError:
            return None


def open_shared_cache(
    store: ImageStore,
    records: Positions,
    *,
    budget_bytes: int,
    decoded: bool = True,
    folders: Sequence[Path] | None = None,
) -> SharedCache | None:
    """Map the cache of these records, filling it first if no process of this node has done so.

    Args:
        store: a JPEG store.
        records: (M,) positions, in any order.
        budget_bytes: of the file.
        decoded: prefer pixels to bytes.
        folders: where it may lie, in order of preference.

    Returns:
        None, with a line in the log, where it would not fit the budget or no folder has room.

    Raises:
        RecordError: a record cannot be read or decoded.
    """
    records = np.unique(records)
    forms: list[Form] = ["pixels", "bytes"] if decoded else ["bytes"]
    needs = {form: _bytes_needed(store, records, form) for form in forms}
    form = next((form for form in forms if needs[form] <= budget_bytes), None)
    if form is None:
        _LOG.warning(
            "The %s labelled images are read from %s again and again: they would take %.2f GB in memory, more than "
            "data.cache_gb=%g allows.", f"{len(records):,}", store.path, needs["bytes"] / 1e9, budget_bytes / 1e9,
        )  # fmt: skip
        return None
    name = _prefix() + _identity(store, records, form)
    refusals = []
    for folder in folders or (Path("/dev/shm"), Path(tempfile.gettempdir())):
        try:
            _sweep(folder, but=name)
            _require_room(folder / name, needs[form])
            descriptor = _hold(folder / name, partial(_fill, store=store, records=records, form=form))
            return SharedCache(descriptor, folder / name, records, form)
        except OSError as error:
            refusals.append(f"{folder}: {error.strerror or error}")
    _LOG.warning(
        "The labelled images are read from %s again and again, as there is no room for %.2f GB of them (%s).",
        store.path, needs[form] / 1e9, "; ".join(refusals),
    )  # fmt: skip
    return None


def _bytes_needed(store: ImageStore, records: Positions, form: Form) -> int:
    """Size of the file, from the index; of bytes about, from the mean length of the store's records."""
    before = _PAGE + len(records) * _ENTRY.itemsize
    if form == "pixels":
        heights, widths = store.sizes(records)
        return before + int((heights * widths).sum()) * 3
    return before + len(records) * sum(shard.bytes for shard in store.manifest.shards) // len(store)


def _prefix() -> str:
    return f"paws-hpc-{os.geteuid()}-"


def _identity(store: ImageStore, records: Positions, form: Form) -> str:
    """Digest of all that determines the content, and of the boot: what a power cut left on a disk may be torn."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    digest = hashlib.sha256("\n".join((store.digest, form, boot, simplejpeg.__version__)).encode())
    digest.update(records.astype("<i8").tobytes())
    return digest.hexdigest()[:32]


def _require_room(path: Path, needed: int) -> None:
    """Raise OSError unless the file is there, or its folder has room for it and for others."""
    if path.exists():
        return
    space = os.statvfs(path.parent)
    free = space.f_bavail * space.f_frsize
    if needed > free * _SHARE_OF_FREE_SPACE:
        raise OSError(f"{free / 1e9:.2f} GB free, of which it may take {_SHARE_OF_FREE_SPACE:.0%}")


def _hold(path: Path, fill: Callable[[int], None]) -> int:
    """Open the file, complete and under a shared lock; fill it if this process is the one to do so.

    Raises:
        OSError: it cannot be created or filled, or is somebody else's.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            found = os.fstat(descriptor)
            if found.st_uid != os.geteuid() or not stat.S_ISREG(found.st_mode):
                raise PermissionError(f"{path.name} belongs to somebody else")  # noqa: TRY301 - closed below
            if _lock_alone(descriptor) and _is_at(path, descriptor) and not _is_complete(descriptor):
                _fill_or_remove(path, descriptor, fill)
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for a leader; the leader itself keeps the file by it
            if _is_at(path, descriptor) and _is_complete(descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # removed meanwhile, or its leader died
        time.sleep(_RETRY_S)


def _fill_or_remove(path: Path, descriptor: int, fill: Callable[[int], None]) -> None:
    try:
        os.ftruncate(descriptor, 0)  # what a dead leader left
        fill(descriptor)
        os.pwrite(descriptor, _MARK, 0)
    except BaseException:
        path.unlink()
        raise


def _lock_alone(descriptor: int) -> bool:
    """Try for the exclusive lock; a shared one is lost in either case."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        named, opened = os.stat(path, follow_symlinks=False), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def _is_complete(descriptor: int) -> bool:
    return os.pread(descriptor, len(_MARK), 0) == _MARK


def _leave(descriptor: int, path: Path, owner: int) -> None:
    """Give the shared lock up and remove the file if this was the last one."""
    if os.getpid() != owner:  # a fork shares its parent's lock and must leave it alone
        return
    if _lock_alone(descriptor) and _is_at(path, descriptor):
        path.unlink()
    os.close(descriptor)


def _sweep(folder: Path, *, but: str) -> None:
    """Remove the files of this user that nobody holds: all of their processes were killed."""
    for path in folder.glob(f"{_prefix()}*"):
        if path.name == but:
            continue
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # removed meanwhile, or not ours
            continue
        try:
            if _lock_alone(descriptor) and _is_at(path, descriptor):
                with suppress(OSError):
                    path.unlink()
                    _LOG.info("Removed %s, which ended processes had left.", path)
        finally:
            os.close(descriptor)


def _fill(descriptor: int, *, store: ImageStore, records: Positions, form: Form) -> None:
    """Write entries and blobs of all records; decoding runs on all cores that this process may use."""
    entries = np.zeros(len(records), _ENTRY)
    offset, place = _PAGE + entries.nbytes, 0
    read: Callable[[Positions], Iterable[Blob]] = (
        store.images
        if form == "pixels"
        else lambda part: [np.frombuffer(b, np.uint8) for b in store.read_encoded(part)]
    )
    parts = [records[start : start + _RECORDS_AT_ONCE] for start in range(0, len(records), _RECORDS_AT_ONCE)]
    for blobs in _ahead(read, parts, threads=len(os.sched_getaffinity(0))):
        for blob in blobs:
            shape = blob.shape[:2] if form == "pixels" else (0, 0)
            entries[place] = (offset, blob.nbytes, *shape)
            _write(descriptor, blob, offset)
            offset, place = offset + blob.nbytes, place + 1
    # What stands in for a damaged record is up to each run's settings, so the store is asked for these each time.
    entries["length"][np.isin(records, list(store.substitutes))] = 0
    _write(descriptor, entries, _PAGE)


def _ahead(
    read: Callable[[Positions], Iterable[Blob]], parts: Sequence[Positions], *, threads: int
) -> Iterator[Iterable[Blob]]:
    """``read`` of each part, in order, by several threads that run ahead a little."""
    with ThreadPoolExecutor(threads, thread_name_prefix="cache") as pool:
        waiting: deque[Future[Iterable[Blob]]] = deque()
        for part in parts:
            waiting.append(pool.submit(read, part))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _write(descriptor: int, values: NDArray[np.uint8] | NDArray[np.void], offset: int) -> None:
    """Write all of it. Written, not mapped: a full file system is then an error and not a signal."""
    remaining = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    while remaining:
        written = os.pwrite(descriptor, remaining, offset)
        offset, remaining = offset + written, remaining[written:]
