"""Requests to stop: Slurm's signals, taken on a thread of their own.

Slurm announces preemption with the job's own signal (SIGUSR2) or with SIGTERM, and the end of a job's time with
SIGUSR2. ``shield.py`` blocked both before Python started, so they wait here from the first moment on. Nothing runs in a
signal handler: the thread sets a flag, and training looks at it between steps.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable

from paws_hpc.cluster.shield import SIGNALS

_LOG = logging.getLogger(__name__)


class StopRequests:
    """Whether this process was asked to stop."""

    def __init__(self, *, patience_s: float, overdue: Callable[[], None]) -> None:
        """Prepare; :meth:`listen` begins.

        Args:
            patience_s: how long after the first signal the job may go on to reach a place where it can save.
            overdue: what to do when that time is over; runs on the thread.
        """
        self._patience_s, self._overdue = patience_s, overdue
        self._asked, self._answered = threading.Event(), threading.Event()

    def listen(self) -> StopRequests:
        """Take signals from now on, those that are pending included, until the process ends."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # also where nobody started this process through shield.py
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # comes with every other one; submitit would log it each time
        threading.Thread(target=self._wait, name="stop requests", daemon=True).start()
        return self

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._asked.is_set()

    def answered(self) -> None:
        """Say that the job is stopping, or is done, so that nothing is overdue."""
        self._answered.set()

    def _wait(self) -> None:
        number = signal.sigwait(SIGNALS)
        _LOG.warning("%s: asked to stop.", signal.Signals(number).name)
        self._asked.set()
        if not self._answered.wait(self._patience_s):
            self._overdue()
