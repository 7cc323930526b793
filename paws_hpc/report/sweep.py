"""The figures of a run's sweep: accuracy of its cells against the epoch, and cells as parallel coordinates."""

from __future__ import annotations

from markupsafe import Markup

from paws_hpc.report.panels import Panel, missing_text
from paws_hpc.report.parallel import Trial, draw_parallel
from paws_hpc.report.plots import Curve, Plot, draw
from paws_hpc.report.run_record import Cell, RunRecord, parse_cell
from paws_hpc.report.tables import percent

SWEEP_TITLES = {"finetune": "Fine-tuning", "baseline": "Baseline"}
"""Stage → what its sweep is called."""


def sweep_panel(record: RunRecord, stage: str) -> Panel:
    """Validation accuracy of every cell of a sweep against its epoch; the winner stands out.

    Args:
        record: the run.
        stage: the sweep's folder, ``finetune`` or ``baseline``.
    """
    name, title = f"{stage}-curves", f"{SWEEP_TITLES[stage]}: accuracy by epoch"
    cells, chosen = record.sweep(stage)
    setting = None if chosen is None else parse_cell(chosen)
    curves, winner = [], None
    for cell in cells:
        x, y = cell.metrics.series("val/top1", axis="epoch")
        if len(x) and (cell.learning_rate, cell.epochs) == setting:
            winner = (cell, Curve("winner", x, y))
        elif len(x):
            curves.append(Curve("", x, y, series=0))
    if winner is not None:
        curves.append(winner[1])  # last, so that it lies on top
    if not curves:
        return Panel(name, title, "", missing=missing_text(record, ["val/top1"], stage))
    count = f"{len(curves)} cells, one line each" if len(curves) > 1 else "One cell"
    caption = f"On the local validation split. {count}." + _winner_text(winner)
    svg = draw(name, [Plot("", curves, percent=True)], xlabel="epoch", description=f"{title}. {caption}")
    return Panel(name, title, caption, Markup(svg))


def parallel_panel(record: RunRecord, stage: str) -> Panel:
    """What a learning rate and a number of epochs led to: a line for each cell of a sweep; the winner stands out."""
    name, title = f"{stage}-parallel", f"{SWEEP_TITLES[stage]}: parallel coordinates"
    cells, chosen = record.sweep(stage)
    setting = None if chosen is None else parse_cell(chosen)
    trials = [
        Trial("winner" if won else "", cell.learning_rate, cell.epochs, cell.validation_accuracy, int(won))
        for cell in cells
        if cell.validation_accuracy is not None
        for won in [(cell.learning_rate, cell.epochs) == setting]
    ]
    if not trials:
        state = record.state(stage)
        missing = f"No cell in {stage}/ has a result.json. Stage {stage} writes them; its state is: {state}."
        return Panel(name, title, "", missing=missing)
    count = f"{len(trials)} cells with a result, one line each" if len(trials) > 1 else "One cell with a result"
    best = max(trials, key=lambda trial: trial.accuracy)
    caption = f"{count}; accuracy is the best on the local validation split."
    if any(trial.series for trial in trials):
        caption += " The strong line is the winner."
    svg = draw_parallel(trials, description=f"{title}. {caption} Highest: {best.text}.")
    return Panel(name, title, caption, svg)


def _winner_text(winner: tuple[Cell, Curve] | None) -> str:
    if winner is None:
        return ""
    cell, best = winner[0], winner[0].validation_accuracy
    reached = "" if best is None else f", {percent(best)} at its best"
    return f" The strong line is the winner: lr {cell.learning_rate:g}, {cell.epochs} epochs{reached}."
