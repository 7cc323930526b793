"""TensorBoard beside ``metrics.jsonl``: ``tensorboard --logdir runs`` shows what that file holds."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from paws_hpc.engine.tracking import Row, Tracker, read_rows

_LOG = logging.getLogger(__name__)


class TensorboardTracker(Tracker):
    """An event file that cannot raise: its first failure is logged once and ends it, and training goes on.

    A run that resumes writes its event file anew from ``metrics.jsonl`` and removes the earlier one. So the curve has
    neither a gap (of rows that a kill kept from the disk) nor a row twice, whatever reads it, and a run that turns
    TensorBoard on halfway has all of it.
    """

    def __init__(self, folder: Path, *, metrics: Path) -> None:
        """Begin an event file in ``folder`` with the rows of the file ``metrics``, which is as training goes on."""
        self._records: Any = None
        self._guarded("start", lambda: self._start(folder, metrics))

    def _start(self, folder: Path, metrics: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # noqa: PLC0415 - an optional package
        from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: PLC0415

        folder.mkdir(parents=True, exist_ok=True)
        earlier = list(folder.glob("events.out.tfevents.*"))
        # The time in nanoseconds, as two attempts may fall into one second, and a reader follows the order of names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(open(folder / name, "wb"))  # noqa: SIM115 - closed by close()
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # A TensorBoard that is looking on forgets what it read of the earlier file.
        self._write(Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START)))
        for row in read_rows(metrics):
            self._record(row["step"], row)
        for path in earlier:
            path.unlink()

    def log(self, step: int, row: Row) -> None:
        """Record the numbers of ``row`` at a 0-based step."""
        if self._records is not None:
            self._guarded("log", lambda: self._record(step, row))

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())

    def _record(self, step: int, row: Row) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # noqa: PLC0415
        from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415

        numbers = {name: number for name, value in row.items() if (number := _number(value)) is not None}
        numbers.pop("step", None)
        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        if values:
            self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            self._records.flush()  # as metrics.jsonl is written: what was logged survives a kill

    def close(self, error: BaseException | None) -> None:
        """Close the file."""
        if self._records is not None:
            self._guarded("close", self._records.close)

    def _guarded(self, what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - an optional package may raise anything, and training must not suffer
            message = "TensorBoard is off from here on: it could not %s (%s: %s)."
            _LOG.warning(message, what, type(error).__name__, error)
            records, self._records = self._records, None
            if records is not None:
                with suppress(OSError, ValueError):
                    records.close()


def _number(value: Any) -> float | None:
    """A value as TensorBoard takes it; ``metrics.jsonl`` spells what JSON cannot hold."""
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
