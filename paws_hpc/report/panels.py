"""The curves of pre-training in a run's report, in drawings and in words, and what stands where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from paws_hpc.engine.config import SupportConfig
from paws_hpc.report.figures import Axes, Figure, Line, run_figures
from paws_hpc.report.plots import Curve, Plot, draw
from paws_hpc.report.run_record import RunRecord
from paws_hpc.report.tables import percent


@dataclass(frozen=True)
class Panel:
    """One figure of the page: a drawing, or (``svg`` is None) the reason why there is none."""

    name: str
    title: str
    caption: str
    svg: Markup | None = None
    missing: str = ""


def pretrain_panels(record: RunRecord) -> list[Panel]:
    """The figures of pretraining, always all of them: one without values says so."""
    return [_panel(record, figure) for figure in run_figures(record)]


def _panel(record: RunRecord, figure: Figure) -> Panel:
    plots, facts, ends, absent = [], [], [], []
    for axes in figure.axes:
        curves = []
        for line in axes.lines:
            x, y = line_values(record, line, figure.x)
            if len(x):
                curves.append(Curve(line.label, x, y, line.series))
                facts.append(f"{line.label} {_in_words(x, y, axes, figure.x)}")
                ends.append(_ends(x, y, axes, figure.x))
            else:
                absent.append(line.key)
        if curves:
            plots.append(_plot(record, axes, curves))
    if not plots:
        return Panel(figure.name, figure.title, "", missing=missing_text(record, absent, "pretrain", figure.hint))
    description = f"{figure.title} against {figure.x}: {'; '.join(facts)}."
    caption = figure.caption + (f" Not logged: {', '.join(absent)}." if absent else "")
    if len(facts) == 1:
        caption += f" {ends[0]}."
    svg = draw(figure.name, plots, xlabel=figure.x, description=description)
    return Panel(figure.name, figure.title, caption, Markup(svg))


def _plot(record: RunRecord, axes: Axes, curves: list[Curve]) -> Plot:
    levels = level_of(record, axes)
    return Plot(
        axes.title,
        curves,
        percent=axes.percent,
        log=axes.log,
        from_zero=axes.from_zero,
        levels=levels,
        alarms=[(event.step, event.name) for event in record.pretrain.events] if axes.log_k else [],
    )


def level_of(record: RunRecord, axes: Axes) -> list[tuple[float, str]]:
    """The level of uniform predictions, log K, if the axes have it."""
    return [(_log_k(record), "log K")] if axes.log_k and len(record.pretrain.rows) else []


def _log_k(record: RunRecord) -> float:
    return float(np.log(record.settings.get("pretrain.support.classes", SupportConfig.classes)))


def line_values(record: RunRecord, line: Line, axis: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A line's points in a run, with log K of the same row added where the line asks for that and me-max is on."""
    metrics = record.pretrain
    if line.of_me_max and not record.me_max:
        return np.empty(0), np.empty(0)
    if not line.plus_log_k or not record.me_max:
        return metrics.series(line.key, axis=axis)
    x, y = metrics.series(line.key, axis=axis)
    return x, y + _log_k(record)


def _in_words(x: NDArray[np.float64], y: NDArray[np.float64], axes: Axes, axis: str) -> str:
    """A curve for those who do not see it: where it starts, where it ends and how far it went in between."""
    if not np.isfinite(y).all():
        return f"has values that are not finite, first at {axis} {x[~np.isfinite(y)][0]:,.6g}"
    return (
        f"goes from {_text(y[0], axes)} to {_text(y[-1], axes)} at {axis} {x[-1]:,.6g}"
        f" (lowest {_text(y.min(), axes)}, highest {_text(y.max(), axes)})"
    )


def _ends(x: NDArray[np.float64], y: NDArray[np.float64], axes: Axes, axis: str) -> str:
    """What the caption of a single curve says of it."""
    if not np.isfinite(y).all():
        return f"It {_in_words(x, y, axes, axis)}"
    return f"Ends at {_text(y[-1], axes)}, highest {_text(y.max(), axes)}"


def _text(value: float, axes: Axes) -> str:
    return percent(value) if axes.percent else f"{value:.4g}"


def missing_text(record: RunRecord, keys: Sequence[str], stage: str, hint: str = "") -> str:
    """What a panel without data shows: what is missing, where it would be, and who writes it."""
    where = "pretrain/metrics.jsonl" if stage == "pretrain" else f"{stage}/*/metrics.jsonl"
    state = record.state(stage)
    return (
        f"No values of {', '.join(keys)} in {where}. Stage {stage} writes them; its state is: {state}. {hint}".strip()
    )
