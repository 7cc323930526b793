"""Which curves of pre-training the reports show, and what they mean for the runs that have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from paws_hpc.report.run_record import RunRecord


@dataclass(frozen=True)
class Line:
    """A value of the metrics.

    Attributes:
        key: of ``metrics.jsonl``.
        label: in the drawing.
        series: which colour, from 1.
        plus_log_k: whether log K of the same row is added in runs with me-max, so that the floor is 0 with and without.
        of_me_max: whether the line is of me-max: without that a run logs zeros, which say nothing.
    """

    key: str
    label: str
    series: int = 1
    plus_log_k: bool = False
    of_me_max: bool = False


@dataclass(frozen=True)
class Axes:
    """Lines that share a y axis; ``log_k`` draws a level at log K, where uniform predictions are."""

    title: str
    lines: Sequence[Line]
    percent: bool = False
    log: bool = False
    from_zero: bool = False
    log_k: bool = False


@dataclass(frozen=True)
class Figure:
    """Drawings below each other; ``hint`` says why it may have no values."""

    name: str
    title: str
    caption: str
    axes: Sequence[Axes]
    x: str = "step"
    hint: str = ""


@dataclass(frozen=True)
class SingleCurve:
    """A figure of which each run has one curve, where runs are compared."""

    name: str
    title: str
    caption: str
    line: Line
    axes: Axes
    hint: str = ""


_TOTAL = Line("train/loss", "total + log K", plus_log_k=True)
_CONSISTENCY = Line("train/loss_consistency", "consistency", 2)
_ME_MAX = Line("train/loss_me_max", "me-max + log K", 3, plus_log_k=True, of_me_max=True)
_ENTROPY = Line("train/loss_entropy", "entropy", 4)
_NATS = Axes("", [], from_zero=True, log_k=True)

_PAWS_NN = Figure(
    "paws-nn",
    "PAWS-NN on the local validation split",
    "Soft nearest neighbours with all labelled images as support; nothing is trained for it.",
    [Axes("", [Line("val/paws_nn_top1", "PAWS-NN")], percent=True)],
    x="epoch",
)
_CONFIDENCE = Figure(
    "confidence",
    "Confidence of the targets",
    "Mean probability of a target's most likely class (Fig. 4 of the paper).",
    [Axes("", [Line("train/confidence", "confidence")], percent=True, from_zero=True)],
)
_DIAGNOSTICS = Figure(
    "diagnostics",
    "Diagnostics, never trained on",
    "Fig. 4 of the paper: NT-Xent on the unlabelled rows (instance discrimination) and supervised NCE on the "
    "supports (support classification).",
    [
        Axes("instance discrimination", [Line("train/instance_discrimination", "NT-Xent")]),
        Axes("support classification", [Line("train/support_classification", "supervised NCE")]),
    ],
)
_WARM_UP = Figure(
    "warm-up",
    "Support warm-up loss",
    "Supervised NCE over the supports, added with a weight that falls to 0. It keeps runs with few labels from "
    "collapsing and is no part of the paper.",
    [Axes("", [Line("train/loss_support_nce", "support NCE")], from_zero=True)],
    hint="It is logged only where the support warm-up is on.",
)
_LEARNING_RATE = Figure(
    "learning-rate",
    "Learning rate",
    "Linear warm-up, then a cosine, per iteration.",
    [Axes("", [Line("train/lr", "learning rate")], from_zero=True)],
)
_GRADIENT_NORM = Figure(
    "gradient-norm",
    "Gradient norm",
    "Over all parameters, before the optimiser; nothing is clipped. Logarithmic axis.",
    [Axes("", [Line("train/grad_norm", "gradient norm")], log=True)],
)
_THROUGHPUT = Figure(
    "throughput",
    "Throughput",
    "Unlabelled images per second over all ranks, and the share of time spent waiting for data.",
    [
        Axes("images per second", [Line("train/images_per_s", "images/s")], from_zero=True),
        Axes("waiting for data", [Line("train/data_wait", "data wait")], percent=True, from_zero=True),
    ],
)


def run_figures(record: RunRecord) -> list[Figure]:
    """The figures of a run's own report."""
    rest = [_PAWS_NN, _CONFIDENCE, _DIAGNOSTICS, _WARM_UP, _LEARNING_RATE, _GRADIENT_NORM, _THROUGHPUT]
    return [_loss(record), *rest]


def _loss(record: RunRecord) -> Figure:
    """The loss and those terms that this run's objective has."""
    lines, terms, collapsed = [_TOTAL, _CONSISTENCY], ["consistency"], ["consistency = log K"]
    floor = "With log K added to me-max the floor is 0"
    if record.me_max:
        lines.append(_ME_MAX)
        terms.append("me-max + log K")
        collapsed.append("me-max + log K = 0")
    else:
        lines[0] = replace(_TOTAL, label="total")
        floor = "This run has no me-max: the floor is 0"
    if record.entropy_weight:
        lines.append(_ENTROPY)
        terms.append(f"{record.entropy_weight:g} times entropy (D.2)")
        collapsed.append("entropy = log K")
    total = f"the sum of {_listed(terms)} (and of" if len(terms) > 1 else f"{terms[0]} (plus"
    caption = (
        f"{floor}, and the total is {total} the support warm-up loss, while that is on). A collapsed run sits at "
        f"{_listed(collapsed)}."
    )
    return Figure("loss", "Loss and its terms", caption, [replace(_NATS, lines=lines)])


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def compared_curves(records: Sequence[RunRecord]) -> list[SingleCurve]:
    """What is drawn where runs are compared; terms of the objective that none of them has are left out."""
    return [
        _compared_total(records),
        _single(_PAWS_NN),
        *_compared_terms(records),
        _single(_WARM_UP),
        _single(_CONFIDENCE),
        _single(_DIAGNOSTICS, 0, "instance-discrimination", "Instance discrimination",
                "NT-Xent on the unlabelled rows, never trained on (Fig. 4 of the paper)."),
        _single(_DIAGNOSTICS, 1, "support-classification", "Support classification",
                "Supervised NCE on the supports, as a diagnostic never trained on (Fig. 4 of the paper)."),
        _single(_LEARNING_RATE),
        _single(_GRADIENT_NORM),
        _single(_THROUGHPUT, 0, "throughput", "Throughput", "Unlabelled images per second over all ranks."),
        _single(_THROUGHPUT, 1, "data-wait", "Waiting for data", "The share of time spent waiting for data."),
    ]  # fmt: skip


def _single(figure: Figure, axes: int = 0, name: str = "", title: str = "", caption: str = "") -> SingleCurve:
    """One pair of axes of a figure, under names of its own where the figure has several."""
    shown = replace(figure.axes[axes], title="")
    return SingleCurve(
        name or figure.name, title or figure.title, caption or figure.caption, shown.lines[0], shown, figure.hint
    )


def _compared_total(records: Sequence[RunRecord]) -> SingleCurve:
    maximised = {record.me_max for record in records}
    if maximised == {True}:
        what = "Total plus log K: 0 is its floor"
    elif maximised == {False}:
        what = "Without me-max 0 is the floor of the total"
    else:
        what = "Total, plus log K in runs with me-max: 0 is the floor of all"
    above = ", above that with the entropy term (D.2)" if any(record.entropy_weight for record in records) else ""
    return SingleCurve("loss", "Loss", f"{what}, and a collapsed run sits at log K{above}.", _TOTAL, _NATS)


def _compared_terms(records: Sequence[RunRecord]) -> list[SingleCurve]:
    text = "Cross-entropy between targets and predictions of other views. A collapsed run sits at log K."
    found = [SingleCurve("consistency", "Consistency", text, _CONSISTENCY, _NATS)]
    maximised = sum(record.me_max for record in records)
    if maximised:
        text = "Minus the entropy of the mean prediction, plus log K: at 0 all classes are predicted equally often."
        if maximised < len(records):
            text += " Runs without me-max have no line."
        found.append(SingleCurve("me-max", "Mean-entropy maximisation", text, _ME_MAX, _NATS))
    if any(record.entropy_weight for record in records):
        text = (
            "Mean entropy of single predictions, before its weight, in runs that minimise it (D.2). At log K they are "
            "uniform."
        )
        found.append(SingleCurve("entropy", "Entropy of predictions", text, _ENTROPY, _NATS))
    return found
