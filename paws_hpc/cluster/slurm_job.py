"""This job on Slurm, as one of its ranks sees it: requests to stop, and the way back into the queue."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from paws_hpc.cluster.requeue import own_job, queue_again
from paws_hpc.cluster.scheduler import SchedulerError
from paws_hpc.cluster.stops import StopRequests
from paws_hpc.stages.attempts import Lease

_LOG = logging.getLogger(__name__)
_PATIENCE = 0.8  # of the time between signal and end, before the job goes back without having saved


class SlurmJob:
    """The job to which this process belongs.

    Attributes:
        job_id: ``17`` or ``18_0``.
        restart: how often Slurm has started it before.
        lease: of rank 0, as soon as it holds it.
    """

    def __init__(self, chain: Path) -> None:
        """As the environment says that Slurm made; ``chain`` is the run's ``chain.json``."""
        self.job_id, self.restart = own_job()
        self.lease: Lease | None = None
        self._chain = chain
        self._stops: StopRequests | None = None

    @property
    def key(self) -> str:
        """Of this start."""
        return f"{self.job_id}-{self.restart}"

    def listen(self, *, notice_s: float, trains: bool) -> None:
        """Take requests to stop from now on.

        Args:
            notice_s: between Slurm's signal and the end of the job.
            trains: whether the stage looks at :meth:`requested`; any other has nothing to save, and goes back into
                the queue at once.
        """
        self._stops = StopRequests(patience_s=_PATIENCE * notice_s if trains else 0.0, overdue=self._overdue)
        self._stops.listen()

    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._stops is not None and self._stops.requested()

    def leave(self) -> None:
        """Say that the stage is over: whatever is asked from now on comes too late to matter."""
        if self._stops is not None:
            self._stops.answered()

    def give_back(self, *, step: int | None) -> None:
        """Put the job back into the queue, unless somebody ended it.

        A job that merely leaves while it is being preempted counts as failed, so it must ask to be queued itself.

        Args:
            step: training steps that are saved; None if it goes back from its last checkpoint.

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
