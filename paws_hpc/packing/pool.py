"""Shards built by worker processes, which end with their parent however it ends."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from paws_hpc.packing.write import ShardResult, ShardTask, build_shard
from paws_hpc.store.format import StoreError

_LOOK_INTERVAL_S = 0.25
_ORPHANED = 113
"""Exit status of a worker that ended because its parent closed the pipe between them, or is gone."""
_DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Slurm and terminals signal all processes of a job. The parent decides; the workers end with it."""
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_PID, _DONE = 0, 1
"""Columns of a worker's progress: process number, images done."""


def build_shards(
    tasks: Iterable[ShardTask], *, processes: int, threads: int, advance: Callable[[int], None]
) -> Iterator[ShardResult]:
    """Build shards, yielding each result when it is there, in any order.

    Tasks are taken one by one as workers, of so many ``threads`` each, become free. One process means this one.
    ``advance`` is called now and then with the number of images done since the last call.

    Raises:
        RecordError, SourceChangedError, StoreError, OSError: as :func:`paws_hpc.packing.write.build_shard`, of the
            first shard if several fail at once. All workers end.
        StoreError: a worker was killed or crashed; its shard is named.
    """
    if processes == 1:
        for task in tasks:
            yield build_shard(task, threads=threads, advance=advance)
        return
    context = multiprocessing.get_context("spawn")  # a fresh interpreter, which inherits no threads and no locks
    shared = context.RawArray("q", 2 * processes)
    rows = _rows(shared)
    life, parents_end = context.Pipe(duplex=False)
    running: dict[Future[ShardResult], tuple[ShardTask, int]] = {}
    workers: dict[int | None, BaseProcess] = {}
    free, remaining, seen = list(range(processes)), iter(tasks), 0
    with _started_processes_are_deaf():
        pool = ProcessPoolExecutor(processes, context, _begin, (shared, life, os.getcwd()))
    try:
        while True:
            for task in itertools.islice(remaining, len(free)):
                slot = free.pop()
                with _started_processes_are_deaf():
                    running[pool.submit(_work, task, slot, threads)] = task, slot
                workers |= {process.pid: process for process in multiprocessing.active_children()}
            if not running:
                break
            finished, _ = wait(running, timeout=_LOOK_INTERVAL_S, return_when=FIRST_COMPLETED)
            done = sum(row[_DONE] for row in rows)
            advance(done - seen)
            seen = done
            # Those that failed come last: what is finished can be kept.
            for future in sorted(finished, key=lambda f: (f.exception() is not None, running[f][0].number)):
                result = future.result()
                free.append(running.pop(future)[1])
                yield result
        pool.shutdown()
    except BaseException as error:
        parents_end.close()  # ends all workers at once
        pool.shutdown()
        for task, slot in running.values():
            for left in task.path.parent.glob(f".{task.path.name}.{rows[slot][_PID]}-*.tmp"):  # see files.atomic_write
                left.unlink(missing_ok=True)
        if isinstance(error, BrokenProcessPool):
            raise _death([(task, workers.get(rows[slot][_PID])) for task, slot in running.values()]) from None
        raise
    finally:
        parents_end.close()
        life.close()


def _rows(shared: Any) -> list[memoryview]:
    """One row of int64 for each worker."""
    cells = memoryview(shared).cast("B").cast("q")
    return [cells[start : start + 2] for start in range(0, len(cells), 2)]


@contextmanager
def _started_processes_are_deaf() -> Iterator[None]:
    """Let processes that are started within inherit blocked signals, and an OpenBLAS without a thread per core."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _DEAF_TO)
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(_ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # multiprocessing unblocks some


def _death(running: list[tuple[ShardTask, BaseProcess | None]]) -> StoreError:
    """Say which worker ended first, and how; all have ended by now."""
    for task, process in running:
        if process is not None and process.exitcode not in (None, _ORPHANED):
            return StoreError(
                f"the process that packed {task.path.name} ended with status {process.exitcode}. -9: memory ran out, "
                f"use fewer --workers. Else one of its images, such as {task.keys[0]!r}, breaks the decoder."
            )
    return StoreError(
        "the worker processes ended before they began; what they printed says why. A script that packs needs "
        "`if __name__ == '__main__':` around its calls."
    )


_row_of: list[memoryview] = []
"""In a worker: the rows of all workers."""


def _begin(shared: Any, life: Connection[Any, Any], folder: str) -> None:
    """Begin the work of a worker process, in the folder in which the parent works now."""
    os.chdir(folder)
    _row_of.extend(_rows(shared))
    threading.Thread(target=_end_with_parent, args=(life,), daemon=True).start()


def _end_with_parent(life: Connection[Any, Any]) -> None:
    """Wait for the end of the pipe that the parent alone holds open, then end in the middle of whatever is done."""
    life.poll(None)
    os._exit(_ORPHANED)


def _work(task: ShardTask, slot: int, threads: int) -> ShardResult:
    """Build a shard in a worker process."""
    row = _row_of[slot]
    row[_PID] = os.getpid()

    def advance(images: int) -> None:
        row[_DONE] += images

    return build_shard(task, threads=threads, advance=advance)
