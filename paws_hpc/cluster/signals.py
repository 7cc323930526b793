"""Requests to stop: Slurm's signals to a rank, and Ctrl-C or SIGTERM on this machine; training looks between steps."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from paws_hpc.cluster.shield import SIGNALS
from paws_hpc.progress import doing

_LOG = logging.getLogger(__name__)


class StopRequests:
    """Slurm's signals, taken on a thread of their own, so that nothing runs in a signal handler.

    Slurm announces preemption with the job's own signal (SIGUSR2) or with SIGTERM, and the end of a job's time with
    SIGUSR2. ``shield.py`` blocked both before Python started, so they are pending from the first moment on.
    """

    def __init__(self, *, patience_s: float, overdue: Callable[[], None]) -> None:
        """Prepare; :meth:`listen` begins.

        ``overdue`` runs on the thread ``patience_s`` after the first signal, unless the job has reached a place where
        it can save.
        """
        self._patience_s, self._overdue = patience_s, overdue
        self._requested, self._answered = threading.Event(), threading.Event()

    def listen(self) -> None:
        """Take signals from now on, those that are pending included, until the process ends."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # also where nobody started this process through shield.py
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # comes with every other one; submitit would log it each time
        threading.Thread(target=self._wait, name="stop requests", daemon=True).start()

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._requested.is_set()

    def answered(self) -> None:
        """The job is stopping, or is done, so that nothing is overdue."""
        self._answered.set()

    def _wait(self) -> None:
        number = signal.sigwait(SIGNALS)
        _LOG.warning("%s: this job must stop.", signal.Signals(number).name)
        self._requested.set()
        if not self._answered.wait(self._patience_s):
            self._overdue()


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Take SIGINT and SIGTERM in this block, which the main thread enters, and yield whether one has come.

    The first one only makes training save and stop; the second one ends the process at once. A signal that is ignored
    here, as a shell does for what it runs in the background, stays ignored.
    """
    requested = threading.Event()
    both = (signal.SIGINT, signal.SIGTERM)
    before = {number: handler for number in both if (handler := signal.getsignal(number)) is not signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        restore()
        requested.set()
        doing("stopping after this step; once more ends it at once, without saving")

    for number in before:
        signal.signal(number, request)
    try:
        yield requested.is_set
    finally:
        restore()
