"""The curves of pre-training of several runs: each run as a thin line, the mean of a setting's runs as a strong one."""

from __future__ import annotations

from markupsafe import Markup

from paws_hpc.metrics import COMMON, Metric
from paws_hpc.report.comparison import Comparison
from paws_hpc.report.panels import Panel, drawn_metrics, levels_of, mean_curve, slug
from paws_hpc.report.plots import Curve, Plot, draw


def curve_panels(comparison: Comparison) -> list[Panel]:
    """A figure for each metric that has a panel and values, and for the common ones in any case."""
    panels = [_curves(comparison, metric) for metric in drawn_metrics() if "*" not in metric.name]
    return [panel for panel in panels if panel is not None]


def _curves(comparison: Comparison, metric: Metric) -> Panel | None:
    """A metric in all runs against the epoch."""
    name, faint, strong, facts = slug(metric.title), [], [], []
    for series, row in enumerate(comparison.rows, start=1):
        points = [run.record.pretrain.series(metric.name, axis="epoch") for run in row.runs]
        points = [(x, y) for x, y in points if len(x)]
        if not points:
            continue
        x, y = mean_curve(points)
        if len(points) > 1:
            faint += [Curve("", *run, series, faint=True) for run in points]
        if len(x):
            strong.append(Curve("", x, y, series))
            facts.append(f"{row.label} ends at {metric.show(y[-1])} at epoch {x[-1]:,.6g}")
    if not faint and not strong:
        missing = f"No run has values of {metric.name}."
        return Panel(name, metric.title, "", missing=missing) if metric in COMMON else None
    levels = {level for run in comparison.runs for level in levels_of(run.record, [metric])}
    plot = Plot(
        "", faint + strong, metric.unit == "fraction", metric.log_scale, metric.from_zero and not metric.log_scale,
        levels=sorted(levels),
    )  # fmt: skip
    description = f"{metric.title} of each setting against epoch: {'; '.join(facts)}."
    svg = draw(f"compare-{name}", [plot], xlabel="epoch", description=description)
    return Panel(name, metric.title, metric.description, Markup(svg))
