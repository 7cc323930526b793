"""What every process of a job does: read the frozen config, take its place among the ranks, run the stage.

torch is imported only by the stages that need it, once an attempt has begun: the launcher names these functions to
Slurm without it, and a node on which it cannot be imported is recorded like any other failure.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import submitit

from paws_hpc.cluster import scheduler
from paws_hpc.cluster.chain import Job
from paws_hpc.cluster.frozen import read_config
from paws_hpc.cluster.requeue import SlurmJob
from paws_hpc.cluster.scheduler import SchedulerError
from paws_hpc.cluster.signals import interruptible
from paws_hpc.config import Config
from paws_hpc.engine.errors import PreemptedError, TrainingStoppedError
from paws_hpc.progress import Progress, doing
from paws_hpc.stage_table import STAGES, import_torch
from paws_hpc.stages.attempts import Attempt, Lease, LeaseHeldError, LeaseLostError, acquire, beats, record_failure
from paws_hpc.stages.context import StageContext
from paws_hpc.stages.run_folder import RunFolder

_LOG = logging.getLogger(__name__)
_LEAVING_S = 120.0  # for a job that is being ended: KillWait, 30 s unless the site changed it, and then some
_PASSING_ERRORS = frozenset({errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ENOMEM, errno.EREMOTEIO, errno.EHOSTDOWN})
_FINAL_RUNTIME_ERRORS = (TrainingStoppedError, LeaseHeldError, LeaseLostError, NotImplementedError)


def run_job(path: Path, job: Job) -> None:
    """Run a job alone in this process. Exceptions leave it, so that a failed job is seen to fail.

    Raises:
        KeyboardInterrupt: this process was interrupted; a job that trains has saved its state.
    """
    run = RunFolder(path)
    config = read_config(run.config)
    alone = SimpleNamespace(job_id=os.getpid(), num_tasks=1, num_nodes=1, global_rank=0, local_rank=0)
    with _attempt(run, job, alone) as lease, stop_requests(job) as requested:
        try:
            _run_rank(config, run, job, alone, lease, requested=requested)
        except PreemptedError as stop:
            assert lease is not None, "the only rank"
            lease.end("interrupted", step=stop.step)
            raise KeyboardInterrupt(f"{job.name} {stop}; the same command goes on from there") from stop


def run_job_as_local_rank(path: Path, job: Job) -> str | None:
    """Run a job as one of the ranks that submitit's local executor started through ``shield.py``.

    Returns:
        What is saved, if SIGTERM stopped it; a second one ends this process at once.
    """
    _log_to_stderr()
    run, place = RunFolder(path), submitit.JobEnvironment()
    config = read_config(run.config)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _attempt(run, job, place) as lease, stop_requests(job) as requested:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        try:
            _run_rank(config, run, job, place, lease, requested=requested)
        except PreemptedError as stop:  # saved by all ranks at one step
            if lease is not None:
                lease.end("interrupted", step=stop.step)
            return str(stop)
    return None


def run_job_on_slurm(path: Path, frozen: Path, job: Job, *, notice_s: float) -> None:
    """Run a job as one of its ranks on Slurm; on a request to stop, save and go back into the queue.

    ``frozen`` is the config at submission; ``notice_s`` lie between Slurm's signal and the end of the job.
    """
    _log_to_stderr()
    run, place = RunFolder(path), submitit.JobEnvironment()
    own = SlurmJob(run.chain, notice_s=notice_s, trains=STAGES[job.stage].trains)
    config = read_config(frozen)
    with _attempt(run, job, place, own) as lease:
        own.lease = lease
        try:
            _run_rank(config, run, job, place, lease, requested=own.requested, restart=own.restart)
        except PreemptedError as stop:  # saved by all ranks at one step; those beside rank 0 just leave
            if lease is not None:
                own.give_back(step=stop.step)
        own.leave()
    # Not through submitit, which would pickle a result that nobody reads, and a requeued job whose earlier attempt was
    # killed while it wrote that file fails at its very end.
    sys.exit(0)


def stop_requests(job: Job) -> AbstractContextManager[Callable[[], bool] | None]:
    """Of a person to a job on this machine, while the block runs; None where it has no step to stop after."""
    return interruptible() if STAGES[job.stage].trains else nullcontext()


@contextmanager
def _attempt(
    run: RunFolder, job: Job, place: submitit.JobEnvironment, own: SlurmJob | None = None
) -> Iterator[Lease | None]:
    """Rank 0 begins an attempt of the job and records how it ends; every rank records why it fails."""
    folder, key = run.job(job.name), own.key if own else f"local{place.job_id}"
    try:
        if place.global_rank > 0:
            yield None
            return
        job_id, restart = (own.job_id, own.restart) if own else (None, 0)
        facts = {"job": job.name, "job_id": job_id, "restart": restart, "key": key}
        facts |= {"ranks": place.num_tasks, "progress": job.progress(run)}
        alive = partial(is_alive, own_job_id=job_id)
        leaving_s = _LEAVING_S if own else 0.0
        with (
            Progress(job.name, STAGES[job.stage].description),
            acquire(folder, facts, is_alive=alive, wait_s=leaving_s) as lease,
        ):
            try:
                yield lease
            except BaseException as error:
                if not lease.ended:
                    lease.end("failed" if isinstance(error, Exception) else "interrupted", message=str(error))
                raise
            if not lease.ended:
                lease.end("done")
    except Exception as error:
        try:
            record_failure(folder, key, place.global_rank, error, permanent=is_permanent(error))
        except OSError as full:
            _LOG.error("The failure of rank %d cannot be recorded in %s: %s", place.global_rank, folder, full)
        raise


def is_permanent(error: Exception) -> bool:
    """Whether a job that failed so would fail again: a wrong setting or input, a full disk, a loss that is not finite.

    Anything that may pass, such as a lost connection, a hiccup of the file system or an error of the device, is not.
    """
    if isinstance(error, TimeoutError | ConnectionError | MemoryError):
        return False
    if isinstance(error, OSError):
        return error.errno not in _PASSING_ERRORS
    return not isinstance(error, RuntimeError) or isinstance(error, _FINAL_RUNTIME_ERRORS)


def _run_rank(
    config: Config,
    run: RunFolder,
    job: Job,
    place: submitit.JobEnvironment,
    lease: Lease | None,
    *,
    requested: Callable[[], bool] | None = None,
    restart: int = 0,
) -> None:
    """Run the stage, with the other ranks if it needs torch.

    Raises:
        ValueError: the job has another number of tasks than the config has ranks for it.
        RuntimeError: torch cannot be imported here; on another node it may be.
    """
    ranks, stage = config.resources[job.stage].ranks, STAGES[job.stage]
    if place.num_tasks != ranks:
        raise ValueError(
            f"resources.{job.stage} asks for {ranks} ranks, but job {place.job_id} has {place.num_tasks} tasks. "
            "Training with another number of ranks would not be the same run."
        )
    fence = lease.fence if lease is not None else lambda: None
    if not stage.torch:
        stage.load(StageContext(config, run, job.stage, job.trial, fence))
        return
    doing("loading PyTorch")
    import_torch()
    from paws_hpc.cluster import rank  # noqa: PLC0415 - torch

    rank.run_stage(config, run, job, place, requested=requested, fence=fence, restart=restart)


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")


def is_alive(attempt: Attempt, *, own_job_id: str | None) -> bool:
    """Whether an attempt without a recorded end still runs.

    What ran under ``own_job_id`` before is over, for Slurm started the id anew.
    """
    if attempt.job_id is None:
        try:
            if attempt.host == socket.gethostname():
                os.kill(attempt.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it exists, and is somebody else's
            pass
        return beats(attempt)
    if attempt.job_id == own_job_id:
        return False
    try:
        state = scheduler.job_state(attempt.job_id)
    except SchedulerError as error:
        _LOG.warning("Slurm cannot say whether job %s runs, so its heartbeat is watched: %s", attempt.job_id, error)
        return beats(attempt)
    # A job that waits in the queue again has left; it will take its own next attempt.
    return state is not None and state != "PENDING" and state not in scheduler.ENDED
