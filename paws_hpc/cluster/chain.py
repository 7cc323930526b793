"""The chain: which stages a run has, what each consists of, and what ``chain.json`` says of them."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from paws_hpc.config import STAGES, Config
from paws_hpc.engine.finetune import Cell
from paws_hpc.files import read_json, write_json
from paws_hpc.stages.finetune import SWEEPS, sweep_config
from paws_hpc.stages.run_folder import RunFolder, is_done

_PACKAGES = ("torch", "torchvision", "numpy", "h5py", "hydra-core", "submitit", "wandb")


@dataclass(frozen=True)
class Job:
    """One thing to run: a stage, or one cell of a stage that is a sweep."""

    stage: str
    cell: Cell | None = None

    @property
    def name(self) -> str:
        """For people and logs."""
        return self.stage if self.cell is None else f"{self.stage}/{self.cell.name}"

    def is_done(self, run: RunFolder) -> bool:
        """Whether its result is in the run directory."""
        match self.stage:
            case "pretrain":
                return is_done(run.pretrain)
            case stage if stage in SWEEPS and self.cell is not None:
                return is_done(run.cell(stage, self.cell))
            case _:
                return False  # the others check for themselves what is there, in moments


def jobs_of(config: Config, stage: str) -> list[Job]:
    """The jobs of a stage: the cells of a sweep, otherwise one."""
    if stage in SWEEPS:
        return [Job(stage, cell) for cell in sweep_config(config, stage).cells()]
    return [Job(stage)]


class Chain:
    """``chain.json`` of one run."""

    def __init__(self, run: RunFolder, name: str) -> None:
        """Read it, or begin it."""
        self._path = run.chain
        if self._path.exists():
            self._value: dict[str, Any] = read_json(self._path)
            return
        self._value = {
            "name": name,
            "id": secrets.token_hex(4),  # makes W&B run ids unique, and the same across restarts
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"paws_hpc": version("paws-hpc"), "python": platform.python_version()}
            | {package: version(package) for package in _PACKAGES},
            "commit": _commit(),
            "host_cores": os.cpu_count(),
            "stages": [{"name": stage, "state": "pending", "seconds": None} for stage in STAGES],
        }
        write_json(self._path, self._value)

    def begin(self, stage: str) -> float:
        """Mark a stage as running; returns the time to hand to :meth:`end`."""
        self._entry(stage)["state"] = "running"
        write_json(self._path, self._value)
        return time.monotonic()

    def end(self, stage: str, began: float, *, state: str, worked: bool = True) -> None:
        """Mark a stage as ``done`` or ``failed``; its seconds add up over restarts.

        Args:
            stage: its name.
            began: from :meth:`begin`.
            state: ``done`` or ``failed``.
            worked: False for a stage that was done already, whose seconds stay as they are.
        """
        entry = self._entry(stage)
        entry["state"] = state
        if worked:
            entry["seconds"] = round((entry["seconds"] or 0.0) + time.monotonic() - began, 2)
        write_json(self._path, self._value)

    def _entry(self, stage: str) -> dict[str, Any]:
        entry: dict[str, Any] = next(entry for entry in self._value["stages"] if entry["name"] == stage)
        return entry


def _commit() -> str | None:
    """The commit of the code that runs, ``-dirty`` where files were changed since; None outside git or without it."""
    folder = Path(__file__).parent
    if shutil.which("git") is None:
        return None
    described = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None
