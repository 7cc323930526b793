"""Threads that work on the parts of a batch while others go on, and can be told to give it up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def single_threaded() -> Callable[[], None]:
    """What a thread beside the calling one calls first, to keep what torch computes in it to one core.

    Else each thread that makes batches would have torch's threads of its own, as many as the one that trains. As soon
    as there are more of them than cores, OpenMP puts a thread to sleep wherever it waits for another, and waking them
    all makes a step of a small network half as long again (docs/benchmarks.md). The calling thread keeps its number;
    one that never computed before is given 1 from then on.
    """
    torch.get_num_threads()  # settles the caller's
    return _compute_alone


def _compute_alone() -> None:
    torch.get_num_threads()  # a thread that has not asked for its number before is given what was set last by any
    torch.set_num_threads(1)  # of this thread, MKL's too


class WorkerPool:
    """A few threads that work on parts of batches, each on one core.

    Attributes:
        count: how many.
    """

    def __init__(self, count: int, name: str) -> None:
        """Prepare ``count`` threads called ``name``."""
        self.count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name, initializer=single_threaded())
        self._local = threading.local()  # what one thread gives up, another may still be waiting for

    @property
    def _begun(self) -> set[Future[Any]]:
        """By the calling thread, and not waited for."""
        begun: set[Future[Any]] = self._local.__dict__.setdefault("begun", set())
        return begun

    def begin(self, work: Callable[[slice], T], parts: Sequence[slice]) -> Callable[[], list[T]]:
        """Begin the work on every part; the result waits for it and gives, once, what it returned, part by part."""
        begun: list[Future[T]] = []
        for part in parts:
            begun.append(self._pool.submit(work, part))
            self._begun.add(begun[-1])

        def results() -> list[T]:
            done = [future.result() for future in begun]
            self._begun.difference_update(begun)
            begun.clear()  # they hold what they returned
            return done

        return results

    def abandon(self) -> None:
        """Give up what the calling thread has begun and not waited for; returns when nothing works on it any more."""
        for future in self._begun:
            future.cancel()
        wait(self._begun)
        self._begun.clear()
