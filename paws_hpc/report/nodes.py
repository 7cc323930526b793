"""The figure of a run's GPUs, node by node, where the run had any."""

from __future__ import annotations

import re

import numpy as np
from markupsafe import Markup

from paws_hpc.report.panels import Panel
from paws_hpc.report.plots import Curve, Plot, draw
from paws_hpc.report.run_record import Metrics, RunRecord
from paws_hpc.report.tables import percent

_KEY = re.compile(r"gpu/node(\d+)/(?:utilisation|memory_gb)")
_MOST_NAMED = 4  # nodes with a colour each; of more, every one is a pale line
_CAPTION = (
    "Utilisation is the share of a moment in which a GPU worked, the mean over a node's GPUs; memory is that of the "
    "node's fullest GPU, in units of 10⁹ bytes. A node that stays below the others keeps them waiting."
)


def gpu_panels(record: RunRecord) -> list[Panel]:
    """Utilisation and memory of each node's GPUs against the step; nothing for a run on CPUs."""
    metrics = record.pretrain
    nodes = sorted({int(match[1]) for row in metrics.rows for key in row if (match := _KEY.fullmatch(key))})
    plots, facts = [], []
    for title, name, is_share in (("utilisation", "utilisation", True), ("memory (GB)", "memory_gb", False)):
        curves, means = _curves(metrics, nodes, name)
        if curves:
            plots.append(Plot(title, curves, percent=is_share, from_zero=True))
            facts.append(f"{title}: {_in_words(means, is_share=is_share)}")
    if not plots:
        return []
    count = f"{len(nodes)} node{'s' * (len(nodes) != 1)}"
    description = f"GPUs of {count} against step. {'; '.join(facts)}."
    svg = draw("gpus", plots, xlabel="step", description=description)
    return [Panel("gpus", "GPUs by node", f"{_CAPTION} On average, {'; '.join(facts)}.", Markup(svg))]


def _curves(metrics: Metrics, nodes: list[int], name: str) -> tuple[list[Curve], dict[int, float]]:
    """A curve per node that has values, and the mean of each."""
    curves, means = [], {}
    for number in nodes:
        x, y = metrics.series(f"gpu/node{number}/{name}")
        if len(x):
            named = len(nodes) <= _MOST_NAMED
            curves.append(Curve(f"node {number}" if named else "", x, y, number + 1 if named else 0))
            means[number] = float(np.mean(y))
    return curves, means


def _in_words(means: dict[int, float], *, is_share: bool) -> str:
    """The means over a run's steps, from the lowest node to the highest."""

    def shown(value: float) -> str:
        return percent(value) if is_share else f"{value:.1f}"

    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    if len(means) == 1:
        return shown(means[low])
    return f"from {shown(means[low])} (node {low}) to {shown(means[high])} (node {high})"
