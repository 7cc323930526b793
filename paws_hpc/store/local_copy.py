"""Copies of stores on a node's own disk, which training reads instead of the shared file system.

One folder may hold the copies of several stores; shards/FORMAT.md has its files. The locks are the system's (flock),
which end with their process. A copy that was interrupted is continued.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from paws_hpc.files import atomic_write, try_lock, value_digest
from paws_hpc.progress import Progress
from paws_hpc.store.format import INDEX_NAME, MANIFEST_NAME, REMEDY, USERS_NAME, ShardEntry, StoreError, read_manifest
from paws_hpc.store.index import load_index
from paws_hpc.store.reader import ImageStore

DEFAULT_WORKERS = 4
"""Shards that are copied at a time."""

_LOG = logging.getLogger(__name__)
_LEADER_NAME = ".leader"
_COPY_NAME = re.compile(r"[0-9a-f]{32}")
_COPIED = re.compile(
    r"shard-\d+\.h5|[\w.-]+\.json|fingerprints-\w+\.bin|\..+\.tmp|" + "|".join(map(re.escape, (INDEX_NAME, USERS_NAME)))
)
_MIB = 1 << 20
_COPY_BYTES = 4 * _MIB
_POLL_S = 0.2
_RESERVE_BYTES = 256 * _MIB
"""Left free on the local disk."""


class CopyStoppedError(Exception):
    """Copying ended because ``stop`` returned true; complete shards stay."""


@dataclass(frozen=True)
class CopyReport:
    """The copy at ``path``: shards that were there and that were copied, and other stores' copies that were removed."""

    path: Path
    present: int
    copied: int
    bytes: int
    evicted: tuple[Path, ...]
    seconds: float


Stop = Callable[[], bool]
"""Whether to end early."""


def copy_store(
    store: Path,
    folder: Path,
    *,
    workers: int = DEFAULT_WORKERS,
    show_progress: bool = False,
    stop: Stop = lambda: False,
) -> CopyReport:
    """Copy a store to a folder on the node's own disk; waits while another process of the node copies.

    Copies of other stores in ``folder`` are removed, the least recently used first, if their room is needed and no
    process uses them. ``workers`` shards are copied at a time.

    Raises:
        StoreError: the store is damaged, there is not enough room, or ``folder`` cannot be used.
        CopyStoppedError: ``stop`` returned true.
        OSError: the local disk cannot be written or is full. Complete shards stay in each case.
    """
    if workers < 1:
        raise ValueError(f"--workers={workers} must be at least 1.")
    with _leading(folder, stop):
        return _copy(store, folder, workers=workers, show_progress=show_progress, stop=stop)


def open_copy(store: Path, folder: Path, *, stop: Stop = lambda: False) -> ImageStore:
    """Copy a store as :func:`copy_store` does, and open the copy, which is not evicted as long as it is open."""
    with _leading(folder, stop):
        report = _copy(store, folder, workers=DEFAULT_WORKERS, show_progress=False, stop=stop)
        if report.copied:
            _LOG.info("Copied %s to %s: %.2f GB in %.0f s.", store, report.path, report.bytes / 1e9, report.seconds)
        return ImageStore(report.path)


@contextmanager
def _leading(folder: Path, stop: Stop) -> Iterator[None]:
    """Hold the lock of the one process of the node that copies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / _LEADER_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StoreError(
            f"{folder} cannot hold copies of stores: {error.strerror}. Name a folder on the node's own disk that this "
            "job may write, or train without data.copy_to."
        ) from error
    try:
        while not try_lock(descriptor):
            if stop():
                raise CopyStoppedError
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _copy(store: Path, folder: Path, *, workers: int, show_progress: bool, stop: Stop) -> CopyReport:
    """Make or complete a copy; the caller holds the lock."""
    started, manifest = time.monotonic(), read_manifest(store)
    path = folder / manifest.checksum[:32]
    with suppress(FileExistsError):
        path.mkdir()
    if not _is_copy(path):  # its name can be foretold, and whoever may write beside it could have put a link there
        raise StoreError(
            f"{path} is no copy that this user made, so it is neither read nor written. Remove it, or name another "
            "folder, such as one with $USER in its path."
        )
    (path / USERS_NAME).touch()  # also says when the copy was last used
    for temporary in path.glob(".*.tmp"):  # of a process that died
        temporary.unlink()
    sizes = {shard.name: shard.stat().st_size for shard in path.glob("*.h5")}
    missing = [entry for entry in manifest.shards if sizes.get(entry.name) != entry.bytes]
    evicted = _make_room(folder, path, sum(entry.bytes for entry in missing)) if missing else []
    if missing or not (path / MANIFEST_NAME).exists():
        # Nodes that start together read different shards first.
        missing.sort(key=lambda entry: value_digest([socket.gethostname(), entry.name]))
        _copy_shards(store, path, missing, workers=workers, show_progress=show_progress, stop=stop)
        load_index(path, manifest)
        with atomic_write(path / MANIFEST_NAME) as file:
            file.write((store / MANIFEST_NAME).read_bytes())
    return CopyReport(
        path=path,
        present=len(manifest.shards) - len(missing),
        copied=len(missing),
        bytes=sum(entry.bytes for entry in missing),
        evicted=tuple(evicted),
        seconds=time.monotonic() - started,
    )


def _make_room(folder: Path, keep: Path, needed: int) -> list[Path]:
    """Evict copies of other stores if their room is needed; returns them."""
    needed += _RESERVE_BYTES
    users = sorted(
        (lock for lock in folder.glob(f"*/{USERS_NAME}") if _is_copy(lock.parent)),
        key=lambda lock: lock.stat().st_mtime_ns,
    )
    others = iter([lock.parent for lock in users if lock.parent != keep])
    evicted = []
    while (free := shutil.disk_usage(folder).free) < needed:
        copy = next(others, None)
        if copy is None:
            raise StoreError(
                f"{folder} has {free / _MIB:,.0f} MiB free, the copy needs {needed / _MIB:,.0f} MiB "
                f"({_RESERVE_BYTES / _MIB:,.0f} MiB of them stay free). Make room, name another folder, or train "
                "without data.copy_to."
            )
        if _evict(copy):
            evicted.append(copy)
    return evicted


def _is_copy(path: Path) -> bool:
    """Whether ``path`` is a copy that this user made: a real folder of theirs with known contents.

    Only such folders are written, read and evicted.
    """
    status = path.lstat()
    if not (_COPY_NAME.fullmatch(path.name) and stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()):
        return False
    entries = [*os.scandir(path)]
    splits = [entry for entry in entries if entry.name == "splits" and entry.is_dir(follow_symlinks=False)]
    files = [
        *(entry for entry in entries if entry not in splits),
        *(each for folder in splits for each in os.scandir(folder)),
    ]
    return all(_COPIED.fullmatch(entry.name) and entry.is_file(follow_symlinks=False) for entry in files)


def _evict(copy: Path) -> bool:
    """Remove a copy unless a process uses it or it is another user's."""
    try:
        with open(copy / USERS_NAME, "r+b") as users:
            if not try_lock(users):
                return False
            (copy / MANIFEST_NAME).unlink(missing_ok=True)  # first: without it the rest is no store
            shutil.rmtree(copy)
    except PermissionError:
        return False
    return True


def _copy_shards(
    store: Path, path: Path, entries: Sequence[ShardEntry], *, workers: int, show_progress: bool, stop: Stop
) -> None:
    """Copy shards side by side; the first error ends it."""
    failed, total = threading.Event(), sum(entry.count for entry in entries)

    def copy(entry: ShardEntry) -> int:
        _copy_shard(store / entry.name, path / entry.name, entry.file_hash, lambda: failed.is_set() or stop())
        return entry.count

    shown = Progress(f"copying {store.name}", total=total, show=show_progress)
    with ThreadPoolExecutor(workers) as pool, shown:
        futures = [pool.submit(copy, entry) for entry in entries]
        try:
            for future in as_completed(futures):
                shown.advance(future.result())
        except BaseException:
            failed.set()
            pool.shutdown(cancel_futures=True)
            raise


def _copy_shard(source: Path, target: Path, file_hash: str, stop: Stop) -> None:
    """Copy one shard, comparing it with the manifest's hash on the way."""
    digest = xxhash.xxh3_128()
    with atomic_write(target) as copy:
        for block in _blocks(source):
            if stop():
                raise CopyStoppedError
            digest.update(block)
            copy.write(block)
        if digest.hexdigest() != file_hash:
            raise StoreError(f"{source} is not the file that was packed: its hash differs. {REMEDY}")


def _blocks(source: Path) -> Iterator[bytes]:
    """The content of a shard; a StoreError if it cannot be read."""
    try:
        with open(source, "rb", buffering=0) as file:
            while block := file.read(_COPY_BYTES):
                yield block
    except OSError as error:
        raise StoreError(f"{source} cannot be read: {error.strerror}. {REMEDY}") from error
