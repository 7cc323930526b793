"""Progress for people: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from paws_hpc.engine.tracking import Row, Tracker
from paws_hpc.metrics import COMMON

_LINE_EVERY_S = 10.0


class ProgressTracker(Tracker):
    """Shows a stage's steps, rate, data wait and time left."""

    def __init__(self, title: str, *, total_steps: int, start: int) -> None:
        """Prepare to show ``total_steps`` steps of which ``start`` are done."""
        self._title, self._total, self._start = title, total_steps, start
        self._began = self._printed = time.monotonic()
        self._shown: dict[str, str] = {}
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=12),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                # On a narrow terminal this one gives way, not the counts and times.
                TextColumn("{task.fields[shown]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
                console=Console(stderr=True),
                expand=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(title, total=total_steps, completed=start, shown="")

    def log(self, step: int, row: Row) -> None:
        """Show a row."""
        if message := row.get("message"):
            self._say(f"{self._title}: {message}")
        for metric in COMMON:  # one that a row lacks keeps its last value
            if metric.on_console and metric.name in row:
                self._shown[metric.label] = metric.show(row[metric.name])
        shown = "  ".join(f"{label} {value}" for label, value in self._shown.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step + 1, shown=shown)
        elif time.monotonic() - self._printed >= _LINE_EVERY_S or step + 1 == self._total:
            self._printed = time.monotonic()
            self._say(f"{self._title}: step {step + 1}/{self._total}  {shown}  left {self._left(step + 1)}")

    def _left(self, done: int) -> str:
        seconds = (time.monotonic() - self._began) / max(done - self._start, 1) * (self._total - done)
        return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self, error: BaseException | None) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
