"""Ordered work on threads: decoding, hashing and reading release the GIL."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_TASKS_AHEAD = 16

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")


def usable_cores() -> int:
    """Cores that this process may use, which in a job are fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def slices(count: int, size: int) -> Iterator[range]:
    """``range(count)`` in parts of ``size``."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def in_order(pool: ThreadPoolExecutor, work: Callable[[Task], Outcome], tasks: Iterable[Task]) -> Iterator[Outcome]:
    """Map on threads, results in order; so many tasks are under way that memory stays bounded."""
    pending: deque[Future[Outcome]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(work, task))
            if len(pending) >= _TASKS_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
