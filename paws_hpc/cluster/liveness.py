"""Whether an earlier start of a job still runs: asked of Slurm where it can be, else watched by its heartbeat."""

from __future__ import annotations

import logging
import os
import socket
import time

from paws_hpc.cluster import scheduler
from paws_hpc.cluster.scheduler import SchedulerError, SchedulerUnreachableError
from paws_hpc.stages.attempts import BEAT_EVERY_S, Start, read_beat

_LOG = logging.getLogger(__name__)


def is_alive(start: Start, *, own_job_id: str | None) -> bool:
    """Whether a start without a recorded end still runs.

    Args:
        start: the earlier one.
        own_job_id: of the asking job: what ran under the same id before is over, for Slurm started the id anew.
    """
    holder = start.holder
    if holder.job_id is None:
        if holder.host == socket.gethostname() and not _exists(holder.pid):
            return False
        return _beats(start)
    if holder.job_id == own_job_id:
        return False
    try:
        state = scheduler.job_state(holder.job_id)
    except (SchedulerError, SchedulerUnreachableError) as error:
        _LOG.warning(
            "Slurm cannot say whether job %s still runs, so its heartbeat is watched: %s", holder.job_id, error
        )
        return _beats(start)
    # A job that waits in the queue again has left; it will take its own next start.
    return state is not None and state != "PENDING" and state not in scheduler.ENDED


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _beats(start: Start) -> bool:
    """Whether the heartbeat changes while it is watched; comparing clocks of two machines would prove nothing."""
    before, deadline = read_beat(start.folder, start.number), time.monotonic() + 3 * BEAT_EVERY_S
    while time.monotonic() < deadline:
        time.sleep(BEAT_EVERY_S / 10)
        if read_beat(start.folder, start.number) != before:
            return True
    return False
