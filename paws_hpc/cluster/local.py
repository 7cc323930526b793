"""The chain on this machine: stage after stage, in this process or as processes of submitit's local executor."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import submitit

from paws_hpc.cluster import shield
from paws_hpc.cluster.bootstrap import run_job_as_local_rank, stop_requests
from paws_hpc.cluster.chain import Chain, Job, jobs_of
from paws_hpc.config import Config
from paws_hpc.progress import Progress
from paws_hpc.stage_table import STAGES
from paws_hpc.stages.attempts import stage_state
from paws_hpc.stages.run_folder import RunFolder

_LOOK_EVERY_S = 0.5

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
    python = shlex.quote(sys.executable)
    shielded = f"{python} -I -S {shlex.quote(str(Path(shield.__file__).resolve()))} {python}"

    def runner(job: Job) -> None:
        """Raises KeyboardInterrupt if a person ended the job; its text says what is saved."""
        logs, ranks = run.logs(job.stage), config.resources[job.stage].ranks
        executor = submitit.LocalExecutor(folder=logs, python=shielded)
        a_year_min = 365 * 24 * 60  # submitit ends a job after its time; here the user's shell decides
        executor.update_parameters(tasks_per_node=ranks, timeout_min=a_year_min, signal_delay_s=30)
        with Progress(job.name) as shown:
            # A terminal sends Ctrl-C to all processes. Only this one takes it, and asks the others with SIGTERM.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            submitted = executor.submit(run_job_as_local_rank, run.path.resolve(), job)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            shown.doing(f"{ranks} rank{'s' if ranks > 1 else ''}, logs in {logs}")
            try:
                with stop_requests(job) as requested:
                    _wait(submitted, job, shown, requested or (lambda: False))
            finally:  # an interrupted launch leaves no process behind; of a finished job nothing is left to end
                _ask_to_stop(submitted)
            if stopped := submitted.results()[0]:
                raise KeyboardInterrupt(f"{job.name} {stopped}; the same command goes on from there")

    return runner


def _wait(submitted: submitit.Job[str | None], job: Job, shown: Progress, requested: Callable[[], bool]) -> None:
    """Wait for the ranks, show what the first one says, and pass a request to stop on to them."""
    log, place, asked = submitted.task(0).paths.stderr, 0, False
    while not submitted.done():
        if requested() and not asked:
            asked = True
            _ask_to_stop(submitted)
        if log.exists():
            with open(log, "rb") as file:
                file.seek(place)
                whole, newline, _ = file.read().rpartition(b"\n")
            place += len(whole + newline)
            for line in whole.decode(errors="replace").splitlines():
                if line.startswith(f"{job.name}: "):
                    shown.doing(line.removeprefix(f"{job.name}: "))
        time.sleep(_LOOK_EVERY_S)


def _ask_to_stop(submitted: submitit.Job[str | None]) -> None:
    """Send SIGTERM to submitit's controller, which passes it on to the ranks."""
    if not submitted.done():
        os.kill(int(submitted.job_id), signal.SIGTERM)
