"""The curves of pre-training in a run's report, one figure for each panel of the catalogue of metrics."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from paws_hpc.engine.config import SupportConfig
from paws_hpc.metrics import COMMON, Metric
from paws_hpc.report.plots import Curve, Plot, draw
from paws_hpc.report.run_record import RunRecord
from paws_hpc.stages.catalogue import catalogue

_MOST_NAMED = 4  # nodes with a colour each; if there are more, every one is a pale line


@dataclass(frozen=True)
class Panel:
    """One figure of the page: a drawing, or (``svg`` is None) the reason why there is none."""

    name: str
    title: str
    caption: str
    svg: Markup | None = None
    missing: str = ""


def slug(title: str) -> str:
    """A title as a name in HTML."""
    return re.sub(r"\W+", "-", title.lower())


def drawn_metrics() -> list[Metric]:
    """The metrics that have a panel, in the order of the catalogue."""
    return [metric for metric in catalogue().values() if metric.panel is not None]


def pretrain_panels(record: RunRecord) -> list[Panel]:
    """The figures of pre-training. One of common metrics says so if it has no values; any other is left out then."""
    panels: dict[str, list[Metric]] = {}
    for metric in drawn_metrics():
        panels.setdefault(str(metric.panel), []).append(metric)
    return [panel for title, metrics in panels.items() if (panel := _panel(record, title, metrics)) is not None]


def _panel(record: RunRecord, title: str, metrics: Sequence[Metric]) -> Panel | None:
    axis = metrics[0].axis
    curves = {metric: found for metric in metrics if (found := _curves(record, metric, axis))}
    expected = [metric for metric in metrics if metric in COMMON and "*" not in metric.name]
    if not curves:
        missing = missing_text(record, [metric.name for metric in expected], "pretrain")
        return Panel(slug(title), title, "", missing=missing) if expected else None
    facts = [_in_words(metric, found, axis) for metric, found in curves.items()]
    sentences = [metric.description for metric in curves if metric.description]
    if levels := [f"{metric.short} = {_level(metric)}" for metric in curves if metric.when_uniform]:
        sentences.append(f"A collapsed run stays at {' and '.join(levels)}.")
    if len(curves) == 1 or any("*" in metric.name for metric in curves):
        text = "; ".join(facts)
        sentences.append(f"{text[0].upper()}{text[1:]}.")
    if absent := [metric.name for metric in expected if metric not in curves]:
        sentences.append(f"Not logged: {', '.join(absent)}.")
    description = f"{title} against {axis}: {'; '.join(facts)}."
    svg = draw(slug(title), _plots(record, curves), xlabel=axis, description=description)
    return Panel(slug(title), title, " ".join(sentences), Markup(svg))


def _curves(record: RunRecord, metric: Metric, axis: str) -> list[Curve]:
    """A metric's curve, or one for each node; none without values."""
    if "*" not in metric.name:
        x, y = record.pretrain.series(metric.name, axis=axis)
        return [Curve(metric.short, x, y)] if len(x) else []
    keys = {key for row in record.pretrain.rows for key in row if re.fullmatch(metric.pattern, key)}
    nodes = sorted((int(re.findall(r"\d+", key)[0]), key) for key in keys)
    few = len(nodes) <= _MOST_NAMED
    return [
        Curve(f"node {node}" if few else "", *record.pretrain.series(key, axis=axis), series=node + 1 if few else 0)
        for node, key in nodes
    ]


def _plots(record: RunRecord, curves: dict[Metric, list[Curve]]) -> list[Plot]:
    """One pair of axes for each unit."""
    groups: dict[object, list[Metric]] = {}
    for metric in curves:
        groups.setdefault((metric.unit, metric.log_scale), []).append(metric)
    plots = []
    for metrics in groups.values():
        drawn = [curve for metric in metrics for curve in curves[metric]]
        if not any("*" in metric.name for metric in metrics):
            drawn = [Curve(curve.label, curve.x, curve.y, series) for series, curve in enumerate(drawn, start=1)]
        levels = levels_of(record, metrics)
        plots.append(Plot(
            "" if len(groups) == 1 else " and ".join(metric.short for metric in metrics),
            drawn,
            percent=metrics[0].unit == "fraction",
            log=metrics[0].log_scale,
            from_zero=not metrics[0].log_scale and all(metric.from_zero for metric in metrics),
            levels=levels,
            alarms=[(event.step, event.name) for event in record.pretrain.events] if levels else [],
        ))  # fmt: skip
    return plots


def levels_of(record: RunRecord, metrics: Iterable[Metric]) -> list[tuple[float, str]]:
    """The values that metrics have while predictions are uniform, and what to call them."""
    log_k = float(np.log(record.settings.get("pretrain.support.classes", SupportConfig.classes)))
    return sorted({(log_k * metric.when_uniform, _level(metric)) for metric in metrics if metric.when_uniform})


def _level(metric: Metric) -> str:
    return {1: "log K", -1: "-log K"}.get(metric.when_uniform or 0, f"{metric.when_uniform} log K")


def _in_words(metric: Metric, curves: Sequence[Curve], axis: str) -> str:
    """A metric's curves for those who do not see them."""
    if "*" in metric.name:
        means = {node: float(np.mean(curve.y)) for node, curve in enumerate(curves)}
        low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        text = metric.show(means[low])
        if len(means) > 1:
            text = f"from {text} (node {low}) to {metric.show(means[high])} (node {high})"
        return f"{metric.short} on average: {text}"
    x, y = curves[0].x, curves[0].y
    if not np.isfinite(y).all():
        return f"{metric.short} has values that are not finite, first at {axis} {x[~np.isfinite(y)][0]:,.6g}"
    return (
        f"{metric.short} goes from {metric.show(y[0])} to {metric.show(y[-1])} at {axis} {x[-1]:,.6g} (lowest "
        f"{metric.show(y.min())}, highest {metric.show(y.max())})"
    )


def mean_curve(
    points: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean of curves where all of them have a point, so that it never jumps because one ends."""
    common = points[0][0]
    for x, _ in points[1:]:
        common = np.intersect1d(common, x)
    return common, np.mean([y[np.isin(x, common)] for x, y in points], axis=0)


def missing_text(record: RunRecord, keys: Sequence[str], stage: str) -> str:
    """What a panel without data shows: what is missing, where it would be, and who writes it."""
    where = "pretrain/metrics.jsonl" if stage == "pretrain" else f"{stage}/*/metrics.jsonl"
    state = record.state(stage)
    return f"No values of {', '.join(keys)} in {where}. Stage {stage} writes them; its state is: {state}."
