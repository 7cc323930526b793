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
from pathlib import Path

from paws_hpc.files import read_json, write_json
from paws_hpc.report.comparison_page import comparison_folder
from paws_hpc.report.run_record import read_runs

_NOT_ONLINE = ("offline", "disabled", "dryrun")


def save_wandb_report(runs: Sequence[Path], folder: Path | None = None, *, timeout_s: float) -> str:
    """Build a report of run directories, write its spec, and save it in Weights & Biases if possible.

    Saved again it is the same report with new content. The spec is ``wandb.json`` in ``folder``; without one in
    ``report/`` of the only run, or in the folder of the runs' comparison.

    Returns:
        A sentence that says where the report is; W&B may be offline.

    Raises:
        ValueError: wandb-workspaces is not installed, two runs have one name, or a file of a run is garbled.
        OSError: a run has no folder, or W&B did not save it within ``timeout_s``.
    """
    try:
        from paws_hpc.report.wandb_report import build  # noqa: PLC0415 - needs an extra that is slow to import
    except ImportError as error:
        raise ValueError(
            "A Weights & Biases report needs the package wandb-workspaces: pip install 'paws-hpc[report]', or "
            "pip install wandb-workspaces."
        ) from error
    report = build(read_runs(runs))
    spec = report._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    path = (folder or (runs[0] / "report" if len(runs) == 1 else comparison_folder(runs))) / "wandb.json"
    kept = {"id": "", "url": None} | (read_json(path) if path.exists() else {}) | {"spec": spec}
    write_json(path, kept)  # before anything that may fail
    mode = os.environ.get("WANDB_MODE")
    answer = {"offline": f"WANDB_MODE={mode}"} if mode in _NOT_ONLINE else _saved_by_child(kept["id"], runs, timeout_s)
    if "url" in answer:
        write_json(path, kept | answer)
        return f"Report: {answer['url']}"
    reason = answer.get("offline") or answer["fault"]
    text = f"Report not saved in Weights & Biases ({reason}). Its spec is in {path}; the same command saves it where "
    text += "there is a connection."
    if "fault" in answer:
        raise OSError(text)
    return text


def _saved_by_child(identifier: str, runs: Sequence[Path], timeout_s: float) -> dict[str, str]:
    """What :func:`_save` returns, run in a process of its own, or a ``fault``."""
    with tempfile.TemporaryDirectory() as temporary:
        answer = Path(temporary) / "answer.json"
        command = [sys.executable, "-m", "paws_hpc.report.wandb_saving", str(answer), identifier, *map(str, runs)]
        try:
            quiet = subprocess.DEVNULL  # wandb's service would keep a pipe open
            status = subprocess.run(
                command, stdin=quiet, stdout=quiet, stderr=quiet, timeout=timeout_s, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return {"fault": f"no answer within {timeout_s:g} s; it may have been saved all the same"}
        if not answer.exists():
            return {"fault": f"its process ended with status {status}"}
        fields: dict[str, str] = read_json(answer)
        return fields


def _save(identifier: str, runs: Sequence[str]) -> dict[str, str]:
    """Save the report that has the id, or a new one if it is empty; returns ``id`` and ``url``, or why ``offline``."""
    import wandb  # noqa: PLC0415 - slow to import

    from paws_hpc.report.wandb_report import build  # noqa: PLC0415 - as above

    records = read_runs([Path(run) for run in runs])
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
        answer = _save(sys.argv[2], sys.argv[3:])
    except Exception as error:  # noqa: BLE001 - wandb raises anything, and the answer names the fault
        answer = {"fault": f"{type(error).__name__}: {error}".strip()}
    write_json(Path(sys.argv[1]), answer)
    os._exit(0)  # wandb's own clean-up would wait for what has just failed
