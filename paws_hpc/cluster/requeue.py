"""How a job goes back into Slurm's queue: preempted, out of time, or after its ranks crashed.

    python -m paws_hpc.cluster.requeue RUN RESTARTS_WITHOUT_PROGRESS

is what the batch script of a job runs when its ranks have failed: it queues the job again, or lets it fail. The script
outlives ranks that were killed.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from paws_hpc.cluster import scheduler
from paws_hpc.cluster.chain import Chain, job_called
from paws_hpc.cluster.scheduler import SchedulerError, SchedulerUnreachableError
from paws_hpc.cluster.signals import StopRequests
from paws_hpc.files import read_json
from paws_hpc.stages.attempts import Attempt, Lease, read_attempts, read_failures, record_end
from paws_hpc.stages.run_folder import RunFolder

_LOG = logging.getLogger(__name__)
_ASK_AGAIN_S = 2.0
_PATIENCE = 0.8  # of the time between signal and end, before the job goes back without having saved

Answer = TypeVar("Answer")


def own_job() -> tuple[str, int]:
    """The id of the job that this process belongs to, ``17`` or ``18_0``, and how often Slurm has started it before.

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
    """Put a running job back into the queue under its id, unless somebody ended it, or its chain (``chain.json``).

    A job that is cancelled has some seconds left, in which ``scontrol requeue`` would bring it back to life.
    ``record`` is called with how this attempt ends (``requeued`` or ``cancelled``) and why, before Slurm ends it.

    Raises:
        SchedulerError: Slurm refuses to queue it again.
    """

    def attempt() -> None:
        fate, state = scheduler.fate(job_id, restart)
        if fate == "runs" and "cancelled" in read_json(chain):
            fate, state = "ended", "cancelled with its chain"
        if fate == "runs":
            record("requeued", None)
            scheduler.requeue(job_id)
            _LOG.warning("Job %s is queued again.", job_id)
        else:
            record("requeued" if fate == "replaced" else "cancelled", f"Slurm said: {state}.")
            _LOG.warning("Job %s is not queued again by this process: %s.", job_id, state)

    patiently(attempt)


class SlurmJob:
    """The job to which this process belongs, as one of its ranks: requests to stop, and the way back into the queue.

    Attributes:
        lease: of rank 0, as soon as it holds it.
    """

    def __init__(self, chain: Path, *, notice_s: float, trains: bool) -> None:
        """Take requests to stop from now on.

        ``notice_s`` lie between Slurm's signal and the end of the job. A stage that does not train has nothing to save,
        and goes back into the queue at once.
        """
        self.job_id, self.restart = own_job()
        self.key = f"{self.job_id}-{self.restart}"
        self.lease: Lease | None = None
        self._chain = chain
        self._stops = StopRequests(patience_s=_PATIENCE * notice_s if trains else 0.0, overdue=self._overdue)
        self.requested = self._stops.requested
        self.leave = self._stops.answered  # the stage is over: whatever signal comes now does not matter
        self._stops.listen()

    def give_back(self, *, step: int | None) -> None:
        """Put the job back into the queue, unless somebody ended it.

        A job that merely leaves while it is being preempted counts as failed, so it must ask to be queued itself.
        ``step`` counts what is saved; None if it goes back from its last checkpoint.

        Raises:
            SchedulerError: Slurm refuses to queue it again.
        """

        def record(how: str, message: str | None) -> None:
            if self.lease is not None:
                self.lease.end(how, step=step, message=message)

        queue_again(self._chain, self.job_id, self.restart, record=record)

    def _overdue(self) -> None:
        """Runs on the thread that took the signal, while the main thread is busy with what cannot be interrupted."""
        status = 0
        try:
            self.give_back(step=None)
        except SchedulerError as error:  # another rank was faster, and the status no longer matters; or it is refused
            _LOG.error("%s", error)
            status = 1
        logging.shutdown()
        os._exit(status)  # files are whole or absent at any moment, and nothing else is left to tidy up


def after_crash(path: Path, limit: int) -> None:
    """Queue the job again whose batch script calls this, or let it fail after ``limit`` crashes without progress.

    ``path`` is the run directory.
    """
    job_id, restart = own_job()
    fate, state = patiently(lambda: scheduler.fate(job_id, restart))
    if fate != "runs":  # the usual case, after a preemption
        _LOG.info("Job %s is in the queue again already, or was ended by others: %s.", job_id, state)
        return
    run = RunFolder(path)
    name = Chain(run).job_name(job_id)
    folder, progress = run.job(name), job_called(name).progress(run)
    try:
        attempts = _record_crash(folder, job_id, restart)
    except OSError as error:  # a full disk: the next attempt could not write either
        _LOG.error("%s crashed, and nothing can be written: %s. Mend that, then launch again.", name, error)
        return
    permanent = [failure for failure in read_failures(folder, f"{job_id}-{restart}") if failure["permanent"]]
    fruitless = fruitless_crashes(attempts, progress, restart)
    if permanent:
        _LOG.error("%s failed and would fail again: %s", name, permanent[0]["message"])
    elif fruitless > limit:
        _LOG.error("%s crashed %d times in a row without getting past step %d: it fails.", name, fruitless, progress)
    else:
        _LOG.warning("%s crashed, %d times in a row without getting past step %d.", name, fruitless, progress)
        queue_again(run.chain, job_id, restart, record=lambda how, message: None)


def _record_crash(folder: Path, job_id: str, restart: int) -> list[Attempt]:
    """The attempts under this id; the end of the present one is written down if it had no time to do so itself."""
    attempts = [attempt for attempt in read_attempts(folder) if attempt.job_id == job_id]
    last = attempts[-1] if attempts else None
    if last is None or last.restart != restart or last.end is not None:
        return attempts
    message = last.failures[0]["message"] if last.failures else "A rank was killed: by the system for memory, say."
    record_end(folder, last.number, "crashed", seconds=last.seconds, message=message)
    return _record_crash(folder, job_id, restart)


def fruitless_crashes(attempts: list[Attempt], progress: int, restart: int) -> int:
    """How many attempts of one job id in a row crashed without a newer checkpoint than that of ``progress`` steps.

    A preempted attempt does not count, nor one that ended with its node, whose end nobody could write down. Those up to
    the present ``restart`` that are not in ``attempts`` crashed before they could begin.
    """
    count = restart - (attempts[-1].restart if attempts else -1)
    for attempt in reversed(attempts):
        if attempt.progress < progress:
            break
        count += attempt.end is not None and attempt.end["how"] in ("crashed", "failed")
    return count


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    after_crash(Path(sys.argv[1]), int(sys.argv[2]))
