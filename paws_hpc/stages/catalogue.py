"""All metrics: those in common, and those that objectives declare."""

from __future__ import annotations

import re
from functools import cache

from paws_hpc.metrics import COMMON, Metric
from paws_hpc.objective.config import OBJECTIVES


@cache
def catalogue() -> dict[str, Metric]:
    """Every metric by name: the common ones, then the ``METRICS`` of objectives. Loads no torch.

    Raises:
        ValueError: two metrics have one name.
    """
    declared = [*COMMON, *(metric for config in OBJECTIVES.values() for metric in config.METRICS)]
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
