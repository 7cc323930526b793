"""The collectives of one training step, as a dry run counts them, on several ranks of this machine.

Ranks use NCCL on GPUs, one each, and gloo elsewhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, spawn

from paws_hpc.bench.dry_run import Collective, dry_run
from paws_hpc.bench.rounds import CandidateError
from paws_hpc.bench.step_parts import synchronise
from paws_hpc.bench.workloads import Workload, cores
from paws_hpc.files import read_json, write_json

SMALL, LARGE, LARGE_BYTES = "small all-reduce", "large all-reduce", 64 << 20
"""Two all-reduces that the step has not: of one number, and of that many bytes."""
_WARM, _IN_A_ROW = 2, 100


def measure(workload: Workload, *, ranks: int, repeats: int) -> dict[str, float]:
    """Seconds of each collective by name, the median of ``repeats``; of the small one when many are issued in a row.

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
    torch.set_num_threads(max(1, cores() // ranks))
    config = workload.config()
    _, observed = dry_run(config, ranks=ranks, cuda=config.device == "cuda")
    device = torch.device("cuda", rank) if config.device == "cuda" else torch.device("cpu")
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    seconds = {}
    for name, run in _replays(observed, device, ranks).items():
        times = []
        for _ in range(_WARM + repeats):
            synchronise(device)
            dist.barrier()
            began = time.perf_counter()
            run()
            synchronise(device)
            times.append(time.perf_counter() - began)
        seconds[name] = statistics.median(times[_WARM:]) / (_IN_A_ROW if name == SMALL else 1)
    if rank == 0:
        write_json(folder / "seconds.json", seconds)
    dist.destroy_process_group()


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
