"""What a command does at the moment, for people: two lines that change on a terminal, a line now and then in a log.

Work may be part of other work, as packing is of a job; the innermost is shown.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

_LINE_INTERVAL_S = 10.0
_RATE_OVER_S, _RATE_OVER_MOMENTS = 30.0, 5  # the time left follows the rate of so long, or of so many if they are rare
_BAR = 20  # columns

_open: list[Progress] = []


class Progress:
    """A piece of work: what happens, how much is done, how long it has taken, and what is left.

    A context manager that shows it on standard error. If it ends well, one line stays of what has figures or took long.

    Attributes:
        figures: numbers beside it, the most important one first.
    """

    def __init__(
        self, title: str, activity: str = "", *, total: int = 0, done: int = 0, unit: str = "images", show: bool = True
    ) -> None:
        """Prepare to show work, and on a terminal what it is, of which ``total`` is 0 where nothing is counted."""
        self._title, self._activity, self._total, self._unit, self._show = title, activity, total, unit, show
        self.figures, self._done = "", done
        self._live: Live | None = None
        self._ascii = Console(stderr=True).options.ascii_only
        self._began = self._printed = time.monotonic()
        self._moments = deque[tuple[float, int]]()

    def doing(self, activity: str) -> None:
        """Show an activity until the count changes."""
        if self._show and activity != self._activity and not sys.stderr.isatty():
            self._say(activity)
        self._activity = activity

    def advance(self, count: int) -> None:
        """Add to the count of what is done."""
        self.reached(self._done + count)

    def reached(self, done: int) -> None:
        """Set the count of what is done."""
        now, self._done, self._activity = time.monotonic(), done, ""
        self._moments.append((now, done))
        while len(self._moments) > _RATE_OVER_MOMENTS and now - self._moments[0][0] > _RATE_OVER_S:
            self._moments.popleft()
        if self._show and not sys.stderr.isatty() and now - self._printed >= _LINE_INTERVAL_S:
            self._printed = now
            self._say(self._counted(), *self._times(), self.figures)

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
            if late := since > each and rest > 0:
                each = (now - first) / (pieces + 1)
            times.append(f"left {_clock(max(each * rest - since, since if late else 0.0))}")
        return times

    def _lines(self) -> Group:
        """What a terminal shows."""
        what = ": ".join(filter(None, [self._title, self._activity or self.figures]))
        done = round(_BAR * self._done / max(self._total, 1))
        full, empty = "#-" if self._ascii else "━╌"
        how_far = [full * done + empty * (_BAR - done) + " " + self._counted()] if self._total else []
        lines = (what, "  ".join([*how_far, *self._times()]))
        return Group(*[Text(line, no_wrap=True, overflow="ellipsis") for line in lines])

    def _say(self, *parts: str) -> None:
        print(f"{self._title}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        if self._show:
            _open.append(self)
            if len(_open) == 1 and sys.stderr.isatty():
                self._live = Live(get_renderable=_innermost, console=Console(stderr=True), transient=True)
                self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._show:
            if self._live is not None:
                self._live.stop()
            _open.remove(self)
            took = time.monotonic() - self._began
            if self._total and kind is None and (self.figures or took >= _LINE_INTERVAL_S):
                self._say(f"{self._counted()} in {_clock(took)}", self.figures)


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
