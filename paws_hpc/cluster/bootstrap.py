"""What every process of a job does: read the frozen config, take its place among the ranks, run the stage."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import submitit
import torch
import torch.distributed as dist

from paws_hpc.cluster.chain import Job
from paws_hpc.cluster.frozen import read_config
from paws_hpc.cluster.rendezvous import join
from paws_hpc.config import Config
from paws_hpc.stages import finetune, prepare, pretrain, selection
from paws_hpc.stages.run_folder import RunFolder


def run_job(path: Path, job: Job) -> None:
    """Run a job alone in this process. Exceptions leave it, so that a failed job is seen to fail."""
    run = RunFolder(path)
    config = read_config(run.config)
    _set_threads(config, job, local_ranks=1)
    _run(config, run, job, _device(config, local_rank=0))


def run_job_as_rank(path: Path, job: Job) -> None:
    """Run a job as one of several ranks, as which this process was started by submitit.

    Raises:
        RuntimeError: the job has another number of tasks than the config asks ranks for.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    run = RunFolder(path)
    config = read_config(run.config)
    place, asked = submitit.JobEnvironment(), getattr(config.resources, job.stage).ranks
    if place.num_tasks != asked:
        raise RuntimeError(
            f"resources.{job.stage}.ranks={asked}, but job {place.job_id} has {place.num_tasks} tasks. Training with "
            "another number of ranks than was asked for would not be the same run."
        )
    _set_threads(config, job, local_ranks=-(-place.num_tasks // place.num_nodes))
    device = _device(config, local_rank=place.local_rank)
    if asked == 1:
        _run(config, run, job, device)
        return
    host = socket.gethostname() if place.num_nodes > 1 else "127.0.0.1"
    if place.num_nodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    join(
        run.path / "rendezvous",
        job=f"{job.name.replace('/', '-')}-{place.job_id}",
        rank=place.global_rank,
        world_size=place.num_tasks,
        host=host,
        device=device,
    )
    try:
        _run(config, run, job, device)
    finally:
        dist.destroy_process_group()


def _run(config: Config, run: RunFolder, job: Job, device: torch.device) -> None:
    match job.stage:
        case "prepare":
            prepare.run(config)
        case "pretrain":
            pretrain.run(config, run, device)
        case "finetune" | "baseline":
            assert job.cell is not None, "a sweep's jobs are its cells"
            finetune.run_cell(config, run, device, sweep=job.stage, cell=job.cell)
        case "selection":
            selection.run(config, run, device)
        case "report":
            from paws_hpc.stages.report import build_report  # noqa: PLC0415 - matplotlib takes seconds to import

            build_report(run.path)


def _set_threads(config: Config, job: Job, *, local_ranks: int) -> None:
    """For every stage anew: sums are the same to the bit only for the same number of threads."""
    threads = getattr(config.resources, job.stage).threads_per_rank
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_ranks))


def _device(config: Config, *, local_rank: int) -> torch.device:
    """Of this rank.

    Raises:
        ValueError: CUDA is asked for and there is none, or there are fewer devices than local ranks.
    """
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available() or local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"device={config.device}: local rank {local_rank} finds {torch.cuda.device_count()} CUDA devices. "
            "Ask for as many GPUs as tasks per node, or use device=cpu."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
