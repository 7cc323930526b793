"""Saving a report in Weights & Biases, and keeping it where that is not possible.

    python -m paws_hpc.report.wandb_saving ANSWER ID RUN [RUN …]    started by :func:`save_wandb_report`

Only a process of its own can be ended when a server takes a connection and never answers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paws_hpc.files import read_json, write_json
from paws_hpc.report.comparison_page import comparison_folder
from paws_hpc.report.run_record import read_run
from paws_hpc.report.wandb_report import build

_NOT_ONLINE = ("offline", "disabled", "dryrun")


@dataclass(frozen=True)
class Saved:
    """Where a report is.

    Attributes:
        spec: the file that holds it in any case.
        url: in Weights & Biases; None if it could not be saved there.
        fault: why not; None if it was, or if it was not tried.
        offline: why it was not tried; None if it was.
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
    if (mode := os.environ.get("WANDB_MODE")) in _NOT_ONLINE:
        return Saved(path, offline=f"WANDB_MODE={mode}")
    with tempfile.TemporaryDirectory() as temporary:
        answer = Path(temporary) / "answer.json"
        command = [sys.executable, "-m", "paws_hpc.report.wandb_saving", str(answer), kept["id"], *map(str, runs)]
        try:
            quiet = subprocess.DEVNULL  # wandb's service would keep a pipe open
            status = subprocess.run(
                command, stdin=quiet, stdout=quiet, stderr=quiet, timeout=timeout_s, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return Saved(path, fault=f"no answer within {timeout_s:g} s; it may have been saved all the same")
        if not answer.exists():
            return Saved(path, fault=f"its process ended with status {status}")
        answered = read_json(answer)
    if "url" in answered:
        write_json(path, kept | answered)
    return Saved(path, **{name: value for name, value in answered.items() if name != "id"})


def _save(identifier: str, runs: Sequence[str]) -> dict[str, str]:
    """Save the report that has the id, or a new one if that is empty; returns fields of :class:`Saved`, and its id."""
    import wandb  # noqa: PLC0415 - slow to import

    records = [read_run(Path(run)) for run in runs]
    if (mode := wandb.setup().settings.mode) in _NOT_ONLINE:
        return {"offline": f"W&B's settings say mode={mode}"}  # with which login() finds no key either
    if not wandb.login(prompt=False, verify=False):
        return {"offline": "nobody is logged in: run `wandb login`"}
    entity = str(records[0].settings.get("tracking.entity") or "") or str(wandb.Api().default_entity)
    report = build(records, entity=entity)
    report.id = identifier
    report.save()
    return {"id": str(report.id), "url": str(report.url)}


if __name__ == "__main__":
    try:
        told = _save(sys.argv[2], sys.argv[3:])
    except Exception as error:  # noqa: BLE001 - wandb raises anything, and the answer says what
        told = {"fault": f"{type(error).__name__}: {error}".strip()}
    write_json(Path(sys.argv[1]), told)
    os._exit(0)  # wandb's own clean-up would wait for what has just failed
