"""The curves of pre-training of several runs: each run as a thin line, the mean of a setting's runs as a strong one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from paws_hpc.report.comparison import Comparison
from paws_hpc.report.figures import SingleCurve, compared_curves
from paws_hpc.report.panels import Panel, level_of, line_values
from paws_hpc.report.plots import Curve, Plot, draw
from paws_hpc.report.tables import percent


def curve_panels(comparison: Comparison) -> list[Panel]:
    """A figure for each value that is compared."""
    singles = compared_curves([run.record for run in comparison.runs])
    return [_curves(comparison, single) for single in singles]


def _curves(comparison: Comparison, single: SingleCurve) -> Panel:
    """One curve of all runs against the epoch: runs as thin lines, their mean as a strong one."""
    faint, strong, told, levels = [], [], [], []
    for series, row in enumerate(comparison.rows, start=1):
        points = [line_values(run.record, single.line, "epoch") for run in row.runs]
        points = [(x, y) for x, y in points if len(x)]
        if not points:
            continue
        x, y = _mean_curve(points)
        if len(points) > 1:
            faint += [Curve("", *run, series, faint=True) for run in points]
        if len(x):
            strong.append(Curve("", x, y, series))
            told.append(f"{row.label} ends at {_value(single, y[-1])} at epoch {x[-1]:,.6g}")
        levels += [level for run in row.runs for level in level_of(run.record, single.axes)]
    if not faint and not strong:
        missing = f"No run has values of {single.line.key}. {single.hint}".strip()
        return Panel(single.name, single.title, "", missing=missing)
    axes = single.axes
    plot = Plot("", faint + strong, axes.percent, axes.log, axes.from_zero, levels=sorted(set(levels)))
    description = f"{single.title} of each setting against epoch: {'; '.join(told)}."
    svg = draw(f"compare-{single.name}", [plot], xlabel="epoch", description=description)
    return Panel(single.name, single.title, single.caption, Markup(svg))


def _value(single: SingleCurve, value: float) -> str:
    return percent(value) if single.axes.percent else f"{value:.4g}"


def _mean_curve(
    points: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean of curves where all of them have a point, so that it never jumps because one ends."""
    common = points[0][0]
    for x, _ in points[1:]:
        common = np.intersect1d(common, x)
    return common, np.mean([y[np.isin(x, common)] for x, y in points], axis=0)
