"""What a launch has to submit, and what each job waits for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from paws_hpc.cluster.chain import Job, jobs_of
from paws_hpc.cluster.frozen import ConfigError
from paws_hpc.cluster.scheduler import QueuedJob
from paws_hpc.config import Config
from paws_hpc.stage_table import STAGES
from paws_hpc.stages.run_folder import RunFolder, check_sweep_is_the_scored_one, without_pretraining


@dataclass(frozen=True)
class ToSubmit:
    """Jobs of one stage that are to be submitted together: as one job, or as one array.

    Attributes:
        stage: their stage.
        jobs: at least one.
        replaces: ids of jobs in the queue that wait for the wrong ones, and are cancelled.
    """

    stage: str
    jobs: list[Job]
    replaces: list[str]


def to_submit(config: Config, run: RunFolder, active: Mapping[str, QueuedJob]) -> list[ToSubmit]:
    """What is neither done nor in the queue, and what waits in the queue but now has more to wait for.

    Args:
        config: of the run.
        run: its directory.
        active: jobs of this chain that run or wait, by name.

    Raises:
        ConfigError: a stage is asked for whose needs are neither met nor about to be.
        ValueError: selection is over, and was made among other trials than the sweep now has.
    """
    selected = "selection" in config.stages and run.result.exists()
    if selected:
        check_sweep_is_the_scored_one(config, run)
    found: dict[str, ToSubmit] = {}
    for stage in (stage for stage in STAGES if stage in config.stages):
        row = STAGES[stage]
        if row.sweep and selected:
            continue  # a trial that failed comes too late: the test split is scored once
        renewed = any(parent in found for parent in (*row.needs, *row.follows))
        jobs = [job for job in jobs_of(config, stage) if not job.is_done(config, run) or (row.refreshed and renewed)]
        missing = [job for job in jobs if job.name not in active]
        waiting = [job for job in jobs if job.name in active and active[job.name].state == "PENDING"]
        if not renewed:
            waiting = []
        if missing or waiting:
            _check_needs(config, run, stage, met={*found, *active})
            found[stage] = ToSubmit(stage, [*missing, *waiting], [active[job.name].job_id for job in waiting])
    return list(found.values())


def _check_needs(config: Config, run: RunFolder, stage: str, *, met: set[str]) -> None:
    for need in STAGES[stage].needs:
        if need == "pretrain" and without_pretraining(config, run):
            continue
        if need not in met and not Job(need).is_done(config, run):
            raise ConfigError(
                f"stages={config.stages}: {stage} needs {need}, which has not been done in {run.path} and is not asked "
                f"for. Add {need} to stages."
            )


def dependency(stage: str, ids: Mapping[str, set[str]]) -> str | None:
    """What ``--dependency`` says for a stage.

    Args:
        stage: that waits.
        ids: by stage, the ids of jobs and arrays that run or wait; finished ones are left out, for Slurm forgets them
            and then refuses.
    """
    parts = []
    for kind, parents in (("afterok", STAGES[stage].needs), ("afterany", STAGES[stage].follows)):
        if known := sorted({job_id for parent in parents for job_id in ids.get(parent, ())}):
            parts.append(":".join([kind, *known]))
    return ",".join(parts) or None
