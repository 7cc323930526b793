"""This job on Slurm, as its own ranks see it: requests to stop, and the way back into the queue."""

from __future__ import annotations

import logging
import os
import time

from paws_hpc.cluster import scheduler
from paws_hpc.cluster.own_job import own_job
from paws_hpc.cluster.scheduler import SchedulerError, SchedulerUnreachableError
from paws_hpc.cluster.stops import StopRequests
from paws_hpc.stages.attempts import Lease

_LOG = logging.getLogger(__name__)
_PATIENCE = 0.8  # of the time between signal and end, before the job goes back without having saved
_ASK_AGAIN_S = 2.0


class SlurmJob:
    """The job to which this process belongs."""

    def __init__(self, job_id: str, restart: int) -> None:
        """Of the id ``17`` or ``18_0``, started by Slurm for the ``restart``-th time after the first."""
        self.job_id, self.restart = job_id, restart
        self.lease: Lease | None = None  # rank 0 holds it
        self._stops: StopRequests | None = None

    @classmethod
    def this_process(cls) -> SlurmJob:
        """As the environment says that Slurm made."""
        return cls(*own_job())

    def listen(self, *, notice_s: float, has_steps: bool) -> None:
        """Take requests to stop from now on.

        Args:
            notice_s: between Slurm's signal and the end of the job.
            has_steps: whether the stage looks at :meth:`requested`; one that does not has nothing to save, and goes
                back into the queue at once.
        """
        self._stops = StopRequests(patience_s=_PATIENCE * notice_s if has_steps else 0.0, overdue=self._overdue)
        self._stops.listen()

    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._stops is not None and self._stops.requested()

    def leave(self) -> None:
        """Say that the stage is over: whatever is asked from now on comes too late to matter."""
        if self._stops is not None:
            self._stops.answered()

    def give_back(self, *, step: int | None) -> None:
        """Put the job back into the queue, from rank 0, unless it was cancelled.

        A job that merely leaves while it is being preempted counts as failed, so it must ask to be queued itself.

        Args:
            step: training steps that are saved; None if it goes back from its last checkpoint.

        Raises:
            SchedulerError: Slurm refuses to queue it again.
        """
        runs, told = self._ask_slurm()
        if not runs:
            _LOG.warning("Slurm says that job %s is %s, so it is not queued again.", self.job_id, told)
            self._record("cancelled", step, f"Slurm said: {told}.")
            return
        self._record("requeued", step, None)
        scheduler.requeue(self.job_id)
        _LOG.warning("Job %s is queued again and continues from %s.", self.job_id, _place(step))

    def _ask_slurm(self) -> tuple[bool, str]:
        """Ask until Slurm answers: there is nothing better to do with the time that is left."""
        while True:
            try:
                return scheduler.runs_since(self.job_id, self.restart)
            except SchedulerUnreachableError as error:
                _LOG.warning("%s Asking again.", error)
                time.sleep(_ASK_AGAIN_S)

    def _record(self, how: str, step: int | None, message: str | None) -> None:
        if self.lease is not None:
            self.lease.end(how, step=step, message=message)

    def _overdue(self) -> None:
        """Runs on the thread that took the signal, while the main thread is busy with what cannot be interrupted."""
        try:
            self.give_back(step=None)
        except SchedulerError as error:  # another rank was faster, or Slurm itself ends the job
            _LOG.warning("%s", error)
        logging.shutdown()
        os._exit(0)  # files are whole or absent at any moment, and nothing else is left to tidy up


def _place(step: int | None) -> str:
    return "its last checkpoint" if step is None else f"step {step}"
