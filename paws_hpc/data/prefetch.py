"""Batches made ahead of training on one background thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
_AHEAD = 3  # the one in the making included: enough to hide one slow batch; more would only hold memory


class Prefetch(Generic[T]):
    """``make(start), …, make(stop - 1)`` in order, made ahead; a context manager that leaves no thread behind.

    ``with Prefetch(…) as batches`` gives the iterator. There is no other way to it: without the block nobody would make
    the batches.

    Memory is bounded: beside the batch that the consumer has, at most three exist, and no more than fit the budget in
    bytes (a batch that alone exceeds it is made once nothing else waits). The size of a batch to come is taken to be
    that of the largest so far.

    An error in ``make`` is raised where its batch would have been taken. A thread, not a process: decoding and cropping
    release the interpreter lock, nothing is copied or pickled, and there is no process that a signal could meet.
    """

    def __init__(
        self,
        make: Callable[[int], T],
        start: int,
        stop: int,
        *,
        size: Callable[[T], int] = lambda _: 0,
        budget_bytes: int = 0,
    ) -> None:
        """Prepare.

        Args:
            make: the batch of a step.
            start, stop: steps.
            size: bytes of a batch.
            budget_bytes: of the batches that wait or are being made.
        """
        self._make, self._start, self._stop = make, start, stop
        self._size, self._budget, self._largest = size, budget_bytes, 0
        self._waiting: deque[tuple[T | BaseException, int]] = deque()
        self._changed = threading.Condition()
        self._leaving = False
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)

    def __enter__(self) -> Iterator[T]:
        self._thread.start()
        return self._batches()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._leaving = True
            self._changed.notify_all()
        self._thread.join()

    def _batches(self) -> Iterator[T]:
        for step in range(self._start, self._stop):
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._leaving)
                if self._leaving:
                    raise ValueError(f"the batch of step {step} was asked for outside the with block of its Prefetch.")
                item, _ = self._waiting.popleft()
                self._changed.notify_all()
            if isinstance(item, BaseException):
                raise item
            yield item
            del item  # before the next is waited for: it would count as a fourth

    def _has_room(self) -> bool:
        waiting = sum(size for _, size in self._waiting)
        few = len(self._waiting) < _AHEAD and waiting + self._largest <= self._budget
        return self._leaving or few or not self._waiting

    def _fill(self) -> None:
        for step in range(self._start, self._stop):
            with self._changed:
                self._changed.wait_for(self._has_room)
                if self._leaving:
                    return
            size = 0
            try:
                item: T | BaseException = self._make(step)
                size = self._size(item)  # type: ignore[arg-type]
            except BaseException as error:  # noqa: BLE001 - handed to the consumer, who raises it
                item = error
            with self._changed:
                self._largest = max(self._largest, size)
                self._waiting.append((item, size))
                self._changed.notify_all()
            if isinstance(item, BaseException):
                return
            del item
