"""The chain on Slurm: submit all of its jobs or none.

Jobs are submitted held and released together once ``chain.json`` names them. A launcher that is killed in between
leaves jobs that cannot start, and the next launch of the run finds them by their names and cancels them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from paws_hpc.cluster import scheduler
from paws_hpc.cluster.bootstrap import run_job_on_slurm
from paws_hpc.cluster.chain import Chain, ToSubmit, check_begun, dependency, forget_untrained, to_submit
from paws_hpc.cluster.frozen import ConfigError, freeze
from paws_hpc.cluster.resources import Launcher, resolve, stage_parameters
from paws_hpc.cluster.scheduler import ENDED, QueuedJob, SchedulerError, SchedulerUnreachableError
from paws_hpc.cluster.snapshot import plan_snapshot, shield, take_snapshot
from paws_hpc.config import Config
from paws_hpc.files import exclusive
from paws_hpc.stages.attempts import now
from paws_hpc.stages.prepare import check_before_packing
from paws_hpc.stages.run_folder import RunFolder

_LEAVING_S = 120.0
_COMMON = (  # parameters that submitit names without the prefix of the cluster
    "name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "stderr_to_stdout",
)  # fmt: skip


class SlurmChain:
    """One run as jobs on Slurm."""

    def __init__(self, config: Config, run: RunFolder, launcher: Launcher) -> None:
        """Prepare; nothing is written or submitted. The launcher's fields fill what ``resources`` leaves open."""
        self.config, self.run = resolve(config, launcher), run
        self.parameters = stage_parameters(self.config, launcher)
        if "%" in str(run.path.resolve()):
            raise ConfigError(
                f"runs={config.runs}: Slurm would expand the % in {run.path.resolve()}. Use another folder."
            )

    def launch(self) -> list[dict[str, Any]]:
        """Submit what is unfinished and not in the queue; returns those jobs: ``job``, ``job_id``, ``after``, …

        Raises:
            ConfigError: a field or another run under this name stands against it.
            ValueError: the run was begun with other images.
            SchedulerError: Slurm refused a job; those that it had taken are cancelled.
            SchedulerUnreachableError: Slurm cannot be reached.
        """
        with exclusive(self.run.path / ".lock"):  # a launch at the same moment waits here, and then finds these jobs
            queued = scheduler.queue()  # first of all: without Slurm nothing is begun
            in_queue = self.run.chain.exists() and bool(_jobs_of(Chain(self.run), queued)[0])
            check_begun(self.config, self.run, in_queue=in_queue)
            check_before_packing(self.config)
            if not in_queue:
                forget_untrained(self.config, self.run)
            chain = Chain.begin(self.run, self.config.name)
            active, orphans = _jobs_of(chain, _settled_queue(chain))
            scheduler.cancel(orphans)
            scheduler.release(job.job_id for job in active.values() if job.reason == "JobHeldUser")
            planned = to_submit(self.config, self.run, active)
            if not planned:
                return []
            number = len(chain.submissions) + 1
            frozen = self.run.path / "submissions" / f"{number:04d}" / "config.yaml"
            freeze(self.config, frozen)
            snapshot = take_snapshot(self.run.path)
            try:
                jobs = self._submit(planned, active, frozen, snapshot, chain.id)
            except BaseException as error:
                scheduler.cancel(_jobs_of(chain, scheduler.queue())[1])
                if isinstance(error, FailedJobError | FailedSubmissionError):
                    raise SchedulerError(f"Slurm refused a job, so none was submitted. It said: {error}") from error
                raise
            freeze(self.config, self.run.config)
            chain.add_submission({"time": now(), "launcher": "slurm", "code": snapshot.name, "jobs": jobs})
            scheduler.cancel(job_id for each in planned for job_id in each.replaces)
            scheduler.release(sorted({_base(job["job_id"]) for job in jobs}))
            return jobs

    def _submit(
        self, planned: list[ToSubmit], active: Mapping[str, QueuedJob], frozen: Path, snapshot: Path, chain_id: str
    ) -> list[dict[str, Any]]:
        """Submit stage by stage, held, each with its dependencies on those before."""
        replaced = {job_id for each in planned for job_id in each.replaces}
        ids: dict[str, set[str]] = {}
        for name, queued in active.items():
            if queued.job_id not in replaced:
                ids.setdefault(name.partition("/")[0], set()).add(_base(queued.job_id))
        submitted = []
        for each in planned:
            after, parameters = dependency(each.stage, ids), self.parameters[each.stage]
            executor = self._executor(each.stage, after, snapshot, chain_id)
            place, notice_s = (self.run.path.resolve(), frozen.resolve()), float(parameters["signal_delay_s"])
            with _outside_any_job(), executor.batch():
                taken = [executor.submit(run_job_on_slurm, *place, job, notice_s=notice_s) for job in each.jobs]
            facts = {"after": after, "partition": parameters.get("partition"), "notice_s": notice_s}
            job_ids = [str(as_taken.job_id) for as_taken in taken]
            submitted += [
                {"job": job.name, "job_id": job_id, **facts} for job, job_id in zip(each.jobs, job_ids, strict=True)
            ]
            ids.setdefault(each.stage, set()).add(_base(job_ids[0]))
        return submitted

    def dry_run(self) -> Iterator[tuple[str, str]]:
        """Stages and sbatch scripts that :meth:`launch` would submit if nothing of the chain were in the queue.

        Writes nothing; ids that are not known yet read ``<stage>``.
        """
        check_begun(self.config, self.run)
        check_before_packing(self.config)
        ids: dict[str, set[str]] = {}
        snapshot = plan_snapshot(self.run.path)
        for each in to_submit(self.config, self.run, {}):
            executor = self._executor(each.stage, dependency(each.stage, ids), snapshot, "<chain id>")
            ids[each.stage] = {f"<{each.stage}>"}
            yield each.stage, _script(executor, jobs=len(each.jobs))

    def _executor(self, stage: str, after: str | None, snapshot: Path, chain_id: str) -> submitit.AutoExecutor:
        """Of a stage's jobs: held, and run by the frozen code behind the shield."""
        if shutil.which("srun") is None:
            raise SchedulerUnreachableError("srun is not installed here. Launch on a login node of the cluster.")
        python, parameters = shlex.quote(sys.executable), self.parameters[stage]
        shielded = f"{python} -I -S {shlex.quote(str(shield(snapshot)))} {python}"
        after_crash = f"{shielded} -m paws_hpc.cluster.requeue {shlex.quote(str(self.run.path.resolve()))}"
        waiting = {"hold": True} | ({"dependency": after, "kill-on-invalid-dep": "yes"} if after else {})
        fields = {
            **parameters,
            "name": f"{self.config.name}.{stage}.{chain_id}",
            "additional_parameters": {**parameters["additional_parameters"], **waiting},
            "teardown": [
                "status=$?",
                '[ "$status" -eq 0 ] && exit 0',
                f"{after_crash} {self.config.restarts_without_progress}",
                'exit "$status"',
            ],
        }
        executor = submitit.AutoExecutor(
            self.run.logs(stage), cluster="slurm", slurm_python=shielded, slurm_max_num_timeout=0
        )
        executor.update_parameters(
            **{name if name in _COMMON else f"slurm_{name}": value for name, value in fields.items()}
        )
        return executor


def _script(executor: submitit.AutoExecutor, *, jobs: int) -> str:
    """The sbatch script of one job or of an array of several; submitit has no public way to show it."""
    slurm = executor._executor
    if jobs > 1:
        slurm.parameters["map_count"] = jobs
    text: str = slurm._make_submission_file_text(slurm._submitit_command_str, "dry-run")
    return text


def cancel_chain(run: RunFolder) -> list[str]:
    """End all jobs of a run, and return their ids."""
    with exclusive(run.path / ".lock"):
        chain = Chain(run)
        chain.mark_cancelled()  # before anything ends: a job that is about to queue itself again looks here
        active, orphans = _jobs_of(chain, scheduler.queue())
        ended = [*orphans, *(job.job_id for job in active.values())]
        # Whole arrays: after the elements of one are cancelled one by one Slurm does not tell them apart any more.
        scheduler.cancel(sorted({_base(job_id) for job_id in ended}))
        return ended


def _jobs_of(chain: Chain, queued: Mapping[str, QueuedJob]) -> tuple[dict[str, QueuedJob], list[str]]:
    """The jobs of the chain that run or wait, by name, and the ids of those that ``chain.json`` does not name.

    A launcher that submitted the latter died before it could.
    """
    alive = {job_id: job for job_id, job in queued.items() if _is_of(chain, job) and job.state not in ENDED}
    ids = chain.job_ids()
    active = {name: alive[job_id] for name, job_id in ids.items() if job_id in alive}
    return active, [job_id for job_id in alive if job_id not in ids.values()]


def _is_of(chain: Chain, job: QueuedJob) -> bool:
    """By its name: ids begin anew when a cluster loses its state."""
    return job.name.endswith(f".{chain.id}")


def _settled_queue(chain: Chain) -> dict[str, QueuedJob]:
    """The queue, once no job of the chain is on its way out: whether that one has to run again is not known yet."""
    deadline = time.monotonic() + _LEAVING_S
    while True:
        queued = scheduler.queue()
        leaving = [job for job in queued.values() if _is_of(chain, job) and job.state == "COMPLETING"]
        if not leaving:
            return queued
        if time.monotonic() > deadline:
            raise SchedulerError(
                f"Job {leaving[0].job_id} of this chain has been COMPLETING for {_LEAVING_S:g} s, and nobody knows yet "
                "whether it succeeded. Launch again when it has left the queue."
            )
        time.sleep(1.0)


def _base(job_id: str) -> str:
    """The id of the array to which an element belongs."""
    return job_id.partition("_")[0]


@contextmanager
def _outside_any_job() -> Iterator[None]:
    """A job that is submitted from within a job must not inherit that one's shape."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    conf = os.environ.get("SLURM_CONF")
    with submitit.helpers.clean_env():
        if conf is not None:  # where Slurm is, which is no property of the job
            os.environ["SLURM_CONF"] = conf
        yield
