"""The way back into Slurm's queue, for the job to which this process belongs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from paws_hpc.cluster import scheduler
from paws_hpc.cluster.scheduler import SchedulerUnreachableError
from paws_hpc.files import read_json

_LOG = logging.getLogger(__name__)
_ASK_AGAIN_S = 2.0

Answer = TypeVar("Answer")


def own_job() -> tuple[str, int]:
    """The id, ``17`` or ``18_0``, and how often Slurm has started it before.

    Raises:
        KeyError: this process does not belong to a job.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")  # an element's SLURM_JOB_ID can be the id of the whole array
    job_id = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    return job_id, int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def patiently(ask: Callable[[], Answer]) -> Answer:
    """Ask Slurm until it can be reached: for a job that must leave there is nothing better to do with its time."""
    while True:
        try:
            return ask()
        except SchedulerUnreachableError as error:
            _LOG.warning("%s Asking again.", error)
            time.sleep(_ASK_AGAIN_S)


def queue_again(chain: Path, job_id: str, restart: int, *, record: Callable[[str, str | None], None]) -> None:
    """Put a running job back into the queue under its id, unless somebody ended it.

    A job that is cancelled has some seconds left, in which ``scontrol requeue`` would bring it back to life.

    Args:
        chain: ``chain.json``, which says whether a person has cancelled the whole chain.
        job_id: of this job.
        restart: of this start.
        record: told how this start ends, ``requeued`` or ``cancelled``, and why, before Slurm ends the process.

    Raises:
        SchedulerError: Slurm refuses to queue it again.
    """

    def attempt() -> None:
        what, told = scheduler.fate(job_id, restart)
        if what == "runs" and "cancelled" in read_json(chain):
            what, told = "ended", "cancelled with its chain"
        if what == "runs":
            record("requeued", None)
            scheduler.requeue(job_id)
            _LOG.warning("Job %s is queued again.", job_id)
        else:
            record("requeued" if what == "replaced" else "cancelled", f"Slurm said: {told}.")
            _LOG.warning("Job %s is not queued again by this process: %s.", job_id, told)

    patiently(attempt)
