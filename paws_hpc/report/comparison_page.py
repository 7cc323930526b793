"""The page that compares runs: table, curves, sweeps and provenance in one self-contained file."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paws_hpc.config import has_effect
from paws_hpc.files import write_text
from paws_hpc.metrics import percent
from paws_hpc.report.comparison import (
    Comparison,
    Row,
    Summary,
    compare,
    differences,
    paired,
    short_names,
    value_text,
    warnings,
    without_seed,
)
from paws_hpc.report.page import render
from paws_hpc.report.panels import SWEEP_TITLES, curve_panels
from paws_hpc.report.plots import stroke
from paws_hpc.report.run_record import read_runs
from paws_hpc.report.tables import DASH, METHODS


def build_comparison(runs: Sequence[Path], folder: Path | None = None) -> Path:
    """Write ``index.html``, which compares run directories, atomically, to ``folder`` or :func:`comparison_folder`.

    Raises as :func:`read_runs` and :func:`compare`.
    """
    comparison = compare(read_runs(runs))
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
    values = [value for run in comparison.runs for value in run.values.values()]
    floor = min((int(10 * value - 1e-9) * 10 for value in values), default=0)  # percent: the ten below the lowest
    strokes = [stroke(number) for number in range(1, len(comparison.rows) + 1)]
    return {
        "title": f"{len(comparison.runs)} runs in {len(comparison.rows)} setting{'s' * (len(comparison.rows) != 1)}",
        "comparison": comparison,
        "short": short_names(comparison.fields),
        "notices": warnings(comparison),
        # Colour and dashes of each setting, for a line 2.5 units wide.
        "strokes": [(colour, " ".join(f"{2.5 * length:g}" for length in dashes)) for colour, dashes in strokes],
        "floor": floor,
        "place": lambda value: f"{100 * (100 * value - floor) / (100 - floor):.2f}",
        "panels": curve_panels(comparison),
        "sweeps": [_sweep(comparison, stage) for stage in SWEEP_TITLES],
        "paired": _paired(comparison),
        "differing": _differing(comparison),
        "provenance": _provenance(comparison),
    }


def _sweep(comparison: Comparison, stage: str) -> dict[str, Any]:
    """Validation accuracy of a sweep's trials, a row per setting: (text, strength in [0, 1], runs that chose it)."""
    sweeps = {run.name: run.record.sweep(stage) for run in comparison.runs}
    trials = sorted(
        {record.trial for records, _ in sweeps.values() for record in records}, key=lambda trial: trial.rank
    )
    means: dict[tuple[str, str], float] = {}  # by the labels of settings and the names of trials
    for row, trial in itertools.product(comparison.rows, trials):
        values = {
            run.name: record.validation_accuracy
            for run in row.runs
            for record in sweeps[run.name][0]
            if record.trial == trial and record.validation_accuracy is not None
        }
        if values:
            means[row.label, trial.name] = Summary(values).mean
    low = min(means.values(), default=0.0)
    spread = max(means.values(), default=0.0) - low or 1.0

    def cell(row: Row, name: str) -> tuple[str, float, int]:
        if (mean := means.get((row.label, name))) is None:
            return "", 0.0, 0
        return percent(mean), (mean - low) / spread, sum(sweeps[run.name][1] == name for run in row.runs)

    rows = [(row.label, [cell(row, trial.name) for trial in trials]) for row in comparison.rows]
    return {
        "stage": stage,
        "title": f"{SWEEP_TITLES[stage]}: sweep",
        "trials": [trial.text for trial in trials],
        "rows": rows,
    }


def _paired(comparison: Comparison) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
    """Paired tests: names of methods, and (run, the other, a text for each method); none that can be computed."""
    methods = [method for method in METHODS if method in comparison.columns]
    rows = [
        (run.name, other.name, [str(paired(run.record, other.record, method) or DASH) for method in methods])
        for run, other in comparison.pairs
    ]
    return [METHODS[method] for method in methods], [row for row in rows if set(row[2]) != {DASH}]


def _differing(comparison: Comparison) -> list[tuple[str, bool, list[tuple[str, str]]]]:
    """Fields that are not the same in all runs: (field, whether it has an effect, [(value, its runs)])."""
    without_effect = {
        run.name: {
            field: value_text(value)
            for field, value in run.record.settings.items()
            if field not in ("name", "seed") and not has_effect(field)
        }
        for run in comparison.runs
    }
    fields = [(field, True, values) for field, values in comparison.differing.items()]
    fields += [(field, False, values) for field, values in sorted(differences(without_effect).items())]
    return [
        (field, effect, [(text, ", ".join(run for run in values if values[run] == text))
                         for text in dict.fromkeys(values.values())])
        for field, effect, values in fields
    ]  # fmt: skip


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
    usual = {name: Counter(values).most_common(1)[0][0] for name, values in columns.items()}
    for name in ("seed", "begun", "labelled digest", "validation digest"):  # these follow the seed
        usual.pop(name, None)
    rows = [
        (record.name, [(values[number], values[number] != usual.get(name, values[number]))
                       for name, values in columns.items()])
        for number, record in enumerate(records)
    ]  # fmt: skip
    return list(columns), rows
