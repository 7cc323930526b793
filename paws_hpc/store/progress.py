"""Progress of long loops: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_LINE_INTERVAL_S = 15.0


class Advance(Protocol):
    """Reports finished work."""

    def __call__(self, steps: int, /) -> None:
        """Count ``steps`` more images as done."""


@contextmanager
def progress(description: str, total: int, *, show: bool) -> Iterator[Advance]:
    """Show how many of ``total`` images are done, on standard error.

    Args:
        description: what is being done, for the eye.
        total: number of images.
        show: False reports nothing, for callers that are not commands.
    """
    if not show:
        yield lambda steps, /: None
    elif sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(description, total=total)
            yield lambda steps, /: bar.advance(task, steps)
    else:
        yield _Lines(description, total)


class _RateColumn(ProgressColumn):
    """Images per second, lately."""

    def render(self, task: Task) -> Text:
        """The rate, where it is known."""
        return Text("" if task.speed is None else f"{task.speed:,.0f}/s")


class _Lines:
    """Prints a line at most every 15 seconds."""

    def __init__(self, description: str, total: int) -> None:
        self.description, self.total, self.done = description, total, 0
        self.started = self.printed = time.monotonic()

    def __call__(self, steps: int, /) -> None:
        self.done += steps
        now = time.monotonic()
        if now - self.printed >= _LINE_INTERVAL_S:
            self.printed = now
            rate = self.done / (now - self.started)
            left = f", {(self.total - self.done) / rate:,.0f} s left" if self.done else ""
            print(
                f"{self.description}: {self.done:,} of {self.total:,} images, {rate:,.0f}/s{left}",
                file=sys.stderr,
                flush=True,
            )
