"""Threads that make batches ahead of training: a pool that cuts slices of a batch, and the thread that orders batches.

Threads, not processes: decoding and cropping release the interpreter lock, nothing is copied or pickled, and there is
no process that a signal could meet.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
_AHEAD = 3  # batches, those in the making included: enough to hide one slow batch; more would only hold memory
_AT_ONCE = 2  # in the making: workers that are done with one batch go on to the next
_AHEAD_BYTES = 10**9  # of batches that wait or are being made, on the host and, as views, on the device


def single_threaded() -> Callable[[], None]:
    """An initialiser of worker threads, which limits each to one intra-op thread of torch.

    Otherwise each worker has as many torch threads of its own as the training thread. With more threads than cores,
    OpenMP puts a thread to sleep wherever it waits for another, and waking them makes a step of a small network half as
    long again (docs/benchmarks.md). The calling thread keeps its number of threads.
    """

    def limit() -> None:
        torch.get_num_threads()  # initialises this thread's number, which is otherwise set later to the last of any
        torch.set_num_threads(1)  # of this thread, MKL's too

    torch.get_num_threads()  # fixes the number of the calling thread
    return limit


class WorkerPool:
    """``count`` threads that work on slices of batches, each on one core."""

    def __init__(self, count: int, name: str) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name, initializer=single_threaded())
        self._local = threading.local()  # one thread may abandon its tasks while another still waits for its own

    @property
    def _begun(self) -> set[Future[Any]]:
        """Tasks that the calling thread has begun and not waited for."""
        begun: set[Future[Any]] = self._local.__dict__.setdefault("begun", set())
        return begun

    def begin(self, work: Callable[[slice], T], slices: Sequence[slice]) -> Callable[[], list[T]]:
        """Begin the work on every slice; the function that is returned waits, and gives the results in order, once."""
        begun: list[Future[T]] = []
        for each in slices:
            begun.append(self._pool.submit(work, each))
            self._begun.add(begun[-1])

        def results() -> list[T]:
            done = [future.result() for future in begun]
            self._begun.difference_update(begun)
            begun.clear()  # futures hold their results
            return done

        return results

    def abandon(self) -> None:
        """Cancel the calling thread's tasks that it has not waited for; returns when none is running any more."""
        for future in self._begun:
            future.cancel()
        wait(self._begun)
        self._begun.clear()


class Prefetch(Generic[T]):
    """The batches of steps ``start`` to ``stop - 1`` in order, made ahead; a context manager.

    ``with Prefetch(…) as batches`` gives the iterator. Beside the batch that the consumer has, at most three exist, and
    no more than fit ``budget_bytes`` (a batch that alone exceeds it is made once nothing else waits). The next batch is
    assumed to be as large as the largest yet.

    An error is raised where its batch would have been taken. When the block ends nothing works on batches any more,
    unless it is interrupted while it waits for that.
    """

    def __init__(
        self,
        begin: Callable[[int], Callable[[], T]],
        start: int,
        stop: int,
        *,
        abandon: Callable[[], None] = lambda: None,
        size: Callable[[T], int] = lambda _: 0,
        budget_bytes: int = _AHEAD_BYTES,
    ) -> None:
        """Prepare.

        Args:
            begin: begins the batch of a step, and returns a function that waits for it. One thread begins all batches,
                the next while it waits for the one before.
            start, stop: steps.
            abandon: cancels that thread's unfinished batches; it is called once, by that thread, at the end.
            size: bytes of a batch.
            budget_bytes: of the batches that wait or are being made.
        """
        self._begin, self._start, self._stop, self._abandon = begin, start, stop, abandon
        self._size, self._budget = size, budget_bytes
        self._largest: int | None = None  # batch so far
        self._waiting: deque[tuple[T | BaseException, int]] = deque()
        self._changed = threading.Condition()
        self._leaving = False
        self._limit_threads = single_threaded()
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
                    raise ValueError(f"the batch of step {step} is wanted outside the with block of its Prefetch.")
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
        self._limit_threads()
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
