"""The chain: which jobs a run has, which wait for which, and what ``chain.json`` says of them."""

from __future__ import annotations

import os
import platform
import secrets
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from paws_hpc import __version__
from paws_hpc.cluster.frozen import ConfigError, check_frozen, read_config
from paws_hpc.cluster.scheduler import QueuedJob
from paws_hpc.command import program
from paws_hpc.config import Config, sweep_config
from paws_hpc.files import read_json, write_record
from paws_hpc.provenance import commit, processor
from paws_hpc.stage_table import STAGES
from paws_hpc.stages.attempts import now
from paws_hpc.stages.prepare import changed_images, check_images
from paws_hpc.stages.run_folder import (
    RunFolder,
    check_sweep_is_the_scored_one,
    has_trained,
    original_of,
    without_pretraining,
)
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
        """Training steps of its newest checkpoint, and of each fold's; 0 where there is none."""
        newest: dict[Path, int] = {}
        for path in self.folder(run).glob("**/step-*.json"):  # written after the weights
            newest[path.parent] = max(newest.get(path.parent, 0), int(path.stem.removeprefix("step-")))
        return sum(newest.values())


def job_called(name: str) -> Job:
    """The job of a name, such as ``pretrain`` or ``finetune/lr=0.05,epochs=30``."""
    stage, _, trial = name.partition("/")
    return Job(stage, Trial.parse(trial) if trial else None)


def jobs_of(config: Config, stage: str) -> list[Job]:
    """The jobs of a stage: the trials of a sweep, otherwise one."""
    if STAGES[stage].sweep:
        return [Job(stage, trial) for trial in sweep_config(config, stage).trials()]
    return [Job(stage)]


def check_begun(config: Config, run: RunFolder, *, in_queue: bool = False) -> None:
    """Check a launch against how its run was begun, which binds once it trained, or while its jobs are in the queue.

    Raises:
        ConfigError: other fields differ, or the folder is a copy of another run's.
        ValueError: the run trained on other images.
    """
    chain = run.describe()
    named = chain.get("name", config.name)
    original = named if named != config.name else original_of(run.path, chain)
    if original is not None:
        raise ConfigError(
            f"{run.path} is a copy of the run {original}, whose jobs on Slurm and runs in W&B are not its own. Make it "
            f"a run first: `{program('runs')} rename {run.path} {config.name}`."
        )
    trained = has_trained(run)
    if not (in_queue or trained):
        return
    try:
        check_frozen(config, run.config)
    except ConfigError as error:
        if trained:
            raise
        end = "Or end its jobs on Slurm first, if any are left: hydra/launcher=submitit_slurm cancel=true."
        raise ConfigError(f"{error} {end}") from error
    check_images(config, run, read_config(run.config).data if run.config.exists() else None)


def forget_untrained(config: Config, run: RunFolder) -> None:
    """Remove what a launch with other settings froze and prepared, if it trained nothing; its logs stay."""
    if has_trained(run):
        return
    try:
        check_frozen(config, run.config)
    except ConfigError:
        for name, stage in STAGES.items():
            if name == "prepare" or stage.trains:  # rows of steps that no checkpoint has, pictures of other crops
                shutil.rmtree(run.path / name, ignore_errors=True)
        run.config.unlink()


class Chain:
    """``chain.json`` of one run; only the launcher writes it.

    Attributes:
        id: eight hexadecimal digits, unique to the run.
        submissions: to a scheduler, oldest first.
    """

    def __init__(self, run: RunFolder) -> None:
        """Read it.

        Raises:
            FileNotFoundError: nobody has begun it.
        """
        self._path = run.chain
        self._value: dict[str, Any] = read_json(self._path)
        self.id: str = self._value["id"]
        self.submissions: list[dict[str, Any]] = self._value["submissions"]

    @classmethod
    def begin(cls, run: RunFolder, name: str) -> Chain:
        """Read it, or write the first one; ``folder`` in it is where the run is, by which a copy is told."""
        folder = str(run.path.resolve())
        if not run.chain.exists():
            versions = {"paws_hpc": __version__, "python": platform.python_version()}
            value: dict[str, Any] = {
                "name": name,
                "folder": folder,
                "id": secrets.token_hex(4),  # makes W&B run ids unique, and the same across restarts
                "created": now(),
                "versions": versions | {package: version(package) for package in _PACKAGES},
                "commit": commit(),
                "command": shlex.join([*program("launch").split(), *sys.argv[1:]]),
                "host_cores": os.cpu_count(),
                "processor": processor(),
                "submissions": [],
            }
            write_record(run.chain, value)
        chain = cls(run)
        if chain._value.get("folder") != folder:  # it was moved
            chain._value["folder"] = folder
            write_record(chain._path, chain._value)
        return chain

    @property
    def is_submitted(self) -> bool:
        """Whether jobs of it may be in a scheduler's queue: some were submitted, and nobody cancelled them since."""
        return bool(self.submissions) and "cancelled" not in self._value

    def add_submission(self, submission: dict[str, Any]) -> None:
        """Remember jobs that were submitted together."""
        self.submissions.append(submission)
        self._value.pop("cancelled", None)
        write_record(self._path, self._value)

    def mark_cancelled(self) -> None:
        """Remember that a person ended this chain."""
        write_record(self._path, self._value | {"cancelled": now()})

    def rename(self, name: str, *, copied: bool) -> None:
        """Take another name; a copy of a run also gets an id of its own, and none of the original's jobs."""
        if copied:
            self._value.pop("cancelled", None)
            self._value |= {"id": secrets.token_hex(4), "submissions": []}
        folder = self._path.parent.resolve().with_name(name)
        write_record(self._path, self._value | {"name": name, "folder": str(folder)})

    def job_ids(self) -> dict[str, str]:
        """Job name → the id under which it was last submitted."""
        return {job["job"]: job["job_id"] for submission in self.submissions for job in submission["jobs"]}

    def job_name(self, job_id: str) -> str:
        """The job that was submitted under an id.

        Raises:
            ValueError: none was.
        """
        jobs = (job for submission in self.submissions for job in submission["jobs"] if job["job_id"] == job_id)
        if (found := next(jobs, None)) is None:
            raise ValueError(f"{self._path} knows no job {job_id}.")
        return str(found["job"])


@dataclass(frozen=True)
class ToSubmit:
    """Jobs of one stage that are to be submitted together: as one job, or as one array.

    ``replaces`` are the ids of jobs in the queue that wait for the wrong ones, and are cancelled.
    """

    stage: str
    jobs: list[Job]
    replaces: list[str]


def to_submit(config: Config, run: RunFolder, active: Mapping[str, QueuedJob]) -> list[ToSubmit]:
    """What is neither done nor in the queue, and what waits in the queue but now has more to wait for.

    ``active`` are the jobs of this chain that run or wait, by name.

    Raises:
        ConfigError: a stage is to run whose needs are neither met nor about to be.
        ValueError: selection is over, and was made among other trials than the sweep now has.
    """
    selected = "selection" in config.stages and run.result.exists()
    if selected:
        check_sweep_is_the_scored_one(config, run)
    planned: dict[str, ToSubmit] = {}
    for stage in (stage for stage in STAGES if stage in config.stages):
        row = STAGES[stage]
        if row.sweep and selected:
            continue  # a trial that failed comes too late: the test split is scored once
        renewed = any(parent in planned for parent in (*row.needs, *row.follows))
        jobs = [job for job in jobs_of(config, stage) if not job.is_done(config, run) or (row.refreshed and renewed)]
        missing = [job for job in jobs if job.name not in active]
        waiting = [job for job in jobs if job.name in active and active[job.name].state == "PENDING"]
        if not renewed:
            waiting = []
        if missing or waiting:
            _check_needs(config, run, stage, met={*planned, *active})
            planned[stage] = ToSubmit(stage, [*missing, *waiting], [active[job.name].job_id for job in waiting])
    return list(planned.values())


def _check_needs(config: Config, run: RunFolder, stage: str, *, met: set[str]) -> None:
    for need in STAGES[stage].needs:
        if need == "pretrain" and without_pretraining(config, run):
            continue
        if need not in met and not Job(need).is_done(config, run):
            raise ConfigError(
                f"stages={config.stages}: {stage} needs {need}, which has not been done in {run.path}. Add "
                f"{need} to stages."
            )


def dependency(stage: str, ids: Mapping[str, set[str]]) -> str | None:
    """What ``--dependency`` says for a stage.

    ``ids`` are, by stage, those of jobs and arrays that run or wait; Slurm would refuse finished ones that it forgot.
    """
    conditions = []
    for kind, parents in (("afterok", STAGES[stage].needs), ("afterany", STAGES[stage].follows)):
        if known := sorted({job_id for parent in parents for job_id in ids.get(parent, ())}):
            conditions.append(":".join([kind, *known]))
    return ",".join(conditions) or None
