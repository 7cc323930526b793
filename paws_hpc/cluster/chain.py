"""The chain: which jobs a run has, which wait for which, and what ``chain.json`` says of them."""

from __future__ import annotations

import os
import platform
import secrets
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from paws_hpc.config import Config, sweep_config
from paws_hpc.files import read_json, write_json
from paws_hpc.provenance import commit
from paws_hpc.stage_table import STAGES
from paws_hpc.stages.attempts import now
from paws_hpc.stages.prepare import changed_images
from paws_hpc.stages.run_folder import RunFolder
from paws_hpc.store.format import MANIFEST_NAME
from paws_hpc.trial import Trial

_PACKAGES = ("torch", "torchvision", "numpy", "h5py", "hydra-core", "submitit", "wandb")


@dataclass(frozen=True)
class Job:
    """One thing to run: a stage, or one trial of a stage that is a sweep."""

    stage: str
    trial: Trial | None = None

    @property
    def name(self) -> str:
        """For people and logs, and of its folder under ``jobs/``."""
        return self.stage if self.trial is None else f"{self.stage}/{self.trial.name}"

    def folder(self, run: RunFolder) -> Path:
        """Where the stage writes, with ``DONE`` as the last thing."""
        return run.path / self.stage if self.trial is None else run.trial(self.stage, self.trial)

    def is_done(self, config: Config, run: RunFolder) -> bool:
        """Whether its result is in the run directory."""
        stores = config.data.stores.values()
        if self.stage == "prepare" and not all((Path(store) / MANIFEST_NAME).exists() for store in stores):
            return False
        return run.marker(self.name).exists() and not (self.stage == "prepare" and changed_images(config, run))

    def progress(self, run: RunFolder) -> int:
        """Training steps of its newest checkpoint, 0 where there is none."""
        saved = (self.folder(run) / "checkpoints").glob("step-*.json")  # written after the weights
        return max((int(path.stem.removeprefix("step-")) for path in saved), default=0)


def job_called(name: str) -> Job:
    """The job of a name, such as ``pretrain`` or ``finetune/lr=0.05,epochs=30``."""
    stage, _, trial = name.partition("/")
    return Job(stage, Trial.parse(trial) if trial else None)


def jobs_of(config: Config, stage: str) -> list[Job]:
    """The jobs of a stage: the trials of a sweep, otherwise one."""
    if STAGES[stage].sweep:
        return [Job(stage, trial) for trial in sweep_config(config, stage).trials()]
    return [Job(stage)]


class Chain:
    """``chain.json`` of one run; only the launcher writes it."""

    def __init__(self, run: RunFolder) -> None:
        """Read it.

        Raises:
            FileNotFoundError: nobody has begun it.
        """
        self._path = run.chain
        self._value: dict[str, Any] = read_json(self._path)

    @classmethod
    def begin(cls, run: RunFolder, name: str) -> Chain:
        """Read it, or write the first one."""
        if not run.chain.exists():
            value: dict[str, Any] = {
                "name": name,
                "id": secrets.token_hex(4),  # makes W&B run ids unique, and the same across restarts
                "created": now(),
                "versions": {"paws_hpc": version("paws-hpc"), "python": platform.python_version()}
                | {package: version(package) for package in _PACKAGES},
                "commit": commit(),
                "host_cores": os.cpu_count(),
                "submissions": [],
            }
            write_json(run.chain, value)
        return cls(run)

    @property
    def id(self) -> str:
        """Eight hexadecimal digits, unique to the run."""
        return str(self._value["id"])

    @property
    def submissions(self) -> list[dict[str, Any]]:
        """What was submitted to a scheduler, oldest first."""
        return list(self._value["submissions"])

    def add_submission(self, submission: dict[str, Any]) -> None:
        """Remember jobs that were submitted together."""
        self._value["submissions"] = [*self.submissions, submission]
        self._value.pop("cancelled", None)
        write_json(self._path, self._value)

    def mark_cancelled(self) -> None:
        """Remember that a person ended this chain."""
        write_json(self._path, self._value | {"cancelled": now()})

    def job_ids(self) -> dict[str, str]:
        """Job name → the id under which it was last submitted."""
        return {job["job"]: job["job_id"] for submission in self.submissions for job in submission["jobs"]}

    def job_name(self, job_id: str) -> str:
        """The job that was submitted under an id.

        Raises:
            ValueError: none was.
        """
        for submission in self.submissions:
            for job in submission["jobs"]:
                if job["job_id"] == job_id:
                    return str(job["job"])
        raise ValueError(f"{self._path} knows no job {job_id}.")
