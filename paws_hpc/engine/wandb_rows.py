"""Rows of ``metrics.jsonl`` as Weights & Biases is given them. It imports no torch and no wandb."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from paws_hpc.engine.tracking import Row
from paws_hpc.metrics import is_validation

_NAMED = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # that JSON has not, as MetricsFile writes them


def position(row: Row) -> int:
    """The step under which W&B holds a row of ``metrics.jsonl``: three per training step.

    A step has a row of its losses, at times one that tells an event, and at times one of a validation, in this order;
    what W&B has a later step of, it takes no more.
    """
    if any(map(is_validation, row)):
        return 3 * int(row["step"]) + 2
    return 3 * int(row["step"]) + ("event" in row)


def shown(row: Row) -> Row:
    """A row of ``metrics.jsonl`` as W&B is given it."""
    values = {name: _NAMED.get(value, value) if isinstance(value, str) else value for name, value in row.items()}
    axes = {"trainer/global_step": values.pop("step")}
    if "epoch" in values:
        axes["trainer/epoch"] = values.pop("epoch")
    return axes | values


def summary(rows: list[Row], best: Mapping[str, str]) -> Row:
    """What a run's summary says of its metrics: of the whole run, where W&B would know only this start.

    The last value of each metric, and of those in ``best`` (a regular expression of names → ``min`` or ``max``)
    ``{"last": …, "max": …, "mean": …}``.
    """
    kept: Row = {}
    columns: dict[str, list[Any]] = {}
    for row in map(shown, rows):
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    for name, values in columns.items():
        kept[name] = values[-1]
        finite = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
        which = next((which for names, which in best.items() if re.fullmatch(names, name)), None)
        if finite and which is not None:
            extreme = {"min": min, "max": max}[which](finite)
            kept[name] = {"last": values[-1], which: extreme, "mean": sum(finite) / len(finite)}
    return kept
