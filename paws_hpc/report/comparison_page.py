"""The page that compares runs: table, curves, sweeps and provenance in one self-contained file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paws_hpc.config import has_effect
from paws_hpc.files import write_text
from paws_hpc.report.comparison import (
    Comparison,
    Row,
    Summary,
    compare,
    short_names,
    value_text,
    warnings,
    without_seed,
)
from paws_hpc.report.comparison_curves import curve_panels
from paws_hpc.report.page import render
from paws_hpc.report.panels import Panel
from paws_hpc.report.parallel import Line, draw_parallel
from paws_hpc.report.plots import stroke
from paws_hpc.report.run_record import read_run
from paws_hpc.report.sweep import SWEEP_TITLES
from paws_hpc.report.tables import DASH, percent


@dataclass(frozen=True)
class SweepTable:
    """A sweep of all settings: a row per setting, a column per trial, values are means over its runs."""

    stage: str
    title: str
    trials: Sequence[str]
    rows: Sequence[tuple[str, Sequence[SweepValue]]]
    parallel: Panel


@dataclass(frozen=True)
class SweepValue:
    """``strength`` in [0, 1] runs from the table's lowest to its highest mean; ``chosen`` counts runs."""

    text: str
    strength: float
    chosen: int


def build_comparison(runs: Sequence[Path], folder: Path | None = None) -> Path:
    """Write ``index.html``, which compares the run directories ``runs``, atomically, and return its path.

    Args:
        runs: at least two.
        folder: to write to; :func:`comparison_folder` if none.

    Raises:
        FileNotFoundError: a run is no folder.
        ValueError: a file of a run is garbled, or two runs have one name; it is named.
    """
    comparison = compare([read_run(run) for run in runs])
    path = (folder or comparison_folder(runs)) / "index.html"
    write_text(path, render(Path(__file__).with_name("comparison.html.j2"), _context(comparison)))
    return path


def comparison_folder(runs: Sequence[Path]) -> Path:
    """Where the comparison of these runs belongs: ``comparisons/`` beside the first, named by what their names share.

    ``digits-seed0`` to ``digits-seed4`` give ``comparisons/digits``; with ``-me_max=True`` and ``-me_max=False`` after
    the seed they give ``comparisons/digits-me_max``.
    """
    names = [without_seed(run.resolve().name) for run in runs]
    shared = os.path.commonprefix(names).rstrip("-_.,=")  # noqa: RUF071 - of names, not of paths
    return runs[0].resolve().parent / "comparisons" / (shared or f"{names[0]}-and-{len(names) - 1}-more")


def _context(comparison: Comparison) -> dict[str, Any]:
    floor = _floor(comparison)
    return {
        "title": f"{len(comparison.runs)} runs in {len(comparison.rows)} setting{'s' * (len(comparison.rows) != 1)}",
        "comparison": comparison,
        "short": short_names(comparison.fields),
        "notices": warnings(comparison),
        "strokes": [_css_stroke(number) for number in range(1, len(comparison.rows) + 1)],
        "floor": floor,
        "place": lambda value: f"{100 * (100 * value - floor) / (100 - floor):.2f}",
        "values_text": _values_text,
        "panels": curve_panels(comparison),
        "sweeps": [_sweep(comparison, stage) for stage in SWEEP_TITLES],
        "differing": _differing(comparison),
        "provenance": _provenance(comparison),
    }


def _css_stroke(series: int) -> tuple[str, str]:
    """Colour and dashes of a series for a line 2.5 units wide."""
    colour, dashes = stroke(series)
    return colour, " ".join(f"{2.5 * length:g}" for length in dashes)


def _floor(comparison: Comparison) -> int:
    """Where the strips begin, in percent: the ten below the lowest value."""
    values = [value for run in comparison.runs for value in run.values.values()]
    return min((int(10 * value - 1e-9) * 10 for value in values), default=0)


def _values_text(row: Row, summary: Summary) -> str:
    """The single values in the order of the runs, such as ``94.5 · 94.0``; a dash where a run has none."""
    values = (summary.values.get(run.name) for run in row.runs)
    return " · ".join(DASH if value is None else f"{100 * value:.1f}" for value in values)


def _sweep(comparison: Comparison, stage: str) -> SweepTable:
    """Validation accuracy of a sweep's trials, with how many runs chose each."""
    trials = sorted(
        {record.trial for run in comparison.runs for record in run.record.sweep(stage)[0]}, key=lambda trial: trial.rank
    )
    table: list[tuple[str, list[tuple[Summary | None, int]]]] = []
    for row in comparison.rows:
        values: list[tuple[Summary | None, int]] = []
        for trial in trials:
            found = {
                run.name: record.validation_accuracy
                for run in row.runs
                for record in run.record.sweep(stage)[0]
                if record.trial == trial and record.validation_accuracy is not None
            }
            chosen = sum(run.record.sweep(stage)[1] == trial.name for run in row.runs)
            values.append((Summary(found) if found else None, chosen))
        table.append((row.label, values))
    means = [summary.mean for _, values in table for summary, _ in values if summary is not None]
    low, spread = min(means, default=0.0), (max(means) - min(means) if means else 0.0) or 1.0
    rows = [
        (label, [_sweep_value(summary, chosen, low, spread) for summary, chosen in values]) for label, values in table
    ]
    lines = [
        Line(label, trial, summary.mean, series)
        for series, (label, values) in enumerate(table, start=1)
        for trial, (summary, _) in zip(trials, values, strict=True)
        if summary is not None
    ]
    texts = [trial.text for trial in trials]
    return SweepTable(stage, f"{SWEEP_TITLES[stage]}: sweep", texts, rows, _parallel(stage, lines))


def _parallel(stage: str, lines: Sequence[Line]) -> Panel:
    name, title = f"{stage}-parallel", f"{SWEEP_TITLES[stage]}: parallel coordinates"
    if not lines:
        return Panel(name, title, "", missing=f"No trial in {stage}/ of any run has a result.")
    caption = "A line for each setting and trial, in the setting's colour: the mean over its runs of the best accuracy."
    best = max(lines, key=lambda line: line.accuracy)
    return Panel(name, title, caption, draw_parallel(lines, description=f"{title}. {caption} Highest: {best.text}."))


def _sweep_value(summary: Summary | None, chosen: int, low: float, spread: float) -> SweepValue:
    if summary is None:
        return SweepValue("", 0.0, 0)
    return SweepValue(percent(summary.mean), (summary.mean - low) / spread, chosen)


def _differing(comparison: Comparison) -> list[tuple[str, bool, list[tuple[str, str]]]]:
    """Fields that are not the same in all runs: (field, whether it has an effect, [(value, its runs)])."""
    found = [(field, True, values) for field, values in comparison.differing.items()]
    every = {field for run in comparison.runs for field in run.record.settings}
    for field in sorted(every - {"name", "seed"}):
        if not has_effect(field):
            values = {
                run.name: value_text(run.record.settings[field]) if field in run.record.settings else DASH
                for run in comparison.runs
            }
            if len(set(values.values())) > 1:
                found.append((field, False, values))
    return [(field, effect, _by_value(values)) for field, effect, values in found]


def _by_value(values: Mapping[str, str]) -> list[tuple[str, str]]:
    runs: dict[str, list[str]] = {}
    for name, value in values.items():
        runs.setdefault(value, []).append(name)
    return [(value, ", ".join(names)) for value, names in runs.items()]


def _provenance(comparison: Comparison) -> tuple[list[str], list[tuple[str, list[tuple[str, bool]]]]]:
    """Where each run comes from: (columns, [(run, [(value, whether it is not what most runs have)])])."""
    columns: dict[str, list[str]] = {}
    records = [run.record for run in comparison.runs]
    columns["seed"] = [DASH if record.seed is None else str(record.seed) for record in records]
    columns["begun"] = [str(record.chain.get("created", DASH))[:16].replace("T", " ") for record in records]
    columns["commit"] = [str(record.chain.get("commit") or "unknown")[:20] for record in records]
    for package in ("paws_hpc", "python", "torch", "torchvision"):
        columns[package] = [str(record.chain.get("versions", {}).get(package, DASH)) for record in records]
    for name in dict.fromkeys(name for record in records for name in record.digests):
        columns[f"{name} digest"] = [record.digests.get(name, DASH)[:8] for record in records]
    follow_the_seed = ("seed", "begun", "labelled digest", "validation digest")
    usual = {name: Counter(values).most_common(1)[0][0] for name, values in columns.items()}
    rows = [
        (
            run.name,
            [
                (values[number], name not in follow_the_seed and values[number] != usual[name])
                for name, values in columns.items()
            ],
        )
        for number, run in enumerate(comparison.runs)
    ]
    return list(columns), rows
