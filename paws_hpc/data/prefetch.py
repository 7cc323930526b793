"""Batches made ahead of training on one background thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

from paws_hpc.data.workers import single_threaded

T = TypeVar("T")
_AHEAD = 3  # those in the making included: enough to hide one slow batch; more would only hold memory
_AT_ONCE = 2  # in the making: threads that are done with their parts of one go on to the next


class Prefetch(Generic[T]):
    """The batches of steps ``start`` to ``stop - 1`` in order, made ahead; a context manager.

    ``with Prefetch(…) as batches`` gives the iterator. There is no other way to it: without the block nobody would make
    the batches.

    Memory is bounded: beside the batch that the consumer has, at most three exist, and no more than fit the budget in
    bytes (a batch that alone exceeds it is made once nothing else waits). The size of a batch to come is taken to be
    that of the largest so far.

    An error is raised where its batch would have been taken. When the block ends nothing works on batches any more,
    unless it is interrupted while it waits for that. A thread, not a process: decoding and cropping release the
    interpreter lock, nothing is copied or pickled, and there is no process that a signal could meet.
    """

    def __init__(
        self,
        begin: Callable[[int], Callable[[], T]],
        start: int,
        stop: int,
        *,
        abandon: Callable[[], None] = lambda: None,
        size: Callable[[T], int] = lambda _: 0,
        budget_bytes: int = 0,
    ) -> None:
        """Prepare.

        Args:
            begin: begins the batch of a step, and returns what waits for it. One is begun while another is waited for;
                all are begun, and waited for in their order, by one thread.
            start, stop: steps.
            abandon: gives up what that thread has begun and not waited for, and returns when nothing works on it any
                more. Called once, by it, when no more will be begun.
            size: bytes of a batch.
            budget_bytes: of the batches that wait or are being made.
        """
        self._begin, self._start, self._stop, self._abandon = begin, start, stop, abandon
        self._size, self._budget = size, budget_bytes
        self._largest: int | None = None  # of the batches so far
        self._waiting: deque[tuple[T | BaseException, int]] = deque()
        self._changed = threading.Condition()
        self._leaving = False
        self._compute_alone = single_threaded()
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

    def _has_room(self, begun: int) -> bool:
        there = len(self._waiting) + begun
        waiting = sum(size for _, size in self._waiting)
        if self._largest is None or not there:  # whatever the first one needs, it is made alone
            return not there
        return there < _AHEAD and waiting + (begun + 1) * self._largest <= self._budget

    def _fill(self) -> None:
        self._compute_alone()
        try:
            self._make()
        finally:
            self._abandon()

    def _make(self) -> None:
        begun: deque[Callable[[], T]] = deque()
        step = self._start
        while begun or step < self._stop:
            with self._changed:
                self._changed.wait_for(lambda: self._leaving or begun or self._has_room(0))
                if self._leaving:
                    return
                another = step < self._stop and len(begun) < _AT_ONCE and self._has_room(len(begun))
            if another:
                begun.append(self._beginning(step))
                step += 1
                continue
            size = 0
            try:
                item: T | BaseException = begun.popleft()()
                size = self._size(item)  # type: ignore[arg-type]
            except BaseException as error:  # noqa: BLE001 - handed to the consumer, who raises it
                item = error
            with self._changed:
                self._largest = max(self._largest or 0, size)
                self._waiting.append((item, size))
                self._changed.notify_all()
            if isinstance(item, BaseException):
                return
            del item

    def _beginning(self, step: int) -> Callable[[], T]:
        """What waits for the batch of a step, or raises the error with which it began."""
        try:
            return self._begin(step)
        except BaseException as error:  # noqa: BLE001 - raised when its turn comes
            fault = error

        def fail() -> T:
            raise fault

        return fail
