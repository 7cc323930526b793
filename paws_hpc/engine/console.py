"""The steps of a training, for people."""

from __future__ import annotations

import sys

from paws_hpc.engine.tracking import Row, Tracker
from paws_hpc.metrics import COMMON, is_validation
from paws_hpc.progress import Progress


class ProgressTracker(Tracker):
    """Shows a stage's steps, its validation score before other figures, and the time left."""

    def __init__(self, title: str, *, total_steps: int, start: int) -> None:
        """Show ``total_steps`` steps of which ``start`` are done."""
        self._title = title
        self._metrics = [each for each in COMMON if each.on_console]
        self._metrics.sort(key=lambda each: not is_validation(each.name))
        self._shown = dict.fromkeys((each.name for each in self._metrics), "")
        self._progress = Progress(title, total=total_steps, done=start, unit="steps").__enter__()
        self._progress.doing("first step")

    def reached(self, done: int) -> None:
        """Count steps."""
        self._progress.reached(done)

    def log(self, step: int, row: Row) -> None:
        """Show a row."""
        if message := row.get("message"):
            print(f"{self._title}: {message}", file=sys.stderr, flush=True)
        for each in self._metrics:  # one that a row lacks keeps its last value
            if each.name in row:
                self._shown[each.name] = f"{each.short} {each.show(row[each.name])}"
        self._progress.figures = ", ".join(filter(None, self._shown.values()))

    def close(self, error: BaseException | None) -> None:
        """End with a line, or take it away after an error."""
        self._progress.__exit__(None if error is None else type(error), error, None)
