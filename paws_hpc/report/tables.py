"""The numbers of a run, formatted once: the terminal's final table and all reports take them from here.

Legend: N test images, K classes, C a confusion matrix (K, K) with C[true, predicted] in images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paws_hpc.config import flatten
from paws_hpc.metrics import percent
from paws_hpc.report.run_record import RunRecord, TrialRecord
from paws_hpc.trial import Trial, axes, number, short

_SCORES = ("top1", "top5", "confusion")  # whatever else an entry of result.json holds was chosen by validation
_Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
DASH = "\N{EN DASH}"
"""Stands between the ends of an interval, and alone where there is no value (yet)."""

METHODS = {
    "paws_nn": "PAWS-NN",
    "fine_tuned": "fine-tuned",
    "linear_probe": "linear probe",
    "k_nn": "k-NN",
    "baseline": "baseline",
}
"""The keys of result.json's ``test`` and their names in tables."""


@dataclass(frozen=True)
class Notice:
    """Something the reader must know before any number; ``level`` is ``alarm`` or ``note``."""

    level: str
    title: str
    text: str


@dataclass(frozen=True)
class Score:
    """One method's accuracy on the test split; ``low`` and ``high`` bound it at 95 % (fractions)."""

    key: str
    name: str
    setting: str
    top1: float
    top5: float | None
    correct: int
    count: int
    low: float
    high: float
    confusion: NDArray[np.int64] | None

    @property
    def interval(self) -> str:
        """The 95 % interval, such as ``93.6–97.7 %``."""
        return f"{100 * self.low:.1f}{DASH}{percent(self.high)}"


def duration(seconds: float | None) -> str:
    """Seconds as text, with hours and minutes once they are easier to read."""
    if seconds is None:
        return DASH
    if seconds < 600:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds:,.0f} s ({minutes // 60} h {minutes % 60:02d} min)"


def points(difference: float) -> str:
    """A difference of fractions in percentage points; a true minus sign is as wide as the plus it stands under."""
    return f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}")


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a binomial proportion, as fractions.

    It stays inside [0, 1] and keeps its coverage near 100 %, where the textbook ``p ± 1.96 s`` does neither.

    Raises:
        ValueError: not ``0 <= correct <= count`` with at least one trial.
    """
    if not 0 <= correct <= count or count == 0:
        raise ValueError(f"{correct} of {count} is not a proportion")
    p, z2 = correct / count, _Z95**2
    centre = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 / (1 + z2 / count) * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2))
    # At the ends the bound is exactly 0 or 1; rounding must not leave 1 - 1e-16 there.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == count else centre + half)


def scores(record: RunRecord) -> list[Score]:
    """The methods that result.json has scored on the test split, in the order of ``METHODS``.

    Raises:
        ValueError: a confusion matrix contradicts the accuracy or the number of images beside it; it is named.
    """
    test, scored = record.result.get("test", {}), []
    for key, name in METHODS.items():
        entry = test.get(key)
        if entry is None:
            continue
        count, top1 = int(test["count"]), float(entry["top1"])
        correct = round(top1 * count)
        confusion = None if entry.get("confusion") is None else np.array(entry["confusion"], dtype=np.int64)
        if confusion is not None and (confusion.sum() != count or confusion.trace() != correct):
            raise ValueError(
                f"{record.folder / 'result.json'}: test.{key}.confusion has {confusion.trace()} of {confusion.sum()} "
                f"images right, but test.{key}.top1={top1} of test.count={count} means {correct}. "
                "Score the test split again."
            )
        setting = Trial({field: value for field, value in entry.items() if field not in _SCORES}).text
        top5 = None if entry.get("top5") is None else float(entry["top5"])
        scored.append(
            Score(key, name, setting, top1, top5, correct, count, *wilson_interval(correct, count), confusion)
        )
    return scored


def timed_stages(record: RunRecord) -> dict[str, tuple[str, float | None]]:
    """State and seconds of each stage but the report, which cannot time itself while it is being written."""
    return {stage: entry for stage, entry in record.stages.items() if stage != "report"}


def labels_text(record: RunRecord) -> str:
    """All labels that a run used, such as ``40 labels and 100 for validation``."""
    labels, validation = record.result.get("labels"), record.result.get("validation_labels")
    if labels is None:
        return f"{DASH} labels"
    return f"{labels:,} labels" + (f" and {validation:,} for validation" if validation else ", which chose too")


def result_table(record: RunRecord) -> list[tuple[str, str]]:
    """The final table of a run as (row, value): labels, test images, each method's accuracy, seconds per stage.

    Values that do not exist yet are a dash. The terminal prints exactly this, and reports show the same strings.
    Raises ValueError where a file of the run contradicts itself.
    """
    result, selected = record.result, record.selected
    counts = {
        "labels": result.get("labels"),
        "labels for validation": result.get("validation_labels"),
        "test images": result.get("test", {}).get("count"),
    }
    rows = [(name, DASH if count is None else f"{count:,}") for name, count in counts.items()]
    if result.get("folds"):
        rows[1] = "labels for validation", f"none more: cross-validation of the labels, {result['folds']} folds, chose"
    if counts["test images"] == 0:
        rows[2] = "test images", "none: nothing is scored on images that chose nothing"
    unseen = {"fine_tuned": selected, **{name: selected.get(name, {}) for name in ("linear_probe", "k_nn", "baseline")}}
    scored = {score.key: score for score in scores(record)}
    for key, name in METHODS.items():
        if score := scored.get(key):
            label = f"{name} ({score.setting})" if score.setting else name
            rows.append((label, f"{percent(score.top1)} (95 % interval {score.interval})"))
        elif counts["test images"] == 0 and (accuracy := unseen.get(key, {}).get("validation_accuracy")) is not None:
            rows.append((name, f"{percent(accuracy)} in validation, which chose it: too good by some"))
        else:
            rows.append((name, DASH))
    return rows + [(f"stage {stage}", duration(seconds)) for stage, (_, seconds) in timed_stages(record).items()]


def sweep_grid(trials: Sequence[TrialRecord], chosen: str | None) -> dict[str, Any]:
    """A sweep as a table: a column for each value of its first field, a row for each combination of the others.

    ``chosen`` is the winner's name, None before selection. ``rows`` of the result are (values of the other fields, a
    cell for each column). A cell has the ``accuracy`` as text, its ``strength`` in [0, 1] from the lowest to the
    highest, and its ``state``: done, chosen, missing (no result) or absent (no trial).
    """
    fields = axes([record.trial for record in trials])
    first, *others = fields or [""]
    values = [record.validation_accuracy for record in trials if record.validation_accuracy is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)

    def cell(record: TrialRecord | None) -> dict[str, Any]:
        if record is None:
            return {"accuracy": "", "strength": 0.0, "state": "absent"}
        accuracy = record.validation_accuracy
        if accuracy is None:
            return {"accuracy": "no result", "strength": 0.0, "state": "missing"}
        strength = (accuracy - low) / (high - low) if high > low else 0.5
        state = "chosen" if record.trial.name == chosen else "done"
        return {"accuracy": percent(accuracy), "strength": strength, "state": state}

    rows: dict[str, dict[float | None, TrialRecord]] = {}
    for record in trials:
        point = record.trial.values
        head = ", ".join(number(point[field]) if field in point else DASH for field in others)
        rows.setdefault(head, {})[point.get(first)] = record
    columns = fields.get(first, [])
    return {
        "field": short(first),
        "columns": [number(value) for value in columns],
        "corner": ", ".join(map(short, others)),
        "rows": [(head, [cell(row.get(value)) for value in columns]) for head, row in rows.items()],
    }


def confused_pairs(
    confusion: NDArray[np.int64], classes: Sequence[str], *, limit: int = 15
) -> list[tuple[str, str, int, float]]:
    """The most frequent mistakes: true class, predicted class, images, and their share of the true class's images."""
    mistakes = confusion - np.diag(np.diag(confusion))
    totals = confusion.sum(axis=1)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:limit]
    return [
        (classes[true], classes[guess], int(mistakes[true, guess]), float(mistakes[true, guess] / totals[true]))
        for true, guess in (divmod(int(flat), len(classes)) for flat in order)
        if mistakes[true, guess] > 0
    ]


def by_class(confusion: NDArray[np.int64], classes: Sequence[str]) -> list[tuple[str, int, float, float, float]]:
    """Class, its images, precision, recall and F1, the lowest F1 first; 0 for a class without images or predictions.

    ``confusion`` is (K, K) with C[true, predicted].
    """
    right, images, taken = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    precision, recall = right / np.maximum(taken, 1), right / np.maximum(images, 1)
    f1 = 2 * right / np.maximum(images + taken, 1)
    order = np.argsort(f1, kind="stable")
    return [(classes[k], int(images[k]), float(precision[k]), float(recall[k]), float(f1[k])) for k in order]


def text_rows(value: dict[str, Any]) -> list[tuple[str, str]]:
    """A nested mapping as (dotted key, text)."""
    return [
        (key, DASH if entry is None else f"{entry:.6g}" if isinstance(entry, float) else str(entry))
        for key, entry in flatten(value).items()
    ]


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table as GitHub's Markdown, without a newline at its end."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
