"""A Weights & Biases report of one or several chains: curves, the sweep, results, method and provenance.

It needs wandb-workspaces. Where there is no account, or no connection, the report's spec goes into the run directory;
the same command saves it later.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from paws_hpc.files import read_json, write_json
from paws_hpc.stages.report_run import RunRecord, read_run
from paws_hpc.stages.report_tables import DASH, flatten, table_rows

_CURVES = (  # title, axis, metrics, over the whole width
    ("Loss", "trainer/step", ("loss/total",)),
    ("Consistency (cross-entropy between views)", "trainer/step", ("loss/consistency",)),
    ("Mean entropy maximisation", "trainer/step", ("loss/me_max",)),
    ("Supervised NCE of the warm-up", "trainer/step", ("loss/support_nce",)),
    ("PAWS-NN on the validation split", "trainer/epoch", ("validation/paws_nn",)),
    ("Confidence of predictions", "trainer/epoch", ("diagnostics/confidence",)),
    ("Learning rate", "trainer/step", ("optimizer/lr",)),
    ("Gradient norm", "trainer/step", ("gradient/norm",)),
    ("Throughput (images/s)", "trainer/step", ("throughput/images_per_s",)),
)
_METHOD = (
    "PAWS (Assran et al., 2021) trains an encoder so that two views of an unlabelled image get the same soft class "
    "from its similarity to a few labelled images. **PAWS-NN** classifies with these similarities alone; "
    "**fine-tuned** adds a linear layer and trains everything on the labels, for every cell of the sweep; the cell "
    "with the best accuracy on the local validation split is scored on the test split, once. The **baseline** is the "
    "same sweep from random weights."
)


@dataclass(frozen=True)
class Saved:
    """Where a report is.

    Attributes:
        spec: file in the first run's directory that holds it.
        url: in Weights & Biases; None if it could not be saved there.
        fault: why not.
    """

    spec: Path
    url: str | None
    fault: str | None


def save_wandb_report(runs: Sequence[Path]) -> Saved:
    """Build a report of run directories, the first of which names it, and save it in Weights & Biases if possible.

    Saved again it is the same report with new content. Its spec is written to ``report/wandb.json`` in any case.

    Raises:
        FileNotFoundError: a run has no folder.
        ValueError: wandb-workspaces is not installed, or a file of a run is garbled; it is named.
    """
    try:
        import wandb_workspaces.reports.v2 as wr  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise ValueError(
            "A Weights & Biases report needs the package wandb-workspaces: pip install 'paws-hpc[report]', or "
            "pip install wandb-workspaces."
        ) from error
    records = [read_run(run) for run in runs]
    tracking = _config(records[0]).get("tracking") or {}
    project, entity = str(tracking.get("project") or "paws"), str(tracking.get("entity") or "")
    path = runs[0] / "report" / "wandb.json"
    known = read_json(path) if path.exists() else {}
    report = wr.Report(project=project, entity="", title=_title(records), blocks=_blocks(records, project, ""))
    spec = report._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    url, fault = None, None
    try:
        report.id, url = _save(records, project, entity, known.get("id", ""))
    except Exception as error:  # noqa: BLE001 - wandb raises anything; the report is in the file, and this is told
        fault = f"{type(error).__name__}: {error}".strip()
    write_json(path, {"id": report.id or known.get("id", ""), "url": url or known.get("url"), "spec": spec})
    return Saved(path, url, fault)


def _save(records: list[RunRecord], project: str, entity: str, identifier: str) -> tuple[str, str]:
    """Save in Weights & Biases; returns id and address.

    Raises:
        Exception: as wandb raises, where nobody is logged in or nobody answers.
    """
    import wandb  # noqa: PLC0415 - as above
    import wandb_workspaces.reports.v2 as wr  # noqa: PLC0415 - as above

    if os.environ.get("WANDB_MODE") == "offline":
        raise ConnectionError("WANDB_MODE=offline")
    if not wandb.login(prompt=False, verify=False):
        raise ConnectionError("nobody is logged in: run `wandb login`")
    entity = entity or str(wandb.Api().default_entity)
    report = wr.Report(project=project, entity=entity, title=_title(records), blocks=_blocks(records, project, entity))
    report.id = identifier
    report.save()
    return str(report.id), str(report.url)


def _title(records: list[RunRecord]) -> str:
    names = ", ".join(record.name for record in records)
    return f"PAWS: {names}"[:128]


def _blocks(records: list[RunRecord], project: str, entity: str) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr  # noqa: PLC0415 - as above

    chains = [str(record.chain.get("id")) for record in records]

    def runs_of(stage: str, name: str) -> Any:
        chosen = f"Config('chain') in {chains} and JobType = '{stage}'"
        return wr.Runset(entity=entity, project=project, name=name, filters=chosen)

    return [
        wr.MarkdownBlock(_results(records)),
        wr.H2("Pre-training"),
        wr.PanelGrid(runsets=[runs_of("pretrain", "pre-training")], panels=_curves()),
        wr.H2("Sweep"),
        wr.MarkdownBlock("\n\n".join(_heat_map(record) for record in records)),
        wr.PanelGrid(runsets=[runs_of("finetune", "fine-tuning")], panels=_sweep()),
        wr.H2("Comparison of runs"),
        wr.PanelGrid(runsets=[runs_of("pretrain", "pre-training")], panels=[wr.RunComparer(diff_only="split")]),
        wr.H2("Method and provenance"),
        wr.MarkdownBlock("\n\n".join([_METHOD, *map(_provenance, records)])),
    ]


def _curves() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr  # noqa: PLC0415 - as above

    return [
        wr.LinePlot(
            title=title,
            x=axis,
            y=list(metrics),
            layout=wr.Layout(x=8 * (number % 3), y=6 * (number // 3), w=8, h=6),
        )
        for number, (title, axis, metrics) in enumerate(_CURVES)
    ]


def _sweep() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr  # noqa: PLC0415 - as above

    rate, epochs = wr.Config("cell.learning_rate"), wr.Config("cell.epochs")
    accuracy = wr.SummaryMetric("validation_accuracy.max")
    return [
        wr.ParallelCoordinatesPlot(
            title="Sweep",
            columns=[
                wr.ParallelCoordinatesPlotColumn(rate, display_name="learning rate", log=True),
                wr.ParallelCoordinatesPlotColumn(epochs, display_name="epochs"),
                wr.ParallelCoordinatesPlotColumn(accuracy, display_name="validation accuracy"),
            ],
            layout=wr.Layout(x=0, y=0, w=12, h=8),
        ),
        wr.ScatterPlot(
            title="Validation accuracy by learning rate and epochs",
            x=rate,
            y=epochs,
            z=accuracy,
            log_x=True,
            gradient=[wr.GradientPoint(color="#440154", offset=0), wr.GradientPoint(color="#fde725", offset=100)],
            layout=wr.Layout(x=12, y=0, w=12, h=8),
        ),
        wr.LinePlot(
            title="Validation accuracy",
            x="trainer/epoch",
            y=["validation_accuracy"],
            layout=wr.Layout(x=0, y=8, w=24, h=8),
        ),
    ]


def _results(records: list[RunRecord]) -> str:
    """The result tables side by side."""
    columns = [dict(table_rows(record)) for record in records]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, DASH) for column in columns)] for name in names]
    return _table(["", *(record.name for record in records)], rows)


def _heat_map(record: RunRecord) -> str:
    """The sweep as a table, shaded by accuracy as far as Markdown can."""
    shades = " ░▒▓█"
    values = [cell.validation_accuracy for cell in record.finetune if cell.validation_accuracy is not None]
    if not values:
        return f"**{record.name}**: no cell of the sweep has a result yet."
    low, span = min(values), (max(values) - min(values)) or 1.0
    by_setting = {(cell.learning_rate, cell.epochs): cell.validation_accuracy for cell in record.finetune}
    rates, lengths = sorted({rate for rate, _ in by_setting}), sorted({epochs for _, epochs in by_setting})

    def shown(accuracy: float | None) -> str:
        return DASH if accuracy is None else f"{shades[round(4 * (accuracy - low) / span)]} {100 * accuracy:.1f} %"

    rows = [[f"{epochs} epochs", *(shown(by_setting.get((rate, epochs))) for rate in rates)] for epochs in lengths]
    return f"**{record.name}**\n\n" + _table(["validation accuracy", *(f"lr {rate:g}" for rate in rates)], rows)


def _provenance(record: RunRecord) -> str:
    chain = record.chain
    told = [
        ("created", str(chain.get("created", "unknown"))),
        ("commit", str(chain.get("commit") or "unknown")),
        ("seed", str(_config(record).get("seed", "unknown"))),
        *flatten(chain.get("versions", {})),
        *flatten(record.result.get("digests", record.summary.get("digests", {}))),
    ]
    return _table([record.name, ""], [[name, f"`{value}`"] for name, value in told])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _config(record: RunRecord) -> dict[str, Any]:
    """The frozen config as plain values; empty where there is none."""
    value = yaml.safe_load(record.config) if record.config else None
    return value if isinstance(value, dict) else {}
