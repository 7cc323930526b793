"""Sweeps as parallel coordinates: one line for each trial, through the value of each field to its accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

from paws_hpc.metrics import percent
from paws_hpc.report.plots import stroke
from paws_hpc.trial import Trial, axes, number

_LEFT, _BETWEEN, _RIGHT, _TOP, _BOTTOM = 62, 139, 60, 34, 213
_LOG = 10  # a field whose values span more than this factor has a logarithmic axis
_TICK_HEIGHT = 12  # of a line of text; ticks that are nearer to each other than that are left out


class TrialLine(NamedTuple):
    """A trial that has an accuracy (a fraction); ``series`` is its colour and dashes, from 1; 0 is pale."""

    label: str
    trial: Trial
    accuracy: float
    series: int

    @property
    def text(self) -> str:
        """The line in words."""
        return f"{self.label and f'{self.label}: '}{self.trial.text}, {percent(self.accuracy)}"


class _Axis(NamedTuple):
    """Values from bottom to top; ``ticks`` are (value, text) and hold both ends."""

    title: str
    x: int
    ticks: list[tuple[float, str]]
    log: bool = False

    def height(self, value: float) -> float:
        """Where a value is in the drawing; half-way up where there is one value only."""
        low, high = self.ticks[0][0], self.ticks[-1][0]
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return _BOTTOM - (_BOTTOM - _TOP) * ((value - low) / (high - low) if high > low else 0.5)


def draw_parallel(lines: Sequence[TrialLine], *, description: str) -> Markup:
    """Draw at least one line as an ``<svg>`` element, 225 units high; ``description`` is the alternative text.

    Lines with a colour lie on top; pointing at one shows its values.
    """
    drawn = {
        field: _Axis(
            field.replace("_", " "),
            _LEFT + _BETWEEN * position,
            [(value, number(value)) for value in values],
            log=values[0] > 0 and values[-1] > _LOG * values[0],
        )
        for position, (field, values) in enumerate(axes([line.trial for line in lines]).items())
    }
    last = _LEFT + _BETWEEN * len(drawn)
    accuracies = [line.accuracy for line in lines]
    steps = np.round(MaxNLocator(5).tick_values(min(accuracies), max(accuracies)), 9)
    accuracy = _Axis("validation accuracy", last, [(step, f"{100 * step:g} %") for step in steps.tolist()])
    elements = []
    for line in sorted(lines, key=lambda line: line.series != 0):
        heights = [(drawn[field], value) for field, value in line.trial.values.items()] + [(accuracy, line.accuracy)]
        points = " ".join(f"{axis.x},{axis.height(value):.1f}" for axis, value in heights)
        style = 'class="pale"'
        if line.series:
            colour, dashes = stroke(line.series)
            dash_lengths = " ".join(f"{1.5 * length:g}" for length in dashes)
            style = f'style="stroke:var(--{colour});stroke-dasharray:{dash_lengths}"'
        elements.append(f'<polyline points="{points}" {style}><title>{escape(line.text)}</title></polyline>')
    # Ticks are lifted where lines come from both sides; those of the accuracy stand right of it.
    elements += [_axis(axis, axis.x - 6, "end", lift=-7 if axis.x > _LEFT else 0) for axis in drawn.values()]
    elements.append(_axis(accuracy, last + 6, "start", lift=0))
    return Markup(
        f'<svg class="plot parallel" viewBox="0 0 {last + _RIGHT} 225" role="img" aria-label="{escape(description)}">'
        f"{''.join(elements)}</svg>"
    )


def _axis(axis: _Axis, x: int, anchor: str, *, lift: int) -> str:
    elements = [
        f'<line x1="{axis.x}" x2="{axis.x}" y1="{_TOP}" y2="{_BOTTOM}"/>',
        f'<text x="{axis.x}" y="14" text-anchor="middle">{axis.title}</text>',
    ]
    last = math.inf
    for value, text in axis.ticks:
        y = axis.height(value)
        if last - y >= _TICK_HEIGHT:
            last = y
            place = f'x="{x}" y="{y + lift:.1f}" text-anchor="{anchor}"'
            elements.append(f'<text {place} dominant-baseline="central">{text}</text>')
    return "".join(elements)
