"""The chain on this machine: stage after stage, in this process or as processes of submitit's local executor."""

from __future__ import annotations

import sys
from collections.abc import Callable

import submitit

from paws_hpc.cluster.bootstrap import run_job_as_local_rank
from paws_hpc.cluster.chain import Chain, Job, jobs_of
from paws_hpc.config import Config
from paws_hpc.stage_table import STAGES
from paws_hpc.stages.attempts import stage_state
from paws_hpc.stages.run_folder import RunFolder

Runner = Callable[[Job], None]


def run_chain(config: Config, run: RunFolder, runner: Runner) -> list[str]:
    """Run the config's stages in order; returns the names of the jobs that were not done.

    ``runner`` runs one job and raises if it fails.
    """
    Chain.begin(run, config.name)
    worked: list[str] = []
    for stage in (stage for stage in STAGES.values() if stage.name in config.stages):
        jobs = jobs_of(config, stage.name)
        for job in jobs:
            stale = stage.refreshed and (worked or stage_state(run.path / "jobs", job.name)[0] != "done")
            if stale or not job.is_done(config, run):
                runner(job)
                worked.append(job.name)
    return worked


def submitit_local(config: Config, run: RunFolder) -> Runner:
    """Run each job as as many processes as ``resources.<stage>`` has ranks on this machine and wait for it."""

    def runner(job: Job) -> None:
        logs, ranks = run.logs(job.stage), config.resources[job.stage].ranks
        executor = submitit.LocalExecutor(folder=logs)
        a_year_min = 365 * 24 * 60  # submitit ends a job after its time; here the user's shell decides
        executor.update_parameters(tasks_per_node=ranks, timeout_min=a_year_min, signal_delay_s=30)
        submitted = executor.submit(run_job_as_local_rank, run.path.resolve(), job)
        print(f"{job.name}: {ranks} rank{'s' if ranks > 1 else ''}, logs in {logs}", file=sys.stderr, flush=True)
        try:
            submitted.results()
        finally:  # an interrupted launch leaves no process behind; of a finished job nothing is left to cancel
            submitted.cancel(check=False)

    return runner
