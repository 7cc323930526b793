"""Batches made ahead of training on one background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
_AHEAD = 2  # enough to hide one slow batch; more would only hold memory


class Prefetch(Generic[T]):
    """``make(start), …, make(stop - 1)`` in order, made ahead; a context manager that leaves no thread behind.

    An error in ``make`` is raised where its batch would have been taken. A thread, not a process: decoding and cropping
    release the interpreter lock, nothing is copied or pickled, and signals go to the main thread alone.
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int) -> None:
        self._make, self._start, self._stop = make, start, stop
        self._queue: queue.Queue[T | BaseException] = queue.Queue(_AHEAD)
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetch[T]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        for _ in range(self._start, self._stop):
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def _fill(self) -> None:
        for step in range(self._start, self._stop):
            try:
                item: T | BaseException = self._make(step)
            except BaseException as error:  # noqa: BLE001 - handed to the consumer, who raises it
                item = error
            while not self._leaving.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._leaving.is_set() or isinstance(item, BaseException):
                return
