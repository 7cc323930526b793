"""The content of a Weights & Biases report of one or several chains: curves, sweeps, results, method and provenance.

Importing it needs wandb-workspaces, an extra that is slow to import; paws_hpc.report.wandb_saving saves the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import wandb_workspaces.reports.v2 as wr

from paws_hpc.report.comparison import Comparison, as_markdown, compare
from paws_hpc.report.page import LAUNCHED_BY, provenance
from paws_hpc.report.panels import drawn_metrics
from paws_hpc.report.run_record import RunRecord
from paws_hpc.report.tables import markdown, result_table
from paws_hpc.stages.catalogue import catalogue
from paws_hpc.trial import axes

_METHOD = (
    "PAWS (Assran et al., 2021) trains an encoder so that two views of an unlabelled image get the same soft class "
    "from its similarity to a few labelled images. **PAWS-NN** classifies with these similarities alone; "
    "**fine-tuned** adds a linear layer and trains everything on the labels, for every trial of the sweep; the trial "
    "with the best accuracy on the local validation split is scored on the test split, once. The **baseline** is the "
    "same sweep from random weights."
)


def build(records: Sequence[RunRecord], *, entity: str = "") -> Any:
    """The report of one or several chains, as wandb-workspaces' ``Report``; the first chain says in which project.

    ``entity`` is the user or team that holds it; a spec without one can be written where nobody is logged in.
    """
    project = str(records[0].settings.get("tracking.project") or "paws")
    chains = [str(record.chain.get("id")) for record in records]
    comparison = compare(records)

    def runs_of(stage: str, name: str, *, groupby: Sequence[str] = ()) -> Any:
        chosen = f"Config('chain') in {chains} and JobType = '{stage}'"
        return wr.Runset(entity=entity, project=project, name=name, filters=chosen, groupby=list(groupby))

    tested = [name for name in catalogue() if name.startswith("test/")]
    bars = wr.BarPlot(title="Accuracy on the test split", metrics=tested, layout=wr.Layout(x=0, y=0, w=24, h=8))
    blocks = [
        wr.H2("Result"),
        wr.MarkdownBlock(_results(comparison)),
        wr.PanelGrid(runsets=[runs_of("selection", "selection")], panels=[bars]),
        wr.H2("Pre-training"),
        wr.PanelGrid(runsets=[runs_of("pretrain", "pre-training", groupby=_settings(comparison))], panels=_curves()),
        wr.H2("Sweep"),
        wr.PanelGrid(runsets=[runs_of("finetune", "fine-tuning")], panels=_sweep(records, "finetune")),
        wr.H2("Baseline's sweep"),
        wr.PanelGrid(runsets=[runs_of("baseline", "baseline")], panels=_sweep(records, "baseline")),
        wr.H2("Comparison of runs"),
        wr.PanelGrid(runsets=[runs_of("pretrain", "pre-training")], panels=[wr.RunComparer(diff_only="split")]),
        wr.H2("Method and provenance"),
        wr.MarkdownBlock("\n\n".join([_METHOD, *map(_provenance, records)])),
    ]
    title = f"PAWS: {', '.join(record.name for record in records)}"[:128]
    return wr.Report(project=project, entity=entity, title=title, blocks=blocks)


def _settings(comparison: Comparison) -> list[str]:
    """What to group runs by, so that a curve is the mean of a setting's seeds; nothing where each has one run."""
    if max(len(row.runs) for row in comparison.rows) == 1:
        return []
    known = {field for run in comparison.runs for field in run.record.settings}
    return [f"config.{field}" for field in comparison.differing if field in known]


def _curves() -> list[Any]:
    return [
        wr.LinePlot(
            title=metric.title,
            x=f"trainer/{'epoch' if metric.axis == 'epoch' else 'global_step'}",
            log_y=metric.log_scale,
            layout=wr.Layout(x=8 * (number % 3), y=6 * (number // 3), w=8, h=6),
            **({"metric_regex": metric.pattern} if "*" in metric.name else {"y": [metric.name]}),
        )
        for number, metric in enumerate(drawn_metrics())
    ]


def _sweep(records: Sequence[RunRecord], stage: str) -> list[Any]:
    planned = [field for record in records for field in record.settings if field.startswith(f"{stage}.sweep.")]
    begun = axes([trial.trial for record in records for trial in record.sweep(stage)[0]])
    fields = list(dict.fromkeys([*(field.removeprefix(f"{stage}.sweep.") for field in planned), *begun]))
    columns = [
        wr.ParallelCoordinatesPlotColumn(
            wr.Config(f"trial.{field}"), display_name=field.replace("_", " "), log=field == "learning_rate"
        )
        for field in fields
    ]
    accuracy = wr.SummaryMetric("val/top1.max")
    return [
        wr.ParallelCoordinatesPlot(
            title="Sweep",
            columns=[*columns, wr.ParallelCoordinatesPlotColumn(accuracy, display_name="validation accuracy")],
            layout=wr.Layout(x=0, y=0, w=12, h=8),
        ),
        wr.LinePlot(
            title="Validation accuracy", x="trainer/epoch", y=["val/top1"], layout=wr.Layout(x=12, y=0, w=12, h=8)
        ),
    ]


def _results(comparison: Comparison) -> str:
    """The comparison of several chains, or the result table of one."""
    runs = comparison.runs
    return as_markdown(comparison) if len(runs) > 1 else markdown(["", runs[0].name], result_table(runs[0].record))


def _provenance(record: RunRecord) -> str:
    """As on the page, but for the command, whose paths and accounts are not to be published."""
    rows = [(name, f"`{value}`") for _, table in provenance(record) for name, value in table if name != LAUNCHED_BY]
    return markdown([record.name, ""], rows)
