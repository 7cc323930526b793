"""The attempts of a job as files: who holds it, since when, and how each attempt ended.

Each is a numbered file ``start-0001.json`` in the job's folder, which can be created only once: creating the next
number takes the job over, and the holder of the number before finds it at its next write and stops. So an attempt that
was believed dead, on a node that lost its network say, cannot write over its successor's work.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paws_hpc.files import create_json, read_json, write_json

_LOG = logging.getLogger(__name__)

BEAT_EVERY_S = 10.0
_LOOK_AGAIN_S = 2.0


class LeaseHeldError(RuntimeError):
    """Another attempt of the job is alive."""


class LeaseLostError(RuntimeError):
    """Another attempt of the job has taken over."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """An attempt, read from its files.

    Attributes:
        folder: of the job; ``job`` is its name.
        number: counts from 1.
        job_id: the scheduler's; None without a scheduler.
        restart: how often the scheduler has started this id before.
        key: shared by the ranks of this attempt alone; their failures are named by it.
        host: of rank 0, and its ``pid``.
        progress: training steps of the newest checkpoint when the attempt began, 0 where there is none.
        beat: the last heartbeat (``beat``, ``time``), None before the first.
        end: how it ended (``how``, ``step``, ``seconds``, ``message``), None while it runs or if it was killed.
        failures: why ranks failed (``rank``, ``type``, ``message``, ``permanent``, ``host``, ``time``).
    """

    folder: Path
    number: int
    job: str
    job_id: str | None
    restart: int
    key: str
    host: str
    pid: int
    ranks: int
    progress: int
    began: str
    beat: dict[str, Any] | None
    end: dict[str, Any] | None
    failures: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        """How long it ran: to its end, or to the last sign of life."""
        if self.end is not None:
            return float(self.end["seconds"])
        if self.beat is None:
            return 0.0
        return (datetime.fromisoformat(self.beat["time"]) - datetime.fromisoformat(self.began)).total_seconds()


def read_attempts(folder: Path) -> list[Attempt]:
    """All attempts of the job whose folder this is, oldest first; none if it was never started."""
    return [_read(path) for path in sorted(folder.glob("start-*.json"))]


def _read(path: Path) -> Attempt:
    folder, number, began = path.parent, int(path.stem.removeprefix("start-")), read_json(path)
    end = folder / f"end-{number:04d}.json"
    return Attempt(
        folder=folder,
        number=number,
        beat=read_beat(folder, number),
        end=read_json(end) if end.exists() else None,
        failures=read_failures(folder, began["key"]),
        **began,
    )


def read_failures(folder: Path, key: str) -> list[dict[str, Any]]:
    """The failures of an attempt's ranks, as in :class:`Attempt`."""
    return [
        read_json(path) | {"rank": int(path.stem.rpartition("rank")[2])}
        for path in sorted(folder.glob(f"failure-{key}-rank*.json"))
    ]


def first_failure(attempt: Attempt) -> dict[str, Any] | None:
    """The failure of the rank that failed first: the others often fail of its absence."""
    return min(attempt.failures, key=lambda failure: str(failure.get("time")), default=None)


def log_of(logs: Path, job_id: str | None, rank: int) -> Path | None:
    """The log of a rank in ``logs/<stage>`` of a run; without a job's id, of the newest job there."""
    if job_id is not None:
        path = logs / f"{job_id}_{rank}_log.out"
        return path if path.exists() else None
    return max(logs.glob(f"*_{rank}_log.out"), key=lambda path: path.stat().st_mtime, default=None)


def stage_state(jobs: Path, stage: str) -> tuple[str, float | None]:
    """The state of a stage, from the attempts of its jobs in the folder ``jobs``, and the seconds that they took.

    Returns:
        ``pending``, ``running`` (or killed, which nobody could write down), ``failed``, or else how the last attempt of
        its last job ended; seconds are None for a stage that was never started.
    """
    folders = sorted({path.parent for path in (jobs / stage).rglob("start-*.json")})
    attempts = [read_attempts(folder) for folder in folders]
    if not attempts:
        return "pending", None
    ends = [of_job[-1].end["how"] if of_job[-1].end else "running" for of_job in attempts]
    state = next((how for how in ("failed", "crashed", "running") if how in ends), ends[-1])
    seconds = sum(attempt.seconds for of_job in attempts for attempt in of_job)
    return state.replace("crashed", "failed"), round(seconds, 2)


def read_beat(folder: Path, number: int) -> dict[str, Any] | None:
    """The last heartbeat of an attempt, None before the first."""
    path = folder / f"beat-{number:04d}.json"
    return read_json(path) if path.exists() else None


def beats(attempt: Attempt) -> bool:
    """Whether the heartbeat changes while it is watched; comparing clocks of two machines would prove nothing."""
    before, deadline = read_beat(attempt.folder, attempt.number), time.monotonic() + 3 * BEAT_EVERY_S
    while time.monotonic() < deadline:
        time.sleep(BEAT_EVERY_S / 10)
        if read_beat(attempt.folder, attempt.number) != before:
            return True
    return False


class Lease:
    """The right to write a job's files, held by rank 0 of one attempt; a context manager that writes heartbeats.

    :func:`acquire` makes one.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.ended = False
        self._began = time.monotonic()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def fence(self) -> None:
        """Raise LeaseLostError if another attempt has taken over; called before every write that others rely on."""
        if _attempt_path(self.folder, self.number + 1).exists():
            raise LeaseLostError(
                f"Attempt {self.number + 1} of {self.folder} has taken over from attempt {self.number}, which is this "
                f"process ({os.getpid()} on {socket.gethostname()}). It stops here and writes nothing more."
            )

    def end(self, how: str, *, step: int | None = None, message: str | None = None) -> None:
        """Record how this attempt ended: ``done``, ``requeued``, ``cancelled``, ``failed`` or ``interrupted``."""
        seconds = round(time.monotonic() - self._began, 2)
        self.ended = True
        record_end(self.folder, self.number, how, seconds=seconds, step=step, message=message)

    def _beat(self) -> None:
        count = 0
        while not self._left.wait(BEAT_EVERY_S if count else 0.0):
            count += 1
            try:
                write_json(self.folder / f"beat-{self.number:04d}.json", {"beat": count, "time": now()})
            except OSError as error:  # a full disk, say, which will stop the job itself
                _LOG.warning("No heartbeat: %s", error)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        self._thread.join()


def acquire(folder: Path, facts: Mapping[str, Any], *, is_alive: Callable[[Attempt], bool], wait_s: float) -> Lease:
    """Begin the next attempt of a job.

    Args:
        folder: of the job.
        facts: ``job``, ``job_id``, ``restart``, ``key``, ``ranks`` and ``progress`` of the :class:`Attempt`.
        is_alive: whether an earlier attempt that recorded no end still runs.
        wait_s: to wait for such an attempt to end, for a cancelled job has some seconds to leave.

    Raises:
        LeaseHeldError: another attempt is alive, or began at the same moment.
    """
    deadline = time.monotonic() + wait_s
    attempts = read_attempts(folder)
    while attempts and attempts[-1].end is None and is_alive(attempts[-1]):
        other = attempts[-1]
        if time.monotonic() > deadline:
            raise LeaseHeldError(
                f"{folder} is in the hands of {_who(other)}, which began {other.began}. Two writers would spoil "
                "the run: wait for that job or cancel it, then launch again."
            )
        time.sleep(_LOOK_AGAIN_S)
        attempts = read_attempts(folder)
    number = len(attempts) + 1
    try:
        here = {"host": socket.gethostname(), "pid": os.getpid(), "began": now()}
        create_json(_attempt_path(folder, number), {**facts, **here})
    except FileExistsError as error:
        first = _who(_read(_attempt_path(folder, number)))
        raise LeaseHeldError(
            f"Two jobs started {folder} at the same moment; {first} was first, and this one leaves."
        ) from error
    return Lease(folder, number)


def record_end(
    folder: Path, number: int, how: str, *, seconds: float, step: int | None = None, message: str | None = None
) -> None:
    """Write how an attempt ended, as in :meth:`Lease.end` or ``crashed``; ``step`` counts what is saved, if known."""
    write_json(folder / f"end-{number:04d}.json", {"how": how, "step": step, "seconds": seconds, "message": message})


def record_failure(folder: Path, key: str, rank: int, error: BaseException, *, permanent: bool) -> None:
    """Write why a rank of the attempt with this key failed; ``permanent`` if it must fail again in the same way."""
    write_json(
        folder / f"failure-{key}-rank{rank}.json",
        {
            "type": type(error).__name__,
            "message": str(error),
            "permanent": permanent,
            "host": socket.gethostname(),
            "time": datetime.now(UTC).isoformat(),  # to the microsecond: it shows who failed first
        },
    )


def now() -> str:
    """ISO time, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _attempt_path(folder: Path, number: int) -> Path:
    return folder / f"start-{number:04d}.json"


def _who(attempt: Attempt) -> str:
    job = f"job {attempt.job_id}" if attempt.job_id else f"process {attempt.pid}"
    return f"{job} on {attempt.host}"
