"""Where numbers go: ``metrics.jsonl`` always; paws_hpc.engine.wandb_run shows that file in Weights & Biases."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from paws_hpc.files import atomic_write
from paws_hpc.metrics import is_validation

Row = dict[str, Any]


class Tracker:
    """Takes rows of metrics and events of one stage, as a context manager. This one drops them, for other ranks."""

    def log(self, step: int, row: Row) -> None:
        """Record ``row`` at a 0-based step."""

    def sync(self) -> None:
        """Make what was recorded survive a power cut; called before a checkpoint, after which no row is made again."""

    def reached(self, done: int) -> None:
        """So many steps are done; called after each."""

    def close(self, error: BaseException | None) -> None:
        """End; ``error`` is what ended the stage, None if it ended well."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)


class MetricsFile(Tracker):
    """``metrics.jsonl``: one JSON object per line, flushed line by line.

    Opening it for a run that resumes drops the rows past the checkpoint, which training is about to write again, and a
    line torn by a kill; the curve stays unbroken.
    """

    def __init__(self, path: Path, *, resume_step: int, awaits_validation: bool = False) -> None:
        """Keep the rows before ``resume_step`` (0-based), the steps of the checkpoint, and append from there.

        ``awaits_validation``: the checkpoint is from before the validation that follows its last step. A row of that
        validation, whose names begin with ``val/``, is dropped too: it is about to be written again.
        """
        kept = [row for row in read_rows(path) if row["step"] < resume_step] if path.exists() else []
        if awaits_validation:
            kept = [row for row in kept if row["step"] < resume_step - 1 or not any(map(is_validation, row))]
        with atomic_write(path) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in kept)
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed by close()

    def log(self, step: int, row: Row) -> None:
        """Append one row; values that JSON cannot hold (NaN, infinity) are written as their names."""
        plain = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._file.write(json.dumps({"step": step, **plain}) + "\n")

    def sync(self) -> None:
        """Flush the file to disk."""
        os.fsync(self._file.fileno())

    def close(self, error: BaseException | None) -> None:
        """Close the file."""
        self._file.close()


def read_rows(path: Path) -> list[Row]:
    """:func:`parse_rows` without saying whether the last line was torn; a row without a step is a ValueError."""
    rows = parse_rows(path)[0]
    for number, row in enumerate(rows, 1):
        if type(row.get("step")) is not int:
            raise ValueError(f"{path}, line {number} has no step: {row}. Restore the file or remove it.")
    return rows


def parse_rows(path: Path) -> tuple[list[Row], bool]:
    """The rows of a ``metrics.jsonl``, the first of line 1, and whether a last line torn by a kill was left out.

    Raises:
        ValueError: any other line is not a JSON object; file and line are named.
    """
    rows: list[Row] = []
    lines = path.read_bytes().split(b"\n")  # a whole line ends in a newline, so only a torn one is last here
    for number, line in enumerate(lines, 1):
        last = number == len(lines)
        if last and not line:
            break
        remedy = "Only the last line may be torn. Restore the file or remove it."
        try:
            row = json.loads(line)
        except ValueError as error:
            if last:
                return rows, True
            raise ValueError(f"{path}, line {number} is not JSON ({error}). {remedy}") from error
        if not isinstance(row, dict):
            if last:
                return rows, True
            raise ValueError(f"{path}, line {number} is not a JSON object but {line.decode()}. {remedy}")
        rows.append(row)
    return rows, False


class Trackers(Tracker):
    """Several trackers as one."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def log(self, step: int, row: Row) -> None:
        """Record ``row`` with each."""
        for tracker in self._trackers:
            tracker.log(step, row)

    def reached(self, done: int) -> None:
        """Tell each."""
        for tracker in self._trackers:
            tracker.reached(done)

    def sync(self) -> None:
        """Sync each."""
        for tracker in self._trackers:
            tracker.sync()

    def close(self, error: BaseException | None) -> None:
        """Close each."""
        for tracker in self._trackers:
            tracker.close(error)
