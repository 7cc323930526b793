"""The collectives of one training step, as a dry run counts them, and the step, on several ranks of this machine.

Ranks use NCCL on GPUs, one each, and gloo elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, spawn

from paws_hpc.bench.dry_run import Collective, dry_run
from paws_hpc.bench.rounds import CandidateError, until_exit
from paws_hpc.bench.step_parts import synchronise
from paws_hpc.bench.training import training_with_data
from paws_hpc.bench.workloads import Workload, cores
from paws_hpc.files import read_json, write_json
from paws_hpc.models.norm import Statistics, set_statistics

SMALL, LARGE, LARGE_BYTES = "small all-reduce", "large all-reduce", 64 << 20
"""Two all-reduces that the step has not: of one number, and of that many bytes."""
BANDWIDTH = "bandwidth of an all-reduce"  # the figure in GB/s that the large one gives
_WARM, _IN_A_ROW = 2, 100
STEPS: dict[Statistics, str] = {kind: f"step, {kind} statistics" for kind in ("global", "local")}
"""The step itself, with normalisation's statistics of all ranks, and with each rank's own."""


def measure(workload: Workload, *, ranks: int, repeats: int) -> dict[str, float]:
    """Seconds of each collective, and of each of ``STEPS``, by name: the median of ``repeats``.

    Of the small all-reduce when many are issued in a row.

    Raises:
        CandidateError: a rank failed.
    """
    with TemporaryDirectory() as folder:
        try:
            spawn(_rank, (workload, ranks, repeats, Path(folder)), nprocs=ranks)
        except ProcessException as error:
            raise CandidateError(f"collectives on {ranks} ranks failed: {str(error).splitlines()[-1]}") from error
        seconds: dict[str, float] = read_json(Path(folder) / "seconds.json")
    return seconds


def _rank(rank: int, workload: Workload, ranks: int, repeats: int, folder: Path) -> None:
    config = workload.config()
    _, observed = dry_run(config, ranks=ranks, cuda=config.device == "cuda")
    device = torch.device("cuda", rank) if config.device == "cuda" else torch.device("cpu")
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    steps = {name: _step(workload, kind) for kind, name in STEPS.items()}
    torch.set_num_threads(max(1, cores() // ranks))
    seconds = {}
    for name, run in (_replays(observed, device, ranks) | steps).items():
        times = []
        for _ in range(_WARM + repeats):
            synchronise(device)
            dist.barrier()
            began = time.perf_counter()
            run()
            synchronise(device)
            times.append(time.perf_counter() - began)
        seconds[name] = median(times[_WARM:]) / (_IN_A_ROW if name == SMALL else 1)
    if rank == 0:
        write_json(folder / "seconds.json", seconds)
    until_exit.close()
    dist.destroy_process_group()


def _step(workload: Workload, statistics: Statistics) -> Callable[[], object]:
    """A step of a training of its own, since a CUDA graph keeps the statistics with which it was captured."""
    training, batches = training_with_data(workload)
    set_statistics(training.encoder, statistics)
    until_exit.callback(training.close)
    return lambda: training.step(next(batches))


def _replays(observed: Sequence[Collective], device: torch.device, ranks: int) -> dict[str, Callable[[], object]]:
    """What issues the collectives of a step, by what they are for and their kind; and two for the model of scaling."""
    calls: dict[str, list[Callable[[], object]]] = {}
    for each in observed:
        longer = torch.zeros(ranks * max(1, each.bytes // 4 // ranks), device=device)
        shorter = longer[: len(longer) // ranks].clone()
        call = {
            "allgather_base": partial(dist.all_gather_into_tensor, longer, shorter),
            "reduce_scatter_base": partial(dist.reduce_scatter_tensor, shorter, longer),
            "allreduce": partial(dist.all_reduce, longer),
        }[each.kind]
        calls.setdefault(f"{each.part}: {each.kind}", []).append(call)
    calls = {f"{name}, {len(several)} calls": several for name, several in calls.items()}
    calls[SMALL] = [partial(dist.all_reduce, torch.zeros(1, device=device))] * _IN_A_ROW
    calls[LARGE] = [partial(dist.all_reduce, torch.zeros(LARGE_BYTES // 4, device=device))]
    return {name: partial(_issue, several) for name, several in calls.items()}


def _issue(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()
