"""The figures of a run's sweep: accuracy of its trials against the epoch, and trials as parallel coordinates."""

from __future__ import annotations

from markupsafe import Markup

from paws_hpc.report.panels import Panel, missing_text
from paws_hpc.report.parallel import Line, draw_parallel
from paws_hpc.report.plots import Curve, Plot, draw
from paws_hpc.report.run_record import RunRecord, TrialRecord
from paws_hpc.report.tables import percent

SWEEP_TITLES = {"finetune": "Fine-tuning", "baseline": "Baseline"}
"""Stage → what its sweep is called."""


def sweep_panel(record: RunRecord, stage: str) -> Panel:
    """Validation accuracy of every trial of a sweep against its epoch; the winner stands out.

    Args:
        record: the run.
        stage: the sweep's folder, ``finetune`` or ``baseline``.
    """
    name, title = f"{stage}-curves", f"{SWEEP_TITLES[stage]}: accuracy by epoch"
    trials, chosen = record.sweep(stage)
    curves, winner = [], None
    for trial in trials:
        x, y = trial.metrics.series("val/top1", axis="epoch")
        if len(x) and trial.name == chosen:
            winner = (trial, Curve("winner", x, y))
        elif len(x):
            curves.append(Curve("", x, y, series=0))
    if winner is not None:
        curves.append(winner[1])  # last, so that it lies on top
    if not curves:
        return Panel(name, title, "", missing=missing_text(record, ["val/top1"], stage))
    count = f"{len(curves)} trials, one line each" if len(curves) > 1 else "One trial"
    caption = f"On the local validation split. {count}." + _winner_text(winner)
    svg = draw(name, [Plot("", curves, percent=True)], xlabel="epoch", description=f"{title}. {caption}")
    return Panel(name, title, caption, Markup(svg))


def parallel_panel(record: RunRecord, stage: str) -> Panel:
    """What the fields of a sweep led to: a line for each trial; the winner stands out."""
    name, title = f"{stage}-parallel", f"{SWEEP_TITLES[stage]}: parallel coordinates"
    trials, chosen = record.sweep(stage)
    lines = [
        Line("winner" if won else "", trial.trial, trial.validation_accuracy, int(won))
        for trial in trials
        if trial.validation_accuracy is not None
        for won in [trial.name == chosen]
    ]
    if not lines:
        state = record.state(stage)
        missing = f"No trial in {stage}/ has a result.json. Stage {stage} writes them; its state is: {state}."
        return Panel(name, title, "", missing=missing)
    count = f"{len(lines)} trials with a result, one line each" if len(lines) > 1 else "One trial with a result"
    best = max(lines, key=lambda line: line.accuracy)
    caption = f"{count}; accuracy is the best on the local validation split."
    if any(line.series for line in lines):
        caption += " The strong line is the winner."
    svg = draw_parallel(lines, description=f"{title}. {caption} Highest: {best.text}.")
    return Panel(name, title, caption, svg)


def _winner_text(winner: tuple[TrialRecord, Curve] | None) -> str:
    if winner is None:
        return ""
    trial, best = winner[0].trial, winner[0].validation_accuracy
    reached = "" if best is None else f", {percent(best)} at its best"
    return f" The strong line is the winner: {trial.text}{reached}."
