"""What every process of a job does: read the frozen config, take its place among the ranks, run the stage."""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import submitit
import torch
import torch.distributed as dist

from paws_hpc import distributed
from paws_hpc.cluster.chain import Job
from paws_hpc.cluster.frozen import read_config
from paws_hpc.cluster.liveness import is_alive
from paws_hpc.cluster.rendezvous import join, own_address
from paws_hpc.cluster.resources import WITHOUT_GPU
from paws_hpc.cluster.slurm_job import SlurmJob
from paws_hpc.config import Config
from paws_hpc.engine.errors import PreemptedError, TrainingStoppedError
from paws_hpc.engine.preemption import JobControl
from paws_hpc.stages import finetune, prepare, pretrain, selection
from paws_hpc.stages.attempts import (
    Holder,
    Lease,
    LeaseHeldError,
    LeaseLostError,
    acquire,
    record_failure,
)
from paws_hpc.stages.run_folder import RunFolder

_LOG = logging.getLogger(__name__)
_LEAVING_S = 120.0  # for a job that is being ended: KillWait, 30 s unless the site changed it, and then some
_PASSING_ERRORS = frozenset({errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ENOMEM, errno.EREMOTEIO, errno.EHOSTDOWN})
_FINAL_RUNTIME_ERRORS = (TrainingStoppedError, LeaseHeldError, LeaseLostError, NotImplementedError)


def run_job(path: Path, job: Job) -> None:
    """Run a job alone in this process. Exceptions leave it, so that a failed job is seen to fail."""
    run = RunFolder(path)
    config = read_config(run.config)
    _set_threads(config, job, local_ranks=1)
    holder = Holder.this_process(job.name, ranks=1, progress=job.progress(run), key=f"local{os.getpid()}")
    with _started(run, job, holder) as lease:
        _run(config, run, job, _device(config, job, local_rank=0, local_ranks=1), JobControl(fence=lease.fence))


def run_job_as_local_rank(path: Path, job: Job) -> None:
    """Run a job as one of the ranks that submitit's local executor started."""
    _log_to_stderr()
    run, place = RunFolder(path), submitit.JobEnvironment()
    config = read_config(run.config)
    with _place_among(run, job, place) as lease:
        _run_as_rank(config, run, job, place, partial(JobControl, fence=_fence(lease)))


def run_job_on_slurm(path: Path, frozen: Path, job: Job, *, notice_s: float) -> None:
    """Run a job as one of its ranks on Slurm; when asked to stop, save and go back into the queue.

    Args:
        path: the run directory.
        frozen: the config as it was when the job was submitted.
        job: to run.
        notice_s: between Slurm's signal and the end of the job.
    """
    _log_to_stderr()
    run, place = RunFolder(path), submitit.JobEnvironment()
    own = SlurmJob(run.chain)
    own.listen(notice_s=notice_s, has_steps=job.has_steps)
    config = read_config(frozen)
    with _place_among(run, job, place, own) as lease:
        own.lease = lease
        control = partial(JobControl, requested=own.requested, fence=_fence(lease))
        try:
            _run_as_rank(config, run, job, place, control, restart=own.restart)
        except PreemptedError as stop:  # saved by all ranks at one step; those beside rank 0 just leave
            if lease is not None:
                own.give_back(step=stop.step)
        own.leave()
    # Not through submitit, which would pickle a result that nobody reads, and a requeued job whose earlier start was
    # killed while it wrote that file fails at its very end.
    sys.exit(0)


@contextmanager
def _place_among(
    run: RunFolder, job: Job, place: submitit.JobEnvironment, own: SlurmJob | None = None
) -> Iterator[Lease | None]:
    """Rank 0 begins a start of the job and holds its lease; the other ranks only report their failures to it."""
    key = own.key if own else f"local{place.job_id}"
    if place.global_rank > 0:
        with _reported(run, job, key, place.global_rank):
            yield None
        return
    holder = Holder.this_process(
        job.name,
        ranks=place.num_tasks,
        progress=job.progress(run),
        key=key,
        job_id=own.job_id if own else None,
        restart=own.restart if own else 0,
    )
    with _started(run, job, holder, leaving_s=_LEAVING_S if own else 0.0) as lease:
        yield lease


@contextmanager
def _started(run: RunFolder, job: Job, holder: Holder, *, leaving_s: float = 0.0) -> Iterator[Lease]:
    """Begin a start of a job, and record how it ends."""
    folder = run.job(job.name)
    with (
        _reported(run, job, holder.key, rank=0),
        acquire(folder, holder, is_alive=partial(is_alive, own_job_id=holder.job_id), wait_s=leaving_s) as lease,
    ):
        try:
            yield lease
        except BaseException as error:
            if not lease.ended:
                lease.end("failed" if isinstance(error, Exception) else "interrupted", message=str(error))
            raise
        if not lease.ended:
            lease.end("done")


@contextmanager
def _reported(run: RunFolder, job: Job, key: str, rank: int) -> Iterator[None]:
    """Write down why a rank fails, before the exception ends its process."""
    try:
        yield
    except Exception as error:
        folder = run.job(job.name)
        try:
            record_failure(folder, key, rank, error, definite=is_definite(error))
        except OSError as full:
            _LOG.error("The failure of rank %d cannot be recorded in %s: %s", rank, folder, full)
        raise


def is_definite(error: Exception) -> bool:
    """Whether a job that failed so would fail again: a wrong setting or input, a full disk, a loss that is not finite.

    Anything that may pass, such as a lost connection, a hiccup of the file system or an error of the device, is not.
    """
    if isinstance(error, TimeoutError | ConnectionError | MemoryError):
        return False
    if isinstance(error, OSError):
        return error.errno not in _PASSING_ERRORS
    return not isinstance(error, RuntimeError) or isinstance(error, _FINAL_RUNTIME_ERRORS)


def _run_as_rank(
    config: Config,
    run: RunFolder,
    job: Job,
    place: submitit.JobEnvironment,
    make_control: Callable[[], JobControl],
    *,
    restart: int = 0,
) -> None:
    """Meet the other ranks, if there are any, and run the stage.

    Args:
        config: of the run.
        run: its directory.
        job: to run.
        place: of this process among the ranks.
        make_control: called once the ranks have met.
        restart: tells the starts of one job id apart.

    Raises:
        ValueError: the job has another number of tasks than the config asks ranks for.
    """
    asked = getattr(config.resources, job.stage).ranks
    if place.num_tasks != asked:
        raise ValueError(
            f"resources.{job.stage} asks for {asked} ranks, but job {place.job_id} has {place.num_tasks} tasks. "
            "Training with another number of ranks than was asked for would not be the same run."
        )
    local_ranks = -(-place.num_tasks // place.num_nodes)
    _set_threads(config, job, local_ranks=local_ranks)
    device = _device(config, job, local_rank=place.local_rank, local_ranks=local_ranks)
    if asked > 1:
        if place.num_nodes == 1:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        join(
            run.path / "rendezvous",
            start=f"{job.name.replace('/', '-')}-{place.job_id}-{restart}",
            rank=place.global_rank,
            world_size=place.num_tasks,
            address=own_address(place.num_nodes),
            device=device,
        )
    control = make_control()
    try:
        with _together():
            _run(config, run, job, device, control)
    finally:
        control.close()


@contextmanager
def _together() -> Iterator[None]:
    """Ranks leave together, once rank 0 has closed its logs and marked the stage as done.

    After an error they do not: some may be gone, and NCCL would wait for them.
    """
    try:
        yield
    except PreemptedError:
        _part()
        raise
    _part()


def _part() -> None:
    if dist.is_initialized():
        distributed.barrier()
        dist.destroy_process_group()


def _run(config: Config, run: RunFolder, job: Job, device: torch.device, control: JobControl) -> None:
    match job.stage:
        case "prepare":
            prepare.run(config, run, control=control)
        case "pretrain":
            pretrain.run(config, run, device, control=control)
        case "finetune" | "baseline":
            assert job.cell is not None, "a sweep's jobs are its cells"
            finetune.run_cell(config, run, device, sweep=job.stage, cell=job.cell, control=control)
        case "selection":
            selection.run(config, run, device, control=control)
        case "report":
            from paws_hpc.stages.report import build_report  # noqa: PLC0415 - matplotlib takes seconds to import

            build_report(run.path)


def _set_threads(config: Config, job: Job, *, local_ranks: int) -> None:
    """For every stage anew: sums are the same to the bit only for the same number of threads."""
    threads = getattr(config.resources, job.stage).threads_per_rank
    granted = os.environ.get("SLURM_CPUS_PER_TASK")  # the cores in sight may be those of this task or of all of them
    cores = int(granted) if granted else len(os.sched_getaffinity(0)) // local_ranks
    torch.set_num_threads(threads or max(1, cores))


def _device(config: Config, job: Job, *, local_rank: int, local_ranks: int) -> torch.device:
    """Of this rank.

    Raises:
        ValueError: CUDA is asked for and there is none, or there are fewer devices than local ranks.
        RuntimeError: Slurm granted GPUs that cannot be seen, so that this node is broken; another one may not be.
    """
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cpu" or job.stage in WITHOUT_GPU:
        return torch.device("cpu")
    if not seen and "SLURM_JOB_GPUS" in os.environ:
        raise RuntimeError(
            f"Slurm granted GPUs {os.environ['SLURM_JOB_GPUS']} on {socket.gethostname()}, but torch sees none there. "
            "Training on its CPUs would be another run: mend the node's driver, or keep it out with "
            f"resources.{job.stage}.exclude, or set device=cpu."
        )
    if config.device == "auto" and not seen:
        return torch.device("cpu")
    bound = seen == 1 and "SLURM_GPUS_PER_TASK" in os.environ  # Slurm shows each task its own device alone
    if not bound and local_ranks > seen:
        raise ValueError(
            f"device={config.device}: {local_ranks} ranks on this node find {seen} CUDA devices. Ask for as many GPUs "
            "as tasks per node, or use device=cpu."
        )
    device = torch.device("cuda", 0 if bound else local_rank)
    torch.cuda.set_device(device)
    return device


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")


def _fence(lease: Lease | None) -> Callable[[], None]:
    """Of rank 0; the other ranks write nothing."""
    return lease.fence if lease is not None else lambda: None
