"""What a job leaves in its run directory: how far it came, how fast it goes, and what it said last.

It is read while the job writes: a file may be absent, or end in half a line. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paws_hpc.files import read_json

_TAIL_BYTES = 1 << 20  # of a metrics file; holds some tens of epochs
_LOG_BYTES = 1 << 16
_VALIDATION = ("val/paws_nn_top1", "val/top1")


@dataclass(frozen=True)
class JobProgress:
    """How far a training job came. None is not in its files (yet).

    Attributes:
        step: training steps done, saved or not.
        saved_step: of the newest checkpoint; 0 without one.
        epoch: passes over the data done, with fractions; ``epochs`` and ``total_steps`` are those of the whole job.
        images_per_s: over all ranks, in the last stretch that was logged.
        validation_accuracy: in [0, 1]; the last one, or of a finished trial the best.
        save_s: seconds that writing the newest checkpoint took.
        step_s: seconds of a step, from the rate.
        changed: when the metrics grew last, as a POSIX time.
    """

    step: int = 0
    saved_step: int = 0
    total_steps: int | None = None
    epoch: float | None = None
    epochs: int | None = None
    images_per_s: float | None = None
    validation_accuracy: float | None = None
    save_s: float | None = None
    step_s: float | None = None
    changed: float | None = None

    @property
    def seconds_left(self) -> float | None:
        """At the last rate, without the time that validation and saving take."""
        if self.total_steps is None or self.step_s is None:
            return None
        return max(self.total_steps - self.step, 0) * self.step_s


def read_progress(folder: Path, *, epochs: int | None = None, batch_size: int | None = None) -> JobProgress:
    """How far the job came that writes to ``folder`` (``pretrain``, or a trial of a sweep).

    Args:
        folder: with ``metrics.jsonl``, ``checkpoints/`` and, when it is done, ``DONE``.
        epochs: of the whole job.
        batch_size: images per step, over all ranks. A trial with fewer labels has a single step per epoch.
    """
    metrics = folder / "metrics.jsonl"
    rows = []
    for line in _tail(metrics, _TAIL_BYTES):
        with suppress(ValueError):  # the line being written, or one torn by a kill: training drops it when it resumes
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    saved_step, save_s = _newest_save(folder / "checkpoints")
    step = max(max((row["step"] + 1 for row in rows), default=0), saved_step)
    epoch = _last(rows, "epoch")
    total: int | None = _mapping(folder / "DONE").get("steps")
    placed = next((row for row in reversed(rows) if row.get("epoch")), None)
    if total is None and epochs is not None and placed is not None:
        total = round(epochs * (placed["step"] + 1) / placed["epoch"])
    rate = _last(rows, "train/images_per_s")
    best = _mapping(folder / "result.json").get("validation_accuracy")
    return JobProgress(
        step=step if total is None else min(step, total),
        saved_step=saved_step,
        total_steps=total,
        epoch=epoch,
        epochs=epochs,
        images_per_s=rate,
        validation_accuracy=_last(rows, *_VALIDATION) if best is None else best,
        save_s=save_s,
        step_s=batch_size / rate if batch_size and rate and (placed is None or step > placed["epoch"]) else None,
        changed=metrics.stat().st_mtime if metrics.exists() else None,
    )


def last_lines(path: Path, count: int) -> list[str]:
    """The last ``count`` lines of a log that are not blank."""
    return [line.rstrip() for line in _tail(path, _LOG_BYTES) if line.strip()][-count:]


def _tail(path: Path, size: int) -> list[str]:
    """The lines in the last ``size`` bytes, without the cut one with which they may begin."""
    try:
        with open(path, "rb") as file:
            cut = max(file.seek(0, os.SEEK_END) - size, 0)
            file.seek(cut)
            lines = file.read().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    return lines[1:] if cut else lines


def _newest_save(checkpoints: Path) -> tuple[int, float | None]:
    """Step of the newest checkpoint and the seconds that writing it took; (0, None) without one."""
    for path in sorted(checkpoints.glob("step-*.json"), reverse=True):
        step, record = path.stem.removeprefix("step-"), _mapping(path)
        if step.isdigit() and record:  # it may have been removed for a newer one since
            return int(step), record.get("seconds")
    return 0, None


def _last(rows: list[dict[str, Any]], *names: str) -> float | None:
    for row in reversed(rows):
        for name in names:
            if isinstance(row.get(name), int | float):
                return float(row[name])
    return None


def _mapping(path: Path) -> Mapping[str, Any]:
    """The JSON object in ``path``; empty if there is none."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
