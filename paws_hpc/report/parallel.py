"""Sweeps as parallel coordinates: one line per trial, through the value of each field to its accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

from paws_hpc.report.plots import stroke
from paws_hpc.report.tables import percent
from paws_hpc.trial import Trial, axes, number

_LEFT, _BETWEEN, _RIGHT, _TOP, _BOTTOM = 62, 139, 60, 34, 213
_LOG = 10  # a field whose values span more than this factor has a logarithmic axis
_TICK_HEIGHT = 12  # of a line of text; ticks that are nearer to each other than that are left out


@dataclass(frozen=True)
class Line:
    """A trial that has an accuracy (a fraction); ``series`` is its colour and dashes, from 1; 0 is pale."""

    label: str
    trial: Trial
    accuracy: float
    series: int = 0

    @property
    def text(self) -> str:
        """The line in words."""
        label = f"{self.label}: " if self.label else ""
        return f"{label}{self.trial.text}, {percent(self.accuracy)}"


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


def draw_parallel(lines: Sequence[Line], *, description: str) -> Markup:
    """Draw at least one line as an ``<svg>`` element, 225 units high; lines with a colour lie on top.

    Args:
        lines: pointing at one shows its values.
        description: the alternative text.
    """
    fields = axes([line.trial for line in lines])
    accuracies = [line.accuracy for line in lines]
    steps = np.round(MaxNLocator(5).tick_values(min(accuracies), max(accuracies)), 9)
    drawn = {
        field: _Axis(
            field.replace("_", " "),
            _LEFT + _BETWEEN * place,
            [(value, number(value)) for value in values],
            log=values[0] > 0 and values[-1] > _LOG * values[0],
        )
        for place, (field, values) in enumerate(fields.items())
    }
    last = _LEFT + _BETWEEN * len(drawn)
    accuracy = _Axis("validation accuracy", last, [(step, f"{100 * step:g} %") for step in steps.tolist()])
    parts = [_line(drawn, accuracy, line) for line in sorted(lines, key=lambda line: line.series != 0)]
    parts += [_axis(axis, lift=-7 if place else 0, after=False) for place, axis in enumerate(drawn.values())]
    return Markup(
        f'<svg class="plot parallel" viewBox="0 0 {last + _RIGHT} 225" role="img" aria-label="{escape(description)}">'
        f"{''.join(parts)}{_axis(accuracy, lift=0, after=True)}</svg>"
    )


def _line(axes: dict[str, _Axis], accuracy: _Axis, line: Line) -> str:
    heights = [(axes[field], value) for field, value in line.trial.values.items()] + [(accuracy, line.accuracy)]
    points = " ".join(f"{axis.place},{axis.height(value):.1f}" for axis, value in heights)
    style = 'class="pale"'
    if line.series:
        colour, dashes = stroke(line.series)
        style = f'style="stroke:var(--{colour});stroke-dasharray:{" ".join(f"{1.5 * part:g}" for part in dashes)}"'
    return f'<polyline points="{points}" {style}><title>{escape(line.text)}</title></polyline>'


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
