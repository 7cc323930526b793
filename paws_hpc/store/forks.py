"""Locks that a forked process finds free."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType


class ForkSafeLock:
    """A lock that is free in a forked process: whichever thread of its parent held it is not there to release it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _ALIVE.add(self)

    def acquire(self, *, blocking: bool = True) -> bool:
        """Take the lock; False where it is held and ``blocking`` is not asked for."""
        return self._lock.acquire(blocking=blocking)

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


_ALIVE: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()


def _free_all() -> None:
    for lock in _ALIVE:
        lock._lock = threading.Lock()


os.register_at_fork(after_in_child=_free_all)
