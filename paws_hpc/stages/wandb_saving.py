"""Saving a report in Weights & Biases, and keeping it where that is not possible.

    python -m paws_hpc.stages.wandb_saving ID RUN [RUN …]    started by :func:`save_wandb_report`

A process of its own talks to W&B, because what its package does with a server that takes a connection and never answers
cannot be ended in any other way.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paws_hpc.files import read_json, write_json
from paws_hpc.stages.comparison_page import comparison_folder
from paws_hpc.stages.report_run import read_run
from paws_hpc.stages.wandb_report import build

_NOT_ONLINE = ("offline", "disabled", "dryrun")


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
    if (mode := os.environ.get("WANDB_MODE")) in _NOT_ONLINE:
        return Saved(path, offline=f"WANDB_MODE={mode}")
    told = _in_its_own_process([kept["id"], *map(str, runs)], timeout_s)
    if "url" not in told:
        return Saved(path, fault=told.get("fault"), offline=told.get("offline"))
    write_json(path, kept | told)
    return Saved(path, url=told["url"])


def _in_its_own_process(arguments: list[str], timeout_s: float) -> dict[str, str]:
    """What the process said: ``id`` and ``url``, or ``fault``, or ``offline``."""
    with tempfile.TemporaryFile("w+") as complaints:  # no pipe: wandb's service would keep it open
        process = subprocess.Popen(
            [sys.executable, "-m", "paws_hpc.stages.wandb_saving", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return {"fault": f"no answer within {timeout_s:g} s; it may have been saved all the same"}
        finally:
            if process.returncode is None:  # also where a person gave up first
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode != 0:
            complaints.seek(0)
            last = complaints.read().strip().rpartition("\n")[2] or "without a word"
            return {"fault": f"its process ended with status {process.returncode}: {last}"}
    told: dict[str, str] = json.loads(said)
    return told


def main(arguments: Sequence[str]) -> dict[str, str]:
    """Save the report that has the id, or a new one if that is empty; returns what to tell."""
    import wandb  # noqa: PLC0415 - slow to import

    identifier, *runs = arguments
    records = [read_run(Path(run)) for run in runs]
    try:
        if not wandb.login(prompt=False, verify=False):
            return {"offline": "nobody is logged in: run `wandb login`"}
        entity = str(records[0].settings.get("tracking.entity") or "") or str(wandb.Api().default_entity)
        report = build(records, entity=entity)
        report.id = identifier
        report.save()
    except Exception as error:  # noqa: BLE001 - wandb raises anything; the report is in the file, and this is told
        return {"fault": f"{type(error).__name__}: {error}".strip()}
    return {"id": str(report.id), "url": str(report.url)}


if __name__ == "__main__":
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where wandb prints, and its service after it
    print(json.dumps(main(sys.argv[1:])), file=answer, flush=True)
    os._exit(0)  # wandb's own clean-up would wait for what has just failed
