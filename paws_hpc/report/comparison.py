"""Several runs as one table: runs that differ in nothing but the seed are one row, with mean and deviation.

Legend: a *setting* is all that determines results except the seed: the fields of the frozen config that have an effect,
and the digests of the stores. Runs scored on different test images never share a row.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

from paws_hpc.config import Config, flatten, has_effect
from paws_hpc.report.run_record import RunRecord
from paws_hpc.report.tables import DASH, METHODS, Notice, markdown, points, scores

VALIDATION = "validation"
COLUMNS = METHODS | {VALIDATION: "PAWS-NN, validation"}
"""What is compared: test accuracies, and PAWS-NN on the local validation split at the end of pre-training."""

_MOST_FIELDS = 4
_NAMED_STORES = {"train": "training images", "labelled_store": "store of labelled images", "test": "test images"}


@dataclass(frozen=True)
class Compared:
    """One run of a comparison, its results (fractions, by key of ``COLUMNS``) and their intervals, as text."""

    record: RunRecord
    values: dict[str, float]
    intervals: dict[str, str]

    @property
    def name(self) -> str:
        """Of the run."""
        return self.record.name


class Paired(NamedTuple):
    """Two runs on the same test images: how many only the one, or only the other, classified rightly, of how many.

    ``p`` is of McNemar's exact test, two-sided: how likely so unequal numbers are if neither is better.
    """

    ours: int
    theirs: int
    images: int
    p: float

    def __str__(self) -> str:
        difference = points((self.ours - self.theirs) / self.images)
        return f"{difference} ({self.ours}:{self.theirs}), p {'< 0.001' if self.p < 0.001 else f'= {self.p:.3f}'}"


@dataclass(frozen=True)
class Summary:
    """A value of the runs of a row, by the run's name, in their order; runs without one are left out."""

    values: dict[str, float]

    @property
    def mean(self) -> float:
        """Over the runs that have a value."""
        return statistics.fmean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """The standard deviation of a sample (n - 1 in the denominator); None of a single run."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    def __str__(self) -> str:
        deviation = "" if self.deviation is None else f" ± {100 * self.deviation:.1f}"
        return f"{100 * self.mean:.1f}{deviation} %"


@dataclass(frozen=True)
class Row:
    """The runs of one setting. ``fields`` are those in which settings differ; ``label`` tells them apart in words."""

    label: str
    fields: dict[str, str]
    runs: Sequence[Compared]

    def summary(self, column: str) -> Summary | None:
        """Of a key of ``COLUMNS``; None where no run has a value."""
        values = {run.name: run.values[column] for run in self.runs if column in run.values}
        return Summary(values) if values else None

    @property
    def seeds(self) -> list[int | None]:
        """Of its runs."""
        return [run.record.seed for run in self.runs]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side: a row per setting, in the order in which the runs were named.

    ``differing``: field → run's name → text of its value, for fields with an effect that are not the same in all runs.
    """

    rows: Sequence[Row]
    differing: dict[str, dict[str, str]]

    @property
    def runs(self) -> list[Compared]:
        """Row by row."""
        return [run for row in self.rows for run in row.runs]

    @cached_property
    def columns(self) -> dict[str, str]:
        """Those of ``COLUMNS`` for which any run has a value."""
        return {key: name for key, name in COLUMNS.items() if any(key in run.values for run in self.runs)}

    @property
    def pairs(self) -> list[tuple[Compared, Compared]]:
        """Each run that the first setting does not have, and the one of the first setting with its seed.

        Where that has none of its seed, or there is no other setting, it is the first run.
        """
        first, *others = self.rows
        reference = {run.record.seed: run for run in reversed(first.runs)}
        later = [run for row in others for run in row.runs] or first.runs[1:]
        return [(run, reference.get(run.record.seed, first.runs[0]) if others else first.runs[0]) for run in later]

    @property
    def fields(self) -> list[str]:
        """The differing fields as columns of the table; none where they are too many to read."""
        return list(self.differing) if len(self.differing) <= _MOST_FIELDS else []


def compare(records: Sequence[RunRecord]) -> Comparison:
    """Sort runs into rows by their settings; no two have one name, as :func:`read_runs` sees to.

    Raises:
        ValueError: a result contradicts itself.
    """
    runs = [_compared(record) for record in records]
    names = [run.name for run in runs]
    differing = differences(dict(zip(names, _settings(records), strict=True)))
    groups: dict[tuple[str, ...], list[Compared]] = {}
    for run in runs:
        groups.setdefault(tuple(values[run.name] for values in differing.values()), []).append(run)
    fields = [dict(zip(differing, key, strict=True)) for key in groups]
    labels = _labels(fields, list(groups.values()))
    return Comparison([Row(*row) for row in zip(labels, fields, groups.values(), strict=True)], differing)


def differences(settings: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """From each run's fields (text by name): field → run → text, of the fields that are not the same in all runs."""
    fields = dict.fromkeys(field for own in settings.values() for field in own)
    texts = {field: {run: own.get(field, DASH) for run, own in settings.items()} for field in fields}
    return {field: values for field, values in texts.items() if len(set(values.values())) > 1}


def _settings(records: Sequence[RunRecord]) -> list[dict[str, str]]:
    """Each run's setting, field → text; stores by their contents, not by where they lie.

    A field that is younger than a run has the value that it would have if the run went on: its default.
    """
    defaults = flatten(asdict(Config()))
    fields = [
        {
            name: value_text(value)
            for name, value in ((defaults | record.settings) if record.settings else {}).items()
            if has_effect(name) and name != "seed"
        }
        for record in records
    ]
    stores = [
        {name: record.digests[key][:8] for key, name in _NAMED_STORES.items() if key in record.digests}
        for record in records
    ]
    # A run that has not begun knows no store's digest; it belongs to those with its fields.
    begun = [number for number, own in enumerate(stores) if own]
    for number, own in enumerate(fields):
        if number not in begun:
            stores[number] = next((stores[other] for other in begun if fields[other] == own), {})
    return [own | store for own, store in zip(fields, stores, strict=True)]


def _compared(record: RunRecord) -> Compared:
    scored = scores(record)
    values = {score.key: score.top1 for score in scored}
    _, validated = record.pretrain.series("val/paws_nn_top1")
    if record.summary and len(validated):  # an unfinished run's last value is of another epoch
        values[VALIDATION] = float(validated[-1])
    return Compared(record, values, {score.key: score.interval for score in scored})


def paired(run: RunRecord, other: RunRecord, method: str) -> Paired | None:
    """Compare two runs image by image; None unless both kept the method's predictions of the same test images."""
    same = run.digests.get("test") == other.digests.get("test")
    if not same or method not in run.right or method not in other.right:
        return None
    from scipy.stats import binomtest  # noqa: PLC0415 - a second of import time

    ours, theirs = run.right[method], other.right[method]
    only, others = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    p = binomtest(only, only + others).pvalue if only + others else 1.0
    return Paired(only, others, len(ours), float(p))


def value_text(value: Any) -> str:
    """A field's value as people write it on a command line."""
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _labels(fields: Sequence[dict[str, str]], groups: Sequence[Sequence[Compared]]) -> list[str]:
    """A name for each setting: the fields that differ where they are few, otherwise the names of its runs."""
    if fields[0] and len(fields[0]) <= 3:
        short = short_names(fields[0])
        return [", ".join(f"{short[field]}={value}" for field, value in row.items()) for row in fields]
    names = [without_seed(runs[0].name) for runs in groups]
    return names if len(set(names)) == len(names) else [runs[0].name for runs in groups]


def without_seed(name: str) -> str:
    """``digits-seed0-me_max=True`` as ``digits-me_max=True``."""
    return re.sub(r"[-_.]?seed=?\d+", "", name) or name


def short_names(fields: Iterable[str]) -> dict[str, str]:
    """Dotted field → its last name, or the whole where that would be ambiguous."""
    last = {field: field.rpartition(".")[2] for field in fields}
    counts = Counter(last.values())
    return {field: end if counts[end] == 1 else field for field, end in last.items()}


def warnings(comparison: Comparison) -> list[Notice]:
    """What a reader must know before comparing any two numbers."""
    runs, notices = comparison.runs, []
    tested: dict[str, list[str]] = {}
    for run in runs:
        if "test" in run.record.digests:
            tested.setdefault(run.record.digests["test"][:8], []).append(run.name)
    if len(tested) > 1:
        digests = "; ".join(f"{digest}: {', '.join(names)}" for digest, names in tested.items())
        text = f"Accuracies on different test images say nothing about each other. By digest: {digests}."
        notices.append(Notice("alarm", "These runs have different test sets", text))
    if collapsed := [run.name for run in runs if run.record.collapsed]:
        text = f"{', '.join(collapsed)}. Their values are part of the means."
        notices.append(Notice("alarm", f"{len(collapsed)} of {len(runs)} runs collapsed", text))
    if unfinished := [run.name for run in runs if not run.record.result]:
        text = f"{', '.join(unfinished)}. Their values are missing from the means."
        notices.append(Notice("note", f"{len(unfinished)} of {len(runs)} runs have no test scores", text))
    for row in comparison.rows:
        for seed, count in Counter(row.seeds).items():
            if count > 1 and seed is not None:
                names = ", ".join(run.name for run in row.runs if run.record.seed == seed)
                notices.append(Notice("note", f"{count} runs of one setting have the seed {seed}", f"{names}."))
    commits = Counter(str(run.record.chain.get("commit") or "unknown") for run in runs)
    if len(commits) > 1:
        text = "; ".join(f"{commit[:20]}: {count}" for commit, count in commits.most_common())
        notices.append(Notice("note", "These runs were begun with different code", f"Runs by commit: {text}."))
    return notices


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The table and where it comes from, for programs; accuracies are fractions."""
    rows = [
        {
            "label": row.label,
            "settings": row.fields,
            "runs": [run.name for run in row.runs],
            "seeds": row.seeds,
            "collapsed": [run.name for run in row.runs if run.record.collapsed],
            "scores": {
                column: {"mean": summary.mean, "deviation": summary.deviation, "values": summary.values}
                for column in comparison.columns
                if (summary := row.summary(column))
            },
        }
        for row in comparison.rows
    ]
    runs = [
        {
            "name": run.name,
            "seed": run.record.seed,
            "commit": run.record.chain.get("commit"),
            "versions": run.record.chain.get("versions", {}),
            "digests": run.record.digests,
        }
        for run in comparison.runs
    ]
    differences = [
        {"run": run.name, "other": other.name, "method": method} | result._asdict()
        for run, other in comparison.pairs
        for method in METHODS
        if (result := paired(run.record, other.record, method)) is not None
    ]
    return {
        "rows": rows,
        "runs": runs,
        "paired": differences,
        "warnings": [asdict(notice) for notice in warnings(comparison)],
    }


def as_markdown(comparison: Comparison) -> str:
    """The table as GitHub's Markdown, for docs/results.md and papers; alarms and the runs of each row stand below."""
    rows = []
    for row in comparison.rows:
        settings = [row.fields[field] for field in comparison.fields] or [row.label]
        values = [str(row.summary(column) or DASH) for column in comparison.columns]
        rows.append([*settings, str(len(row.runs)), *values])
    table = markdown([*(comparison.fields or ["setting"]), "runs", *comparison.columns.values()], rows)
    lines = [table, "", "Mean ± standard deviation (of a sample) over runs that differ in the seed."]
    lines += [f"**{notice.title}**: {notice.text}" for notice in warnings(comparison)]
    return "\n".join(lines) + "\n"
