"""What a command does at the moment, for people: two lines that change on a terminal, a line now and then in a log.

Work may be part of other work, as packing is of a job; the innermost is shown.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

_LINE_INTERVAL_S = 10.0
_RATE_OVER_S = 30.0  # the time left follows the rate of so many seconds,
_RATE_OVER_MOMENTS = 5  # or of so many moments if they are further apart
_BAR = 20  # columns

_open: list[Progress] = []


class Progress:
    """A piece of work: what happens, how much is done, how long it has taken, and what is left.

    A context manager. What it shows goes to standard error; it ends with one line if it counts something and ends well.
    """

    def __init__(
        self,
        title: str,
        *,
        activity: str = "",
        total: int = 0,
        done: int = 0,
        unit: str = "images",
        show: bool = True,
    ) -> None:
        """Prepare.

        Args:
            title: of the work, before everything that is said of it.
            activity: what it begins with, or what it is in general; on a terminal only.
            total: of ``unit``; 0 where nothing is counted.
            done: before it begins.
            unit: in the plural.
            show: whether anything is shown.
        """
        self._title, self._total, self._done, self._unit, self._show = title, total, done, unit, show
        self._activity, self._figures = activity, ""
        self._began = self._printed = time.monotonic()
        self._moments = deque[tuple[float, int]]()
        self._live: Live | None = None

    def doing(self, activity: str) -> None:
        """Something begins that lasts until more is done."""
        if self._show and activity != self._activity and not sys.stderr.isatty():
            self._say(activity)
        self._activity = activity

    def advance(self, count: int) -> None:
        """So much more is done."""
        self.reached(self._done + count)

    def reached(self, done: int) -> None:
        """So much is done."""
        now, self._done, self._activity = time.monotonic(), done, ""
        self._moments.append((now, done))
        while len(self._moments) > _RATE_OVER_MOMENTS and now - self._moments[0][0] > _RATE_OVER_S:
            self._moments.popleft()
        if self._show and not sys.stderr.isatty() and now - self._printed >= _LINE_INTERVAL_S:
            self._printed = now
            self._say(", ".join(filter(None, [self._counted(), *self._times(), self._figures])))

    def figures(self, text: str) -> None:
        """Show numbers beside it, the most important one first."""
        self._figures = text

    def _counted(self) -> str:
        return f"{self._done:,} of {self._total:,} {self._unit}"

    def _times(self) -> list[str]:
        """Elapsed and, once there is a rate, left."""
        now = time.monotonic()
        times = [f"elapsed {_clock(now - self._began)}"]
        if len(self._moments) > 1:
            (first, before), (last, _) = self._moments[0], self._moments[-1]
            pieces, rest, since = self._done - before, self._total - self._done, now - last
            each = (last - first) / max(pieces, 1)
            late = since > each and rest > 0
            if late:
                each = (now - first) / (pieces + 1)
            times.append(f"left {_clock(max(each * rest - since, since if late else 0.0))}")
        return times

    def _lines(self) -> Group:
        """What a terminal shows."""
        what = ": ".join(filter(None, [self._title, self._activity or self._figures]))
        done = round(_BAR * self._done / max(self._total, 1))
        how_far = ["━" * done + "╌" * (_BAR - done) + " " + self._counted()] if self._total else []
        lines = (what, "  ".join([*how_far, *self._times()]))
        return Group(*[Text(line, no_wrap=True, overflow="ellipsis") for line in lines])

    def _say(self, text: str) -> None:
        print(f"{self._title}: {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        if self._show:
            _open.append(self)
            if len(_open) == 1 and sys.stderr.isatty():
                self._live = Live(get_renderable=_innermost, console=Console(stderr=True), transient=True)
                self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._show:
            if self._live is not None:
                self._live.stop()
            _open.remove(self)
            if self._total and kind is None:
                took = f"{self._counted()} in {_clock(time.monotonic() - self._began)}"
                self._say(", ".join(filter(None, [took, self._figures])))


def _innermost() -> Group:
    return _open[-1]._lines()


def doing(activity: str) -> None:
    """:meth:`Progress.doing` of the innermost work that is shown; nothing where none is, as on ranks other than 0."""
    if _open:
        _open[-1].doing(activity)


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds, or days."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if seconds < 86400 else f"{seconds / 86400:.1f} days"
