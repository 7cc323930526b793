"""Line plots as inline SVG that take their colours from the page, so that one drawing serves dark, light and print.

matplotlib draws with marker colours that no plot would choose (``#000001`` ...); each is then replaced by a CSS
variable of ``report.css``. Text stays text: it scales, can be selected, and is set in the page's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

SERIES = 10
"""Colours for lines that mean different things; ``report.css`` has a value of each for dark and light."""

_ROLES = ("ink", "muted", "rule", "alarm", *(f"series-{number}" for number in range(1, SERIES + 1)))
_COLOUR = {role: f"#0000{digit:02x}" for digit, role in enumerate(_ROLES, start=1)}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_DASHES = ((), (5, 1.6), (1.2, 1.4), (6, 1.5, 1.2, 1.5))  # strokes and gaps in widths of the line
_MOST_POINTS = 400
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the layout is the same on every machine
    "font.size": 10,
    "text.color": _COLOUR["muted"],
    "axes.edgecolor": _COLOUR["rule"],
    "axes.labelcolor": _COLOUR["muted"],
    "axes.titlecolor": _COLOUR["muted"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
    "grid.color": _COLOUR["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": _COLOUR["rule"],
    "ytick.color": _COLOUR["rule"],
    "xtick.labelcolor": _COLOUR["muted"],
    "ytick.labelcolor": _COLOUR["muted"],
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.labelcolor": _COLOUR["ink"],
    "lines.linewidth": 1.5,
}


@dataclass(frozen=True)
class Curve:
    """One line: x and y are float64 (N,); ``series`` picks colour and dashes, from 1; 0 draws a pale thin line.

    A ``faint`` line has the colour of its series, but is thin and whole: one of several whose mean is drawn too.
    """

    label: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    series: int = 1
    faint: bool = False


@dataclass(frozen=True)
class Plot:
    """One pair of axes. ``levels`` are labelled horizontal lines, ``alarms`` labelled vertical ones."""

    title: str
    curves: Sequence[Curve]
    percent: bool = False
    log: bool = False
    from_zero: bool = False
    levels: Sequence[tuple[float, str]] = field(default_factory=list)
    alarms: Sequence[tuple[float, str]] = field(default_factory=list)


def draw(name: str, plots: Sequence[Plot], *, xlabel: str, description: str) -> Markup:
    """Draw plots below each other, with a common x axis, as one ``<svg>`` element of 400 by 225 units.

    Every plot has a curve with a point. ``name`` is unique in the page: the ids inside the drawing begin with it.
    ``description`` is the alternative text. The same input gives the same text: no date, no random id.
    """
    style: Any = {**_STYLE, "svg.hashsalt": name}  # its type hints list every key there is
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(400 / 72, 225 / 72), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(len(plots), 1, sharex=True, squeeze=False)[:, 0]
        for ax, plot in zip(axes, plots, strict=True):
            _draw_axes(ax, plot, rows=len(plots))
        axes[-1].set_xlabel(xlabel)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), name=name, description=description)


def _draw_axes(ax: Axes, plot: Plot, *, rows: int) -> None:
    for curve in plot.curves:
        _draw_curve(ax, curve)
    for value, label in plot.levels:
        ax.axhline(value, color=_COLOUR["muted"], linewidth=0.9, linestyle=(0, (2, 2)))
        ax.annotate(
            label, (1, value), xycoords=("axes fraction", "data"), xytext=(0, -2), textcoords="offset points",
            ha="right", va="top", fontsize=9,
        )  # fmt: skip
    for position, label in plot.alarms:
        ax.axvline(position, color=_COLOUR["alarm"], linewidth=1.2)
        late = position > np.mean(ax.get_xlim())
        ax.annotate(
            label, (position, 0.5), xycoords=("data", "axes fraction"), xytext=(-4 if late else 4, 0),
            textcoords="offset points", ha="right" if late else "left", va="center", fontsize=9,
            color=_COLOUR["alarm"], parse_math=False,
        )  # fmt: skip
    if plot.log:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5 if rows == 1 else 3))
    if plot.percent:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):g} %"))
    if plot.from_zero:
        ax.set_ylim(bottom=-0.02 * ax.get_ylim()[1])  # a line that lies on zero stays visible
        ax.spines["bottom"].set_visible(False)  # the grid line at zero is the axis
    whole = all(np.array_equal(curve.x, np.round(curve.x)) for curve in plot.curves)  # steps and epochs
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if whole else f"{value:g}"))
    ax.tick_params(length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(visible=False, axis="x")
    ax.set_title(plot.title)
    named = [curve for curve in plot.curves if curve.label]
    if len(named) > 1:
        ax.legend(
            loc="lower right", bbox_to_anchor=(1, 1), ncols=len(named), borderpad=0, borderaxespad=0.35,
            handlelength=1.7, handletextpad=0.5, columnspacing=1.2,
        )  # fmt: skip


def _draw_curve(ax: Axes, curve: Curve) -> None:
    if curve.series == 0:
        ax.plot(curve.x, curve.y, color=_COLOUR["muted"], linewidth=0.8, alpha=0.6)
        return
    role, dashes = stroke(curve.series)
    colour = _COLOUR[role]
    x, y, low, high = thin(curve.x, curve.y)
    if curve.faint:
        ax.plot(x, y, color=colour, linewidth=0.8, alpha=0.5)
        return
    if len(x) < len(curve.x):
        ax.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    # A short curve, or one with a single point, would otherwise hide where it was measured.
    marker = "o" if len(x) <= 40 else ""
    ax.plot(
        x, y, color=colour, linestyle=(0, dashes) if dashes else "solid", marker=marker, markersize=3, label=curve.label
    )


def stroke(series: int) -> tuple[str, tuple[float, ...]]:
    """Colour, as a name of ``report.css``, and dashes of a series, from 1; 40 look different from each other."""
    turn, colour = divmod(series - 1, SERIES)
    return f"series-{colour + 1}", _DASHES[(colour + turn) % len(_DASHES)]


def thin(
    x: NDArray[np.float64], y: NDArray[np.float64], *, most: int = _MOST_POINTS
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Shorten a curve (N,) to at most ``most`` points: mean x, mean, lowest and highest y of equal runs of points.

    Extremes stay visible as a band, so a spike of one step among 100,000 is not averaged away.
    """
    if len(x) <= most:
        return x, y, y, y
    runs = np.array_split(np.arange(len(x)), most)
    columns = [(x[run].mean(), y[run].mean(), y[run].min(), y[run].max()) for run in runs]
    mean_x, mean_y, low, high = np.array(columns).T
    return mean_x, mean_y, low, high


def _inline(document: bytes, *, name: str, description: str) -> Markup:
    """Turn matplotlib's SVG file into an element for an HTML page: no prologue, own ids, colours from the page."""
    root = ElementTree.fromstring(document)
    # Its style sheet would apply to the whole page, and metadata is no part of a picture.
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in {f"{{{_SVG}}}style", f"{{{_SVG}}}metadata"}:
                parent.remove(child)
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    for element in root.iter():
        identifier = element.attrib.pop("id", None)
        if identifier in used:
            element.set("id", f"{name}-{identifier}")
        link = element.attrib.pop(f"{{{_XLINK}}}href", None)
        if link is not None:
            element.set("href", f"#{name}-{link[1:]}")
        clip = element.get("clip-path")
        if clip is not None:
            element.set("clip-path", clip.replace("url(#", f"url(#{name}-"))
        style = element.get("style")
        if style is not None:
            element.set("style", _page_style(style))
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib.update({"role": "img", "aria-label": description, "class": "plot"})
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _page_style(style: str) -> str:
    """A style attribute with the page's colours and the page's font family."""
    for role, colour in _COLOUR.items():
        style = style.replace(colour, f"var(--{role})")
    return re.sub(r"(font-family: |font: [^;]*?px )[^;]+", lambda match: match[1] + "inherit", style)
