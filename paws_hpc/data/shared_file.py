"""A file in memory that processes of a node share: who holds it, who leads, and that the last one removes it.

Locks are the system's, which a process gives up when it ends, however it ends. There are two, which do not know of each
other:

- each user shares the file's lock (``flock``). Whoever leaves tries to have it alone: the last one does, and removes
  the file. Where all were killed at once nobody is left to do so; the next start on this node removes all files of this
  user that nobody holds. After each lock it is checked that the name still means the locked file.
- one user has the lock of its bytes (an open file description lock, see fcntl_locking(2)): the leader.

The file has its full size from the beginning and is all zeros, of which none takes memory before something is written.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import stat
import struct
import time
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_LOG = logging.getLogger(__name__)

_PREFIX = "paws-hpc-"
_SHARE_OF_FREE_SPACE = 0.5  # others need shared memory too, NCCL above all
_STAT_BLOCK = 512  # the unit of st_blocks, whatever the file system's
_RETRY_S = 0.02
_FLOCK = struct.Struct("hhqqi0q")  # struct flock: type, whence, start, length (0: to the end), process (0)


def file_name(identity: str) -> str:
    """The name of this user's file of an identity."""
    return f"{_own_prefix()}{identity}"


class SharedFile:
    """This process's hold on a file; safe to share between threads and to inherit through a fork.

    The descriptor is closed with the last reference to this object, not by :meth:`leave`: a thread that is about to
    read or write never meets the descriptor of another file.

    Attributes:
        path: of the file, as long as somebody holds it.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        """Use :func:`hold`."""
        self.path, self._descriptor, self._owner = path, descriptor, os.getpid()
        weakref.finalize(self, os.close, descriptor).atexit = False  # a thread may outlive the interpreter's end

    def mapped(self) -> NDArray[np.uint8]:
        """All bytes (size,) uint8, read-only; stay valid whatever becomes of this object.

        A shared mapping shows what any process has written. A private one need not: what a write does to its pages is
        unspecified (mmap(2)), touched or not. A part of the file that was never written must not be looked at where
        memory may run out.
        """
        return np.frombuffer(mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ), np.uint8)

    def read(self, offset: int, count: int) -> NDArray[np.uint8]:
        """``count`` bytes (count,) uint8, a copy; what was written before a byte that it shows is there to be seen."""
        content = np.frombuffer(os.pread(self._descriptor, count, offset), np.uint8)
        assert len(content) == count, "the file has its full size and is read in one piece"
        return content

    def write(self, offset: int, values: NDArray[np.uint8]) -> None:
        """Write all of ``values``. Written, not mapped: a full file system is then an error and not a signal.

        Raises:
            OSError: there is no room.
        """
        remaining = memoryview(np.ascontiguousarray(values).reshape(-1).data)
        while remaining:
            written = os.pwrite(self._descriptor, remaining, offset)
            offset, remaining = offset + written, remaining[written:]

    def try_to_lead(self) -> bool:
        """Become the leader, unless another holder is; lasts until this one leaves or ends."""
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        except BlockingIOError:
            return False
        return True

    def leave(self) -> None:
        """Give both locks up and remove the file if this was the last holder; in a fork, nothing."""
        if os.getpid() != self._owner:  # a fork shares its parent's locks and must leave them alone
            return
        _give_up(self.path, self._descriptor)
        fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))


def hold(path: Path, size: int) -> SharedFile:
    """Open the file, or make it, and share its lock.

    Raises:
        OSError: its folder has no room, it cannot be made, or what is there is somebody else's or of another size.
    """
    _require_room(path, size)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            found = os.fstat(descriptor)
            if found.st_uid != os.geteuid() or not stat.S_ISREG(found.st_mode):
                raise PermissionError(f"{path.name} belongs to somebody else")  # noqa: TRY301 - closed below
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits at most for somebody to remove the file
            if _is_at(path, descriptor):
                _extend(path, descriptor, size)
                return SharedFile(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # removed meanwhile
        time.sleep(_RETRY_S)


def sweep(folder: Path, *, but: str) -> None:
    """Remove the files of this user that nobody holds: all of their processes were killed.

    Args:
        folder: where they lie.
        but: name of a file that stays.
    """
    for path in folder.glob(f"{_own_prefix()}*"):
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


def _own_prefix() -> str:
    return f"{_PREFIX}{os.geteuid()}-"


def _require_room(path: Path, needed: int) -> None:
    """Raise OSError unless the file is there, or its folder has room for it and for others."""
    if path.exists():
        return
    space = os.statvfs(path.parent)
    free = space.f_bavail * space.f_frsize - _promised(path.parent)
    if needed > free * _SHARE_OF_FREE_SPACE:
        raise OSError(f"{free / 1e9:.2f} GB free, of which it may take {_SHARE_OF_FREE_SPACE:.0%}")


def _promised(folder: Path) -> int:
    """Bytes that other files of this kind, of any user, will still take."""
    promised = 0
    for path in folder.glob(f"{_PREFIX}*"):
        with suppress(FileNotFoundError):  # removed meanwhile
            found = os.stat(path, follow_symlinks=False)
            promised += max(0, found.st_size - found.st_blocks * _STAT_BLOCK)
    return promised


def _extend(path: Path, descriptor: int, size: int) -> None:
    """Give a new file its size; several processes may do so at once.

    Raises:
        OSError: that is not possible, or it has another size.
    """
    found = os.fstat(descriptor).st_size
    try:
        if found == 0:
            os.ftruncate(descriptor, size)
        elif found != size:
            raise OSError(f"{path.name} has {found:,} bytes instead of {size:,}")  # noqa: TRY301 - given up below
    except OSError:
        _give_up(path, descriptor)
        raise


def _give_up(path: Path, descriptor: int) -> None:
    """Give the shared lock up, and remove the file if nobody else has it."""
    if _lock_alone(descriptor) and _is_at(path, descriptor):
        path.unlink()
    fcntl.flock(descriptor, fcntl.LOCK_UN)


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
