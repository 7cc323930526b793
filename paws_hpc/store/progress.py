"""Progress of long loops: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

_LINE_INTERVAL_S = 15.0

Advance = Callable[[int], None]
"""Counts so many more images as done."""


@contextmanager
def progress(description: str, total: int, *, show: bool) -> Iterator[Advance]:
    """Show how many of ``total`` images are done, on standard error; nothing unless ``show``."""
    if not show:
        yield lambda images: None
    elif sys.stderr.isatty():
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn())
        with Progress("{task.description}", *columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(description, total=total)
            yield lambda images: bar.advance(task, images)
    else:
        yield _lines(description, total)


def _lines(description: str, total: int) -> Advance:
    """Prints a line at most every 15 seconds."""
    done, started = 0, time.monotonic()
    printed = started

    def advance(images: int) -> None:
        nonlocal done, printed
        done += images
        now = time.monotonic()
        if now - printed >= _LINE_INTERVAL_S:
            printed = now
            rate = done / (now - started)
            left = f", {(total - done) / rate:,.0f} s left" if done else ""
            print(f"{description}: {done:,} of {total:,} images, {rate:,.0f}/s{left}", file=sys.stderr, flush=True)

    return advance
