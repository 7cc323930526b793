"""A rank: its threads and device, its meeting with the others, and its stage."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import submitit
import torch
import torch.distributed as dist

from paws_hpc import distributed
from paws_hpc.cluster.chain import Job
from paws_hpc.config import Config
from paws_hpc.engine.determinism import set_determinism
from paws_hpc.engine.errors import PreemptedError
from paws_hpc.engine.preemption import JobControl
from paws_hpc.files import read_json, write_json
from paws_hpc.stage_table import STAGES
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.run_folder import RunFolder

_LOG = logging.getLogger(__name__)
_POLL_S = 0.1


def run_stage(
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

    ``place`` is that of this process among the ranks, ``requested`` says whether it must stop (None where no signal is
    taken), ``fence`` raises if another attempt has taken over, and ``restart`` counts the attempts of one job id.
    """
    local_ranks = -(-place.num_tasks // place.num_nodes)
    _set_threads(config, job, local_ranks=local_ranks)
    set_determinism(config.deterministic)
    device = _device(config, job, local_rank=place.local_rank, local_ranks=local_ranks)
    if place.num_tasks > 1:
        if place.num_nodes == 1:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        join(
            run.path / "rendezvous",
            start=f"{job.name.replace('/', '-')}-{place.job_id}-{restart}",
            rank=place.global_rank,
            world_size=place.num_tasks,
            one_node=place.num_nodes == 1,
            device=device,
        )
    control = JobControl(fence=fence) if requested is None else JobControl(requested, fence)
    try:
        try:
            STAGES[job.stage].load(TorchContext(config, run, job.stage, job.trial, control.fence, device, control))
        finally:
            control.close()
    except PreemptedError:
        _leave_together()
        raise
    _leave_together()  # after an error they do not: some ranks may be gone, and NCCL would wait for them


def _leave_together() -> None:
    """Wait for the other ranks: rank 0 may still be closing its logs and marking the stage as done."""
    if dist.is_initialized():
        distributed.barrier()
        dist.destroy_process_group()


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
        ValueError: ``device`` is ``cuda`` and there is none, or there are fewer devices than local ranks.
        RuntimeError: Slurm granted GPUs that cannot be seen, so that this node is broken; another one may not be.
    """
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cpu":
        return torch.device("cpu")
    if not seen and "SLURM_JOB_GPUS" in os.environ:
        raise RuntimeError(
            f"Slurm granted GPUs {os.environ['SLURM_JOB_GPUS']} on {socket.gethostname()}, but torch sees none there. "
            "Training on its CPUs would be another run: mend the node's driver, or keep it out with "
            "hydra.launcher.exclude, or set device=cpu."
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


def join(
    folder: Path,
    *,
    start: str,
    rank: int,
    world_size: int,
    one_node: bool,
    device: torch.device,
    timeout_s: float = 600.0,
) -> None:
    """Form the process group of ``world_size`` ranks, over NCCL on GPUs and gloo on CPUs.

    Args:
        folder: seen by all ranks; holds ``<start>.json`` with rank 0's address.
        start: unique to this start of this job, so that no address of an earlier start is taken for it.
        rank: of this process.
        world_size: of the job; never fallen back to another.
        one_node: whether to listen on loopback alone. Otherwise rank 0 listens on MASTER_ADDR if the environment has
            it, for clusters where a node's name leads to the wrong network, and else under the node's name.
        device: of this rank.
        timeout_s: to wait for the others.

    Raises:
        ValueError: rank 0 published a loopback address, and is on another machine.
        TimeoutError: rank 0 published no address in time.
        RuntimeError: not all ranks arrived in time.
    """
    path = folder / f"{start}.json"
    timeout = timedelta(seconds=timeout_s)
    if rank == 0:
        listen_on = "127.0.0.1" if one_node else os.environ.get("MASTER_ADDR") or ""
        host = listen_on or socket.gethostname()
        listener = socket.create_server((listen_on, 0))
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host, port, world_size, is_master=True, timeout=timeout, wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        write_json(path, {"host": host, "port": port, "node": socket.gethostname()})
    else:
        deadline = time.monotonic() + timeout_s
        while not path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"Rank 0 did not publish its address in {path} within {timeout_s:g} s. It failed to start (see its "
                    "log), or the run directory is not on a file system that all ranks share."
                )
            time.sleep(_POLL_S)
        published = read_json(path)
        host, node, here = published["host"], published["node"], socket.gethostname()
        if (host == "localhost" or host.startswith("127.")) and node != here:
            raise ValueError(
                f"Rank 0 on {node} says that it is at {host}, which is this machine ({here}) for everybody else. That "
                "comes from MASTER_ADDR in the environment of the launch: unset it, or set it to rank 0's own address "
                "in hydra.launcher.setup."
            )
        store = dist.TCPStore(host, published["port"], world_size, is_master=False, timeout=timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        dist.barrier()
    finally:
        if rank == 0:  # nobody may take this address for that of a later start
            path.unlink()
