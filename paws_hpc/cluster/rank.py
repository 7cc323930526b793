"""One of the ranks that compute: its threads and device, its meeting with the others, and its stage."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import submitit
import torch
import torch.distributed as dist

from paws_hpc import distributed
from paws_hpc.cluster.chain import Job
from paws_hpc.cluster.rendezvous import join, own_address
from paws_hpc.config import Config
from paws_hpc.engine.errors import PreemptedError
from paws_hpc.engine.preemption import JobControl
from paws_hpc.stage_table import STAGES
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.run_folder import RunFolder

_LOG = logging.getLogger(__name__)


def run_alone(
    config: Config,
    run: RunFolder,
    job: Job,
    *,
    fence: Callable[[], None],
    requested: Callable[[], bool] | None = None,
) -> None:
    """Run a stage as the only rank; arguments as of :func:`run_among`."""
    _set_threads(config, job, local_ranks=1)
    _run(config, run, job, _device(config, job, local_rank=0, local_ranks=1), _control(requested, fence))


def run_among(
    config: Config,
    run: RunFolder,
    job: Job,
    place: submitit.JobEnvironment,
    *,
    requested: Callable[[], bool] | None,
    fence: Callable[[], None],
    restart: int,
) -> None:
    """Meet the other ranks, if there are any, and run the stage.

    Args:
        config: of the run.
        run: its directory.
        job: to run.
        place: of this process among the ranks.
        requested: whether this rank was asked to stop; None where nobody asks.
        fence: raises if another start of the job has taken over.
        restart: tells the starts of one job id apart.
    """
    local_ranks = -(-place.num_tasks // place.num_nodes)
    _set_threads(config, job, local_ranks=local_ranks)
    device = _device(config, job, local_rank=place.local_rank, local_ranks=local_ranks)
    if place.num_tasks > 1:
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
    control = _control(requested, fence)
    with _together():
        try:
            _run(config, run, job, device, control)
        finally:
            control.close()


def _control(requested: Callable[[], bool] | None, fence: Callable[[], None]) -> JobControl:
    return JobControl(fence=fence) if requested is None else JobControl(requested, fence)


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
    context = TorchContext(config, run, job.stage, job.trial, control.fence, device, control)
    STAGES[job.stage].load(context)


def _set_threads(config: Config, job: Job, *, local_ranks: int) -> None:
    """For every stage anew: sums are the same to the bit only for the same number of threads."""
    threads = config.resources[job.stage].threads_per_rank
    granted = os.environ.get("SLURM_CPUS_PER_TASK")  # the cores in sight may be those of this task or of all of them
    cores = max(1, int(granted) if granted else len(os.sched_getaffinity(0)) // local_ranks)
    if threads is not None and threads > cores:
        _LOG.warning(
            "resources.%s.threads_per_rank=%d, and the cores for a rank are %d here: threads that share one make each "
            "other wait. %d would be faster, and round otherwise.",
            job.stage, threads, cores, cores,
        )  # fmt: skip
    torch.set_num_threads(threads or cores)


def _device(config: Config, job: Job, *, local_rank: int, local_ranks: int) -> torch.device:
    """Of this rank.

    Raises:
        ValueError: CUDA is asked for and there is none, or there are fewer devices than local ranks.
        RuntimeError: Slurm granted GPUs that cannot be seen, so that this node is broken; another one may not be.
    """
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cpu":
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
