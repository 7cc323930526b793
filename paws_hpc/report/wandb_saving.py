"""Saving a report in Weights & Biases, and keeping it where that is not possible.

    python -m paws_hpc.report.wandb_saving ID RUN [RUN …]    started by :func:`save_wandb_report`

A process of its own talks to W&B (paws_hpc/stages/wandb_asking.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paws_hpc.files import read_json, write_json
from paws_hpc.report.comparison_page import comparison_folder
from paws_hpc.report.run_record import read_run
from paws_hpc.report.wandb_report import build
from paws_hpc.stages.wandb_asking import NOT_ONLINE, answer, ask, why_not


@dataclass(frozen=True)
class Saved:
    """Where a report is.

    Attributes:
        spec: the file that holds it in any case.
        url: in Weights & Biases; None if it could not be saved there.
        fault: why not; None if it was, or if nobody asked for that.
        offline: why nobody asked W&B; None if somebody did.
    """

    spec: Path
    url: str | None = None
    fault: str | None = None
    offline: str | None = None


def save_wandb_report(runs: Sequence[Path], folder: Path | None = None, *, timeout_s: float) -> Saved:
    """Build a report of run directories, write its spec, and save it in Weights & Biases if possible.

    Saved again it is the same report with new content.

    Args:
        runs: the first says in which project.
        folder: for ``wandb.json``, the spec; without it a run's goes to ``report/`` in the run, and that of several
            to the folder of their comparison.
        timeout_s: after which an attempt to save it is given up; seconds.

    Raises:
        FileNotFoundError: a run has no folder.
        ValueError: wandb-workspaces is not installed, two runs have one name, or a file of a run is garbled.
    """
    report = build([read_run(run) for run in runs])
    spec = report._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    path = (folder or (runs[0] / "report" if len(runs) == 1 else comparison_folder(runs))) / "wandb.json"
    kept = {"id": "", "url": None} | (read_json(path) if path.exists() else {}) | {"spec": spec}
    write_json(path, kept)  # before anything that may fail
    if (mode := os.environ.get("WANDB_MODE")) in NOT_ONLINE:
        return Saved(path, offline=f"WANDB_MODE={mode}")
    try:
        told = ask("paws_hpc.report.wandb_saving", [kept["id"], *map(str, runs)], timeout_s=timeout_s)
    except TimeoutError as error:
        return Saved(path, fault=f"{error}; it may have been saved all the same")
    if "url" not in told:
        return Saved(path, fault=told.get("fault"), offline=told.get("offline"))
    write_json(path, kept | told)
    return Saved(path, url=told["url"])


def main(arguments: Sequence[str]) -> dict[str, str]:
    """Save the report that has the id, or a new one if that is empty; returns what to tell."""
    import wandb  # noqa: PLC0415 - slow to import

    identifier, *runs = arguments
    records = [read_run(Path(run)) for run in runs]
    if offline := why_not():
        return {"offline": offline}
    entity = str(records[0].settings.get("tracking.entity") or "") or str(wandb.Api().default_entity)
    report = build(records, entity=entity)
    report.id = identifier
    report.save()
    return {"id": str(report.id), "url": str(report.url)}


if __name__ == "__main__":
    answer(main)
