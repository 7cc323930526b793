"""The starts of a job as files: who holds it, since when, and how each start ended.

A job (a stage, or a trial of a sweep) is started anew whenever it was preempted, crashed or launched again. Each start
is a numbered file ``start-0001.json`` in the job's folder, which can be created only once: creating the next number
takes the job over, and the holder of the number before finds it at its next write and stops. That is a lease with
fencing: a start that was believed dead, on a node that lost its network say, cannot write over its successor's work.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from paws_hpc.files import create_json, read_json, write_json

_LOG = logging.getLogger(__name__)

BEAT_EVERY_S = 10.0
_LOOK_AGAIN_S = 2.0


class LeaseHeldError(RuntimeError):
    """Another start of the job is alive."""


class LeaseLostError(RuntimeError):
    """Another start of the job has taken over."""


@dataclass(frozen=True)
class Holder:
    """Who starts a job.

    Attributes:
        job: its name, such as ``pretrain`` or ``finetune/lr=0.05,epochs=30``.
        job_id: the scheduler's; None without a scheduler.
        restart: how often the scheduler has started this id before.
        key: known to all ranks of this start and to no other start, so that they can name their failures.
        host: of rank 0.
        pid: of rank 0.
        ranks: processes that run it together.
        progress: training steps of the newest checkpoint at the start, 0 where there is none.
    """

    job: str
    job_id: str | None
    restart: int
    key: str
    host: str
    pid: int
    ranks: int
    progress: int

    @classmethod
    def this_process(
        cls, job: str, *, ranks: int, progress: int, key: str, job_id: str | None = None, restart: int = 0
    ) -> Holder:
        """Rank 0 is the calling process."""
        return cls(job, job_id, restart, key, socket.gethostname(), os.getpid(), ranks, progress)


@dataclass(frozen=True)
class Start:
    """A start as its files tell.

    Attributes:
        folder: of the job.
        number: counts from 1.
        holder: who.
        began: ISO time, UTC.
        beat: the last heartbeat (``beat``, ``time``), None before the first.
        end: how it ended (``how``, ``step``, ``seconds``, ``message``), None while it runs or if it was killed.
        failures: what ranks said when they failed (``rank``, ``type``, ``message``, ``definite``, ``host``, ``time``).
    """

    folder: Path
    number: int
    holder: Holder
    began: str
    beat: dict[str, Any] | None
    end: dict[str, Any] | None
    failures: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        """How long it ran, as far as is known: to its end, or to the last sign of life."""
        if self.end is not None:
            return float(self.end["seconds"])
        if self.beat is None:
            return 0.0
        return (datetime.fromisoformat(self.beat["time"]) - datetime.fromisoformat(self.began)).total_seconds()


def read_starts(folder: Path) -> list[Start]:
    """All starts of the job whose folder this is, oldest first; none if it was never started."""
    return [_read(path) for path in sorted(folder.glob("start-*.json"))]


def _read(path: Path) -> Start:
    folder, number = path.parent, path.stem.removeprefix("start-")
    value = read_json(path)
    began = value.pop("began")
    end = folder / f"end-{number}.json"
    return Start(
        folder=folder,
        number=int(number),
        holder=Holder(**value),
        began=began,
        beat=read_beat(folder, int(number)),
        end=read_json(end) if end.exists() else None,
        failures=read_failures(folder, value["key"]),
    )


def read_failures(folder: Path, key: str) -> list[dict[str, Any]]:
    """What the ranks of a start said when they failed (``rank``, ``type``, ``message``, ``definite``, …)."""
    return [
        read_json(path) | {"rank": int(path.stem.rpartition("rank")[2])}
        for path in sorted(folder.glob(f"failure-{key}-rank*.json"))
    ]


def stage_times(jobs: Path, stage: str) -> tuple[str, float | None]:
    """The state of a stage, as the starts of its jobs tell, and the seconds that they took together.

    Args:
        jobs: the folder of all jobs of a run.
        stage: its name.

    Returns:
        ``pending``, ``running`` (or killed, which nobody could write down), ``failed``, or else how the last start of
        its last job ended; seconds are None for a stage that was never started.
    """
    folders = sorted({path.parent for path in (jobs / stage).rglob("start-*.json")})
    starts = [read_starts(folder) for folder in folders]
    if not starts:
        return "pending", None
    ends = [several[-1].end["how"] if several[-1].end else "running" for several in starts]
    state = next((how for how in ("failed", "crashed", "running") if how in ends), ends[-1])
    return state.replace("crashed", "failed"), round(sum(start.seconds for several in starts for start in several), 2)


def read_beat(folder: Path, number: int) -> dict[str, Any] | None:
    """The last heartbeat of a start, None before the first."""
    path = folder / f"beat-{number:04d}.json"
    return read_json(path) if path.exists() else None


class Lease:
    """The right to write a job's files, held by rank 0 of one start; a context manager that keeps its heart beating."""

    def __init__(self, folder: Path, number: int) -> None:
        """Of the start ``number``, which exists; :func:`acquire` makes one."""
        self.folder, self.number = folder, number
        self.ended = False
        self._began = time.monotonic()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def fence(self) -> None:
        """Raise LeaseLostError if another start has taken over; called before every write that others rely on."""
        if _start_path(self.folder, self.number + 1).exists():
            raise LeaseLostError(
                f"Start {self.number + 1} of {self.folder} has taken over from start {self.number}, which is this "
                f"process ({os.getpid()} on {socket.gethostname()}). It stops here and writes nothing more."
            )

    def end(self, how: str, *, step: int | None = None, message: str | None = None) -> None:
        """Record how this start ended.

        Args:
            how: ``done``, ``requeued``, ``cancelled``, ``failed`` or ``interrupted``.
            step: training steps that are saved, where that is known.
            message: for people.
        """
        seconds = round(time.monotonic() - self._began, 2)
        self.ended = True
        record_end(self.folder, self.number, how, seconds=seconds, step=step, message=message)

    def _beat(self) -> None:
        count = 0
        while not self._left.wait(BEAT_EVERY_S if count else 0.0):
            count += 1
            try:
                write_json(self.folder / f"beat-{self.number:04d}.json", {"beat": count, "time": now()})
            except OSError as error:  # a full disk, say: what matters will say so too, and louder
                _LOG.warning("No heartbeat: %s", error)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()


def acquire(folder: Path, holder: Holder, *, is_alive: Callable[[Start], bool], wait_s: float) -> Lease:
    """Begin the next start of a job.

    Args:
        folder: of the job.
        holder: who starts it.
        is_alive: whether an earlier start that recorded no end still runs.
        wait_s: to wait for such a start to end, for a cancelled job has some seconds to leave.

    Raises:
        LeaseHeldError: another start is alive, or began at the same moment.
    """
    deadline = time.monotonic() + wait_s
    starts = read_starts(folder)
    while starts and starts[-1].end is None and is_alive(starts[-1]):
        other = starts[-1].holder
        if time.monotonic() > deadline:
            raise LeaseHeldError(
                f"{folder} is in the hands of {_who(other)}, which began {starts[-1].began}. Two writers would spoil "
                "the run: wait for that job or cancel it, then launch again."
            )
        time.sleep(_LOOK_AGAIN_S)
        starts = read_starts(folder)
    number = len(starts) + 1
    try:
        create_json(_start_path(folder, number), asdict(holder) | {"began": now()})
    except FileExistsError as error:
        raise LeaseHeldError(
            f"Two jobs started {folder} at the same moment; {_who(_read(_start_path(folder, number)).holder)} was "
            "first, and this one leaves."
        ) from error
    return Lease(folder, number)


def record_end(
    folder: Path, number: int, how: str, *, seconds: float, step: int | None = None, message: str | None = None
) -> None:
    """Write how start ``number`` ended; see :meth:`Lease.end`."""
    write_json(folder / f"end-{number:04d}.json", {"how": how, "step": step, "seconds": seconds, "message": message})


def record_failure(folder: Path, key: str, rank: int, error: BaseException, *, definite: bool) -> None:
    """Say why a rank failed, for those who decide whether to try again and for ``status``.

    Args:
        folder: of the job.
        key: of the start, which it may have failed to begin.
        rank: that failed.
        error: why.
        definite: whether trying again must fail in the same way.
    """
    write_json(
        folder / f"failure-{key}-rank{rank}.json",
        {
            "type": type(error).__name__,
            "message": str(error),
            "definite": definite,
            "host": socket.gethostname(),
            "time": datetime.now(UTC).isoformat(),  # to the microsecond: who failed first is what people ask
        },
    )


def now() -> str:
    """ISO time, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _start_path(folder: Path, number: int) -> Path:
    return folder / f"start-{number:04d}.json"


def _who(holder: Holder) -> str:
    job = f"job {holder.job_id}" if holder.job_id else f"process {holder.pid}"
    return f"{job} on {holder.host}"
