"""Shards built by processes, one shard at a time each, which end with their parent however it ends."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from paws_hpc.packing.building import Board, ShardResult, ShardTask, build_shard
from paws_hpc.store.format import StoreError

_LOOK_INTERVAL_S = 0.25
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from paws_hpc.packing.processes import work; work(*map(int, sys.argv[2:]))"
)
"""A fresh interpreter: it inherits no threads, no locks, and does not import the parent's main module again."""
_DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Slurm and terminals tell all processes of a job. The parent decides; the workers end with it."""


def build_shards(
    tasks: Iterable[ShardTask], *, processes: int, threads: int, advance: Callable[[int], None]
) -> Iterator[ShardResult]:
    """Build shards, giving each result when it is there, in any order.

    Args:
        tasks: taken one by one as workers become free, so that few are in memory.
        processes: workers; 1 works in this process.
        threads: of each worker.
        advance: is told now and then how many more images are done.

    Raises:
        RecordError, SourceChangedError, StoreError, OSError: the first error of any worker; see
            :func:`paws_hpc.packing.building.build_shard`. All workers end.
        StoreError: a worker ended without a word; the images that it was looking at are named.
    """
    if processes == 1:
        for task in tasks:
            board = _Telling(threads, advance)
            yield build_shard(task, threads=threads, board=board)
        return
    with contextlib.ExitStack() as workers:
        remaining = iter(tasks)
        busy: dict[Connection, _Worker] = {}
        for task in remaining:
            worker = workers.enter_context(contextlib.closing(_Worker(threads)))
            worker.begin(task)
            busy[worker.connection] = worker
            if len(busy) == processes:
                break
        while busy:
            ready = wait(list(busy), timeout=_LOOK_INTERVAL_S)
            for worker in busy.values():
                advance(worker.news())
            for connection in ready:
                assert isinstance(connection, Connection)
                yield busy[connection].result()
                following = next(remaining, None)
                if following is None:
                    busy.pop(connection).close()
                else:
                    busy[connection].begin(following)


class _Telling(Board):
    """A board whose reader is told of every change: the work is done in this process."""

    def __init__(self, threads: int, advance: Callable[[int], None]) -> None:
        super().__init__(Board.private(threads).cells)
        self._advance = advance

    def add(self, images: int) -> None:
        """Count images as done."""
        super().add(images)
        self._advance(images)


class _Worker:
    """The parent's end of one worker."""

    def __init__(self, threads: int) -> None:
        """Start the process.

        The board is shared memory. Of the pipe ``life`` the parent holds the only writing end, so the worker reads its
        end when the parent is gone.
        """
        self.connection, theirs = Pipe()
        board = os.memfd_create("board")
        os.ftruncate(board, 8 * (1 + threads))
        self.board = Board(memoryview(mmap.mmap(board, 0)).cast("q"))
        life, self._life = os.pipe()
        passed = (theirs.fileno(), board, life)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, json.dumps(sys.path), *map(str, passed), str(threads)],
                stdin=subprocess.DEVNULL,
                pass_fds=passed,
                start_new_session=True,  # Ctrl-C at a terminal is for the parent
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError:
            os.close(self._life)
            self.connection.close()
            raise
        finally:
            theirs.close()
            os.close(board)
            os.close(life)
        self._task: ShardTask | None = None
        self._counted = 0
        self._open = True

    def begin(self, task: ShardTask) -> None:
        """Hand out a task; the worker is idle."""
        self._task, self._counted = task, 0
        self.board.cells[0] = 0
        with contextlib.suppress(BrokenPipeError):  # it died: result() says so
            self.connection.send(task)

    def news(self) -> int:
        """Images done since the last call."""
        done = self.board.done
        fresh, self._counted = done - self._counted, done
        return fresh

    def result(self) -> ShardResult:
        """Take the answer, which is there.

        Raises:
            StoreError, OSError, RuntimeError: what the worker reported, or that it died.
        """
        try:
            answer: ShardResult | Exception = self.connection.recv()
        except (EOFError, ConnectionResetError, pickle.UnpicklingError) as error:
            raise self._death() from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _death(self) -> StoreError:
        assert self._task is not None, "an idle worker is not waited for"
        keys = [self._task.images.keys[place] for place in self.board.current]
        status = self.process.wait()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        looking_at = ", ".join(map(repr, keys)) or "no image"
        return StoreError(
            f"the process that packed {self._task.path.name} {how} while it looked at {looking_at}. "
            "SIGKILL means that memory ran out: use fewer --workers. Otherwise one of these images breaks the decoder."
        )

    def close(self) -> None:
        """End the process at once, and remove the temporary file that it was writing."""
        if not self._open:
            return
        self._open = False
        self.process.kill()  # no other signal is sure to reach it
        self.process.wait()
        self.connection.close()
        os.close(self._life)
        if self._task is not None:
            path = self._task.path
            for left in path.parent.glob(f".{path.name}.{self.process.pid}-*.tmp"):  # named by files.atomic_write
                left.unlink(missing_ok=True)


def work(connection_number: int, board_number: int, life: int, threads: int) -> None:
    """Be a worker: build shards until the parent has no more, or is gone."""
    for number in _DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(life,), daemon=True).start()
    board = Board(memoryview(mmap.mmap(board_number, 0)).cast("q"))
    connection: Connection[Any, Any] = Connection(connection_number)
    while True:
        try:
            task: ShardTask = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        answer: ShardResult | Exception
        try:
            answer = build_shard(task, threads=threads, board=board)
        except (OSError, ValueError) as error:  # what users can cause or repair
            answer = error
        except Exception as error:  # noqa: BLE001 - a fault of ours is told to the parent, which raises it
            answer = RuntimeError(f"a worker failed: {error!r}\n{traceback.format_exc()}")
        with contextlib.suppress(BrokenPipeError):  # nobody is left to hear it
            connection.send(answer)


def _end_with_parent(life: int) -> None:
    """Wait for the end of the pipe that the parent holds open."""
    os.read(life, 1)
    os._exit(1)
