"""Sweeps as parallel coordinates: one line per cell, from its learning rate over its epochs to its accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

from paws_hpc.report.plots import stroke
from paws_hpc.report.tables import percent

_WIDTH, _TOP, _BOTTOM = 400, 34, 213
_PLACES = (62, 206, 340)  # of the three axes
_TICK_HEIGHT = 12  # of a line of text; ticks that are nearer to each other than that are left out


@dataclass(frozen=True)
class Trial:
    """A cell of a sweep that has an accuracy (a fraction); ``series`` is its colour and dashes, from 1; 0 is pale."""

    label: str
    learning_rate: float
    epochs: int
    accuracy: float
    series: int = 0

    @property
    def text(self) -> str:
        """The line in words."""
        label = f"{self.label}: " if self.label else ""
        return f"{label}lr {self.learning_rate:g}, {self.epochs} epochs, {percent(self.accuracy)}"


@dataclass(frozen=True)
class _Axis:
    """Values from bottom to top; ``ticks`` are (value, text) and hold both ends."""

    title: str
    place: int
    ticks: list[tuple[float, str]]
    log: bool = False

    def height(self, value: float) -> float:
        """Where a value is in the drawing; half-way up where there is one value only."""
        low, high, value = (self._scaled(each) for each in (self.ticks[0][0], self.ticks[-1][0], value))
        return _BOTTOM - (_BOTTOM - _TOP) * ((value - low) / (high - low) if high > low else 0.5)

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else value


def draw_parallel(trials: Sequence[Trial], *, description: str) -> Markup:
    """Draw at least one trial as an ``<svg>`` element of 400 by 225 units; lines with a colour lie on top.

    Args:
        trials: a line each; pointing at it tells its values.
        description: the alternative text.
    """
    rates, epochs = sorted({trial.learning_rate for trial in trials}), sorted({trial.epochs for trial in trials})
    accuracies = [trial.accuracy for trial in trials]
    steps = np.round(MaxNLocator(5).tick_values(min(accuracies), max(accuracies)), 9)
    axes = [
        _Axis("learning rate", _PLACES[0], [(rate, f"{rate:g}") for rate in rates], log=rates[0] > 0),
        _Axis("epochs", _PLACES[1], [(count, f"{count:,}") for count in epochs]),
        _Axis("validation accuracy", _PLACES[2], [(step, f"{100 * step:g} %") for step in steps.tolist()]),
    ]
    drawn = [_line(axes, trial) for trial in sorted(trials, key=lambda trial: trial.series != 0)]
    drawn += [_axis(axis, lift=lift, after=axis is axes[-1]) for axis, lift in zip(axes, (0, -7, 0), strict=True)]
    return Markup(
        f'<svg class="plot parallel" viewBox="0 0 {_WIDTH} 225" role="img" aria-label="{escape(description)}">'
        f"{''.join(drawn)}</svg>"
    )


def _line(axes: Sequence[_Axis], trial: Trial) -> str:
    values = (trial.learning_rate, trial.epochs, trial.accuracy)
    points = " ".join(f"{axis.place},{axis.height(value):.1f}" for axis, value in zip(axes, values, strict=True))
    style = 'class="pale"'
    if trial.series:
        colour, dashes = stroke(trial.series)
        style = f'style="stroke:var(--{colour});stroke-dasharray:{" ".join(f"{1.5 * part:g}" for part in dashes)}"'
    return f'<polyline points="{points}" {style}><title>{escape(trial.text)}</title></polyline>'


def _axis(axis: _Axis, *, lift: int, after: bool) -> str:
    """One axis with its ticks, which are lifted where lines come from both sides."""
    x, anchor = (axis.place + 6, "start") if after else (axis.place - 6, "end")
    parts = [
        f'<line x1="{axis.place}" x2="{axis.place}" y1="{_TOP}" y2="{_BOTTOM}"/>',
        f'<text x="{axis.place}" y="14" text-anchor="middle">{axis.title}</text>',
    ]
    last = math.inf
    for value, text in axis.ticks:
        y = axis.height(value)
        if last - y >= _TICK_HEIGHT:
            parts.append(
                f'<text x="{x}" y="{y + lift:.1f}" text-anchor="{anchor}" dominant-baseline="central">{text}</text>'
            )
            last = y
    return "".join(parts)
