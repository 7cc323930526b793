"""Ctrl-C and SIGTERM on this machine: the first asks training to save and stop, the second ends it at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Take signals in this block, which the main thread enters, and yield whether one has come.

    A signal that is ignored here, as a shell does for what it runs in the background, stays ignored.
    """
    asked = threading.Event()
    before = {number: handler for number in _SIGNALS if (handler := signal.getsignal(number)) is not signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        restore()
        asked.set()
        print("\nstopping after this step; once more to end at once, without saving", file=sys.stderr, flush=True)

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        restore()
