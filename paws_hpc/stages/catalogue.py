"""All metrics: those in common, and those that objectives and stages declare."""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module

from paws_hpc.metrics import COMMON, Metric
from paws_hpc.objective.config import OBJECTIVES
from paws_hpc.stage_table import STAGES


@cache
def catalogue() -> dict[str, Metric]:
    """Every metric by name: the common ones, then the ``METRICS`` of objectives and of each stage's module.

    Raises:
        ValueError: two metrics have one name.
    """
    files = dict.fromkeys(stage.function.partition(":")[0] for stage in STAGES.values())
    names = [f"paws_hpc.objective.{name}" for name in OBJECTIVES]
    names += [file for file in files if file.startswith("paws_hpc.stages.")]
    declared = [*COMMON, *(metric for name in names for metric in getattr(import_module(name), "METRICS", []))]
    known: dict[str, Metric] = {}
    for metric in declared:
        if metric.name in known:
            raise ValueError(f"The metric {metric.name!r} is declared twice.")
        known[metric.name] = metric
    return known


def metric(name: str) -> Metric:
    """The metric of a name in ``metrics.jsonl``.

    Raises:
        KeyError: no metric has this name.
    """
    if name in catalogue():
        return catalogue()[name]
    for known in catalogue().values():
        if "*" in known.name and re.fullmatch(known.pattern, name):
            return known
    raise KeyError(f"{name!r} is not in the catalogue of metrics (paws_hpc/metrics.py).")
