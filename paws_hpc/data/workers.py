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

    ``with Prefetch(…) as batches`` gives the iterator. Beside the batch that the consumer has, at most ``ahead`` are
    made, and one more is begun.

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
        ahead: int = 3,
    ) -> None:
        """Prepare.

        Args:
            begin: begins the batch of a step, and returns a function that waits for it. One thread begins all batches,
                the next before it waits for the one before: workers that are done with one go on to the next.
            start, stop: steps.
            abandon: cancels that thread's unfinished batches; it is called once, by that thread, at the end.
            ahead: batches: three hide one that is slow, and more would only hold memory.
        """
        self._begin, self._abandon, self._ahead = begin, abandon, ahead
        self._steps = iter(range(start, stop))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=single_threaded())
        self._begun: deque[Future[Callable[[], T]]] = deque()
        self._made: deque[Future[T]] = deque()
        self._open = False

    def __enter__(self) -> Iterator[T]:
        self._open = True
        for _ in range(1 + self._ahead):
            self._go_on()
        return self._batches()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        futures: list[Future[Any]] = [*self._made, *self._begun]
        for future in futures:
            future.cancel()
        self._pool.submit(self._abandon).result()
        self._pool.shutdown()

    def _batches(self) -> Iterator[T]:
        while self._made:
            if not self._open:
                raise ValueError("a batch is wanted outside the with block of its Prefetch.")
            batch = self._made.popleft().result()
            self._go_on()
            yield batch
            del batch  # before the next is waited for: it would count as one more

    def _go_on(self) -> None:
        """Begin one more batch, then make the one that was begun before it."""
        if (step := next(self._steps, None)) is not None:
            self._begun.append(self._pool.submit(self._begin, step))
        if len(self._begun) == 2 or (self._begun and step is None):
            begun = self._begun.popleft()
            self._made.append(self._pool.submit(_finish, begun))


def _finish(begun: Future[Callable[[], T]]) -> T:
    """The batch that was begun, or the error with which it began."""
    return begun.result()()
