"""Which curves the report shows, what they mean, and what it says where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from paws_hpc.stages.report_plots import Curve, Plot, draw
from paws_hpc.stages.report_run import Cell, Metrics, RunRecord, parse_cell
from paws_hpc.stages.report_tables import percent


@dataclass(frozen=True)
class Panel:
    """One figure of the page: a drawing, or (``svg`` is None) the reason why there is none."""

    name: str
    title: str
    caption: str
    svg: Markup | None = None
    missing: str = ""


@dataclass(frozen=True)
class Line:
    """A value of the metrics; ``plus_log_k`` adds log K of the same row, so that its floor is 0."""

    key: str
    label: str
    series: int = 1
    plus_log_k: bool = False


@dataclass(frozen=True)
class Axes:
    """Lines that share a y axis."""

    title: str
    lines: Sequence[Line]
    percent: bool = False
    log: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class _Figure:
    name: str
    title: str
    caption: str
    axes: Sequence[Axes]
    x: str = "step"
    hint: str = ""


_PRETRAIN = [
    _Figure(
        "loss",
        "Loss and its terms",
        "With log K added to me-max the floor is 0, and the total is the sum of the two terms (and of the support "
        "warm-up loss, while that is on). A collapsed run sits at consistency = log K and me-max + log K = 0.",
        [
            Axes(
                "",
                [
                    Line("loss/total", "total + log K", plus_log_k=True),
                    Line("loss/consistency", "consistency", 2),
                    Line("loss/me_max", "me-max + log K", 3, plus_log_k=True),
                ],
                from_zero=True,
            )
        ],
    ),
    _Figure(
        "paws-nn",
        "PAWS-NN on the local validation split",
        "Soft nearest neighbours with all labelled images as support; nothing is trained for it.",
        [Axes("", [Line("validation/paws_nn", "PAWS-NN")], percent=True)],
        x="epoch",
    ),
    _Figure(
        "confidence",
        "Confidence of the targets",
        "Mean probability of a target's most likely class (Fig. 4 of the paper).",
        [Axes("", [Line("diagnostics/confidence", "confidence")], percent=True, from_zero=True)],
    ),
    _Figure(
        "diagnostics",
        "Diagnostics, never trained on",
        "Fig. 4 of the paper: NT-Xent on the unlabelled rows (instance discrimination) and supervised NCE on the "
        "supports (support classification).",
        [
            Axes("instance discrimination", [Line("diagnostics/instance_discrimination", "NT-Xent")]),
            Axes("support classification", [Line("diagnostics/support_classification", "supervised NCE")]),
        ],
    ),
    _Figure(
        "warm-up",
        "Support warm-up loss",
        "Supervised NCE over the supports, added with a weight that falls to 0. It keeps runs with few labels from "
        "collapsing and is no part of the paper.",
        [Axes("", [Line("loss/support_nce", "support NCE")], from_zero=True)],
        hint="It is logged only where the support warm-up is on.",
    ),
    _Figure(
        "learning-rate",
        "Learning rate",
        "Linear warm-up, then a cosine, per iteration.",
        [Axes("", [Line("optimizer/lr", "learning rate")], from_zero=True)],
    ),
    _Figure(
        "gradient-norm",
        "Gradient norm",
        "Over all parameters, before the optimiser; nothing is clipped. Logarithmic axis.",
        [Axes("", [Line("gradient/norm", "gradient norm")], log=True)],
    ),
    _Figure(
        "throughput",
        "Throughput",
        "Unlabelled images per second over all ranks, and the share of time spent waiting for data.",
        [
            Axes("images per second", [Line("throughput/images_per_s", "images/s")], from_zero=True),
            Axes("waiting for data", [Line("throughput/data_wait", "data wait")], percent=True, from_zero=True),
        ],
    ),
]


@dataclass(frozen=True)
class SingleCurve:
    """A figure of which each run has one curve."""

    name: str
    title: str
    caption: str
    line: Line
    axes: Axes


CURVES = [
    SingleCurve(
        "loss",
        "Loss",
        "Total plus log K: 0 is its floor, and a collapsed run sits at log K.",
        Line("loss/total", "total + log K", plus_log_k=True),
        Axes("", [], from_zero=True),
    ),
    *(
        SingleCurve(figure.name, figure.title, figure.caption, figure.axes[0].lines[0], figure.axes[0])
        for figure in _PRETRAIN
        if figure.name in ("paws-nn", "confidence", "gradient-norm")
    ),
]
"""What is drawn where runs are compared."""


def pretrain_panels(record: RunRecord) -> list[Panel]:
    """The figures of pretraining, always all of them: one without values says so."""
    return [_panel(record, figure) for figure in _PRETRAIN]


def _panel(record: RunRecord, figure: _Figure) -> Panel:
    plots, facts, ends, absent = [], [], [], []
    for axes in figure.axes:
        curves = []
        for line in axes.lines:
            x, y = line_values(record.pretrain, line, figure.x)
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
    levels = [level for line in axes.lines for level in level_of(record.pretrain, line)]
    return Plot(
        axes.title,
        curves,
        percent=axes.percent,
        log=axes.log,
        from_zero=axes.from_zero,
        levels=levels[:1],
        alarms=[(event.step, event.name) for event in record.pretrain.events] if levels else [],
    )


def level_of(metrics: Metrics, line: Line) -> list[tuple[float, str]]:
    """The level of uniform predictions, log K, if the line is measured against it."""
    classes = metrics.series("loss/num_classes")[1]
    return [(float(np.log(classes[-1])), "log K")] if line.plus_log_k and len(classes) else []


def line_values(metrics: Metrics, line: Line, axis: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A line's points, with log K of the same row added where it asks for that."""
    if not line.plus_log_k:
        return metrics.series(line.key, axis=axis)
    both = Metrics([row for row in metrics.rows if None not in (row.get(line.key), row.get("loss/num_classes"))])
    x, y = both.series(line.key, axis=axis)
    return x, y + np.log(both.series("loss/num_classes", axis=axis)[1])


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


def sweep_panel(record: RunRecord, stage: str, cells: Sequence[Cell], chosen: str | None) -> Panel:
    """Validation accuracy of every cell of a sweep against its epoch; the winner stands out.

    Args:
        record: the run.
        stage: the sweep's folder, ``finetune`` or ``baseline``.
        cells: its cells.
        chosen: the name of the winner, or None before selection.
    """
    name, title = f"{stage}-curves", {"finetune": "Fine-tuning", "baseline": "Baseline"}[stage] + ": accuracy by epoch"
    setting = None if chosen is None else parse_cell(chosen)
    curves, winner = [], None
    for cell in cells:
        x, y = cell.metrics.series("validation_accuracy", axis="epoch")
        if len(x) and (cell.learning_rate, cell.epochs) == setting:
            winner = (cell, Curve("winner", x, y))
        elif len(x):
            curves.append(Curve("", x, y, series=0))
    if winner is not None:
        curves.append(winner[1])  # last, so that it lies on top
    if not curves:
        return Panel(name, title, "", missing=missing_text(record, ["validation_accuracy"], stage))
    count = f"{len(curves)} cells, one line each" if len(curves) > 1 else "One cell"
    caption = f"On the local validation split. {count}." + _winner_text(winner)
    svg = draw(name, [Plot("", curves, percent=True)], xlabel="epoch", description=f"{title}. {caption}")
    return Panel(name, title, caption, Markup(svg))


def _winner_text(winner: tuple[Cell, Curve] | None) -> str:
    if winner is None:
        return ""
    cell, best = winner[0], winner[0].validation_accuracy
    reached = "" if best is None else f", {percent(best)} at its best"
    return f" The strong line is the winner: lr {cell.learning_rate:g}, {cell.epochs} epochs{reached}."


def missing_text(record: RunRecord, keys: Sequence[str], stage: str, hint: str = "") -> str:
    """What a panel without data shows: what is missing, where it would be, and who writes it."""
    where = "pretrain/metrics.jsonl" if stage == "pretrain" else f"{stage}/*/metrics.jsonl"
    state = record.state(stage)
    return (
        f"No values of {', '.join(keys)} in {where}. Stage {stage} writes them; its state is: {state}. {hint}".strip()
    )
