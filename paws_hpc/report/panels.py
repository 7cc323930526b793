"""The figures of reports: curves of pre-training, by the catalogue of metrics, and sweeps."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from paws_hpc.engine.config import SupportConfig
from paws_hpc.exhibits import Exhibit
from paws_hpc.metrics import COMMON, Metric, percent
from paws_hpc.report.comparison import Comparison
from paws_hpc.report.plots import Curve, Plot, draw
from paws_hpc.report.run_record import RunRecord
from paws_hpc.stages.catalogue import catalogue

SWEEP_TITLES = {"finetune": "Fine-tuning", "baseline": "Baseline"}
"""Stage → title of its sweep."""

_MOST_NAMED = 4  # nodes with a colour each; if there are more, every one is a pale line


@dataclass(frozen=True)
class Panel:
    """One figure of the page: a drawing, or (``svg`` is None) the reason why there is none."""

    name: str
    title: str
    caption: str = ""
    svg: Markup | None = None
    missing: str = ""


def _slug(title: str) -> str:
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
    curves = {metric: drawn for metric in metrics if (drawn := _curves(record, metric, axis))}
    expected = [metric for metric in metrics if metric in COMMON and "*" not in metric.name]
    if not curves:
        missing = _missing_text(record, [metric.name for metric in expected], "pretrain")
        return Panel(_slug(title), title, missing=missing) if expected else None
    facts = [_in_words(metric, drawn, axis) for metric, drawn in curves.items()]
    sentences = [metric.description for metric in curves if metric.description]
    if levels := [f"{metric.short} = {_level(metric)}" for metric in curves if metric.when_uniform]:
        sentences.append(f"A collapsed run stays at {' and '.join(levels)}.")
    if len(curves) == 1 or any("*" in metric.name for metric in curves):
        text = "; ".join(facts)
        sentences.append(f"{text[0].upper()}{text[1:]}.")
    if absent := [metric.name for metric in expected if metric not in curves]:
        sentences.append(f"Not logged: {', '.join(absent)}.")
    description = f"{title} against {axis}: {'; '.join(facts)}."
    svg = draw(_slug(title), _plots(record, curves), xlabel=axis, description=description)
    return Panel(_slug(title), title, " ".join(sentences), svg)


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
        levels = _levels(record, metrics)
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


def _levels(record: RunRecord, metrics: Sequence[Metric]) -> list[tuple[float, str]]:
    """The values that metrics have while predictions are uniform, and their labels."""
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


def _missing_text(record: RunRecord, keys: Sequence[str], stage: str) -> str:
    where = "pretrain/metrics.jsonl" if stage == "pretrain" else f"{stage}/*/metrics.jsonl"
    return f"No values of {', '.join(keys)} in {where}. Stage {stage} writes them; its state is: {record.state(stage)}."


def curve_panels(comparison: Comparison) -> list[Panel]:
    """The curves of pre-training of several runs: a thin line for each run, a strong one for the mean of a setting.

    A figure for each metric that has a panel and values, and for the common ones in any case.
    """
    panels = [_compared_curves(comparison, metric) for metric in drawn_metrics() if "*" not in metric.name]
    return [panel for panel in panels if panel is not None]


def _compared_curves(comparison: Comparison, metric: Metric) -> Panel | None:
    name, faint, strong, facts = _slug(metric.title), [], [], []
    for series, row in enumerate(comparison.rows, start=1):
        points = [run.record.pretrain.series(metric.name, axis="epoch") for run in row.runs]
        points = [(x, y) for x, y in points if len(x)]
        if not points:
            continue
        if len(points) > 1:
            faint += [Curve("", *run, series, faint=True) for run in points]
        # The mean goes as far as all runs do, so it never jumps because one ends.
        common = functools.reduce(np.intersect1d, [x for x, _ in points])
        if len(common):
            mean = np.mean([y[np.isin(x, common)] for x, y in points], axis=0)
            strong.append(Curve("", common, mean, series))
            facts.append(f"{row.label} ends at {metric.show(mean[-1])} at epoch {common[-1]:,.6g}")
    if not faint and not strong:
        missing = f"No run has values of {metric.name}."
        return Panel(name, metric.title, missing=missing) if metric in COMMON else None
    levels = {level for run in comparison.runs for level in _levels(run.record, [metric])}
    plot = Plot(
        "", faint + strong, metric.unit == "fraction", metric.log_scale, metric.from_zero and not metric.log_scale,
        levels=sorted(levels),
    )  # fmt: skip
    description = f"{metric.title} of each setting against epoch: {'; '.join(facts)}."
    svg = draw(f"compare-{name}", [plot], xlabel="epoch", description=description)
    return Panel(name, metric.title, metric.description, svg)


def sweep_panel(record: RunRecord, stage: str) -> Panel:
    """Validation accuracy of every trial of ``finetune`` or ``baseline`` against its epoch; the winner stands out."""
    name, title = f"{stage}-curves", f"{SWEEP_TITLES[stage]}: accuracy by epoch"
    trials, chosen = record.sweep(stage)
    curves, winner = [], ""
    for trial in sorted(trials, key=lambda trial: trial.trial.name == chosen):  # the winner last, on top
        x, y = trial.metrics.series("val/top1", axis="epoch")
        if not len(x):
            continue
        if trial.trial.name != chosen:
            curves.append(Curve("", x, y, series=0))
            continue
        folds = [fold.series("val/top1", axis="epoch") for fold in trial.folds]
        curves += [Curve("", *fold, faint=True) for fold in folds if len(fold[0])]
        curves.append(Curve("winner", x, y))
        best = trial.validation_accuracy
        reached = "" if best is None else f", {percent(best)} at its best"
        winner = f" The strong line is the winner: {trial.trial.text}{reached}."
        if folds:
            winner += f" It is the mean of {len(folds)} folds, the thin lines, each scored on the labels it left out."
    if not curves:
        return Panel(name, title, missing=_missing_text(record, ["val/top1"], stage))
    count = f"{len(trials)} trials, one line each" if len(trials) > 1 else "One trial"
    caption = f"On the local validation split. {count}.{winner}"
    svg = draw(name, [Plot("", curves, percent=True)], xlabel="epoch", description=f"{title}. {caption}")
    return Panel(name, title, caption, svg)


def exhibit_panel(stage: str, number: int, exhibit: Exhibit) -> Panel | Exhibit:
    """The ``number``-th exhibit that a stage left for the report: a line diagram as a figure, any other as it is."""
    if exhibit["kind"] != "lines":
        return exhibit
    curves = [
        Curve(label, np.array(x), np.array(y), series)
        for series, (label, (x, y)) in enumerate(exhibit["curves"].items(), start=1)
    ]
    name, description = f"{stage}-{number}", f"{exhibit['title']}. {exhibit['caption']}"
    svg = draw(name, [Plot(exhibit["y"], curves)], xlabel=exhibit["x"], description=description)
    return Panel(name, exhibit["title"], exhibit["caption"], svg)
