"""The folder of a store's local copy: where shards lie, when they may be used, and who uses them.

Below a folder on the node's own disk, several stores may have copies, each known by its manifest's checksum:

    <id>.users            lock: readers share it, whoever evicts must have it alone
    .leader               lock: of the one process of the node that copies, whichever store
    <id>/shard-00042.h5   a copy, complete once it has
    <id>/shard-00042.h5.ok   its marker, which holds the hash that the copy was found to have

The locks are the system's (flock): a process that dies gives up its own.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from paws_hpc.files import write_text
from paws_hpc.store.format import Manifest, ShardEntry, StoreError

MARKER = ".ok"
_USERS = ".users"
_LEADER = ".leader"
_WAIT_S = 30.0


class Use:
    """An open lock file, closed at the latest when nobody refers to it; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open it; raises OSError."""
        self._descriptor: int | None = None
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    @property
    def descriptor(self) -> int:
        """To lock."""
        assert self._descriptor is not None, "nobody locks after closing"
        return self._descriptor

    def close(self) -> None:
        """Give the lock up."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Use:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class LocalFolder:
    """Where one store's copy lies on this node.

    Attributes:
        root: the folder that was given, which may hold the copies of several stores.
        path: the folder of this store's copy.
        leader_lock: lock file of the process that copies. Stores share it: two that looked at the free space side by
            side would both fill it.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        """Name the folder; creates nothing."""
        self.root = root
        self.path = root / manifest.checksum[:32]
        self.leader_lock = root / _LEADER
        self._entries = {entry.name: (number, entry) for number, entry in enumerate(manifest.shards)}

    def use(self) -> Use:
        """Keep the copy from eviction as long as the returned object is not closed.

        Raises:
            StoreError: the folder cannot be written, or another process does not finish evicting.
        """
        lock = self.root / f"{self.path.name}{_USERS}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            use = Use(lock)
        except OSError as error:
            raise StoreError(
                f"copy_to={self.root} cannot be used: {error.strerror}. Name a folder on the node's own disk that "
                "this job may write, or leave staging out."
            ) from error
        deadline = time.monotonic() + _WAIT_S
        while not _locked(use.descriptor, fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                use.close()
                raise StoreError(f"{lock}: another process has been evicting this copy for {_WAIT_S:.0f} s.")
            time.sleep(0.1)
        os.utime(lock, ns=(time.time_ns(),) * 2)  # the least recently used copy is evicted first
        self.path.mkdir(exist_ok=True)  # it may have been evicted before the lock was ours
        return use

    def marked(self) -> dict[int, Path]:
        """Number of each shard whose copy is complete → the copy. A marker of another file is passed over."""
        found = {}
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:  # somebody cleaned up
            return {}
        for name in names:
            number, entry = self._entries.get(name.removesuffix(MARKER), (0, None))
            if entry is not None and name.endswith(MARKER) and self._marker_fits(entry):
                found[number] = self.path / entry.name
        return found

    def mark(self, entry: ShardEntry) -> None:
        """Declare the copy of a shard complete."""
        write_text(self._marker(entry), entry.file_hash + "\n")

    def unmark(self, entry: ShardEntry) -> None:
        """Take the marker away, so that nobody begins to use the copy; who has it open may go on."""
        with suppress(OSError):  # somebody was first, or the disk has gone: what matters is that nobody uses it
            self._marker(entry).unlink()

    def _marker(self, entry: ShardEntry) -> Path:
        return self.path / (entry.name + MARKER)

    def _marker_fits(self, entry: ShardEntry) -> bool:
        try:
            return self._marker(entry).read_text() == entry.file_hash + "\n"
        except (OSError, UnicodeDecodeError):
            return False


def evict_unused(root: Path, *, keep: Path, needed: int) -> Iterator[tuple[Path, int]]:
    """Remove the copies of other stores that no process uses, the least recently used first.

    Args:
        root: folder with the copies of several stores.
        keep: the copy that is not to be touched.
        needed: bytes to make free; stops when that is done.

    Yields:
        each copy that was removed, and its bytes.
    """
    locks = [(lock.stat().st_mtime_ns, lock) for lock in root.glob(f"*{_USERS}")]
    for _, lock in sorted(locks):
        copy = lock.with_name(lock.name.removesuffix(_USERS))
        if needed <= 0:
            return
        if copy == keep or not copy.is_dir():
            continue
        try:
            with open(lock, "a") as file:
                if not _locked(file.fileno(), fcntl.LOCK_EX):
                    continue
                freed = _remove(copy)
        except PermissionError:  # another user's
            continue
        needed -= freed
        yield copy, freed


def _remove(copy: Path) -> int:
    """Remove a copy, markers first; returns its bytes."""
    freed = 0
    for path in sorted(copy.iterdir(), key=lambda path: not path.name.endswith(MARKER)):
        freed += path.stat().st_size
        path.unlink()
    copy.rmdir()
    return freed


def _locked(descriptor: int, kind: int) -> bool:
    """Try to lock; does not wait."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
