"""All metrics: those in common, and those that objectives and stages declare."""

from __future__ import annotations

import re
from functools import cache

from paws_hpc.metrics import COMMON, Metric
from paws_hpc.objective import diagnostics, paws


@cache
def catalogue() -> dict[str, Metric]:
    """Every metric by name.

    Raises:
        ValueError: two metrics have one name.
    """
    from paws_hpc.stages import selection  # noqa: PLC0415 - stages use trackers, which use this module

    metrics = [*paws.METRICS, *diagnostics.METRICS, *selection.METRICS]
    found = {metric.name: metric for metric in COMMON}
    for metric in metrics:
        if metric.name in found:
            raise ValueError(f"The metric {metric.name!r} is declared twice.")
        found[metric.name] = metric
    return found


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
