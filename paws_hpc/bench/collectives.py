"""The collectives of one training step, each with its backward pass, on several ranks of this machine.

Ranks use NCCL on GPUs, one each, and gloo elsewhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import ProcessException, spawn

from paws_hpc import distributed
from paws_hpc.bench.rounds import CandidateError
from paws_hpc.bench.step_parts import synchronise
from paws_hpc.bench.workloads import Workload, cores, rows_by_crop_group
from paws_hpc.config import Config
from paws_hpc.files import read_json, write_json
from paws_hpc.models.encoder import Encoder, build_encoder
from paws_hpc.models.norm import GlobalBatchNorm1d, GlobalBatchNorm2d

_BUCKET = (25 << 20) // 4  # numbers, of DistributedDataParallel
_WARM = 2


def measure(workload: Workload, *, ranks: int, repeats: int) -> dict[str, float]:
    """Seconds of each collective by name, the median of ``repeats``.

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
    device = torch.device("cuda", rank) if config.device == "cuda" else torch.device("cpu")
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    encoder = build_encoder(config.model, seed=config.seed).to(device)
    seconds = {}
    for name, run in collectives(config, encoder, device).items():
        times = []
        for _ in range(_WARM + repeats):
            synchronise(device)
            dist.barrier()
            began = time.perf_counter()
            run()
            synchronise(device)
            times.append(time.perf_counter() - began)
        seconds[name] = statistics.median(times[_WARM:])
    if rank == 0:
        write_json(folder / "seconds.json", seconds)
    dist.destroy_process_group()


def collectives(config: Config, encoder: Encoder, device: torch.device) -> dict[str, Callable[[], object]]:
    """The collectives of a step by name, each with its backward pass."""
    rows_by_group = rows_by_crop_group(config)
    rows = distributed.per_rank(rows_by_group[0][0], name="support rows")
    z = torch.randn(rows, encoder.output_dim, device=device, requires_grad=True)
    h = z.detach()
    probabilities = torch.rand(config.pretrain.support.classes, device=device, requires_grad=True)
    norms: list[nn.BatchNorm1d | nn.BatchNorm2d] = [
        layer for layer in encoder.modules() if isinstance(layer, GlobalBatchNorm1d | GlobalBatchNorm2d)
    ]
    # As small as they can be, so that nearly all of a layer's time is communication.
    shapes = [(2, norm.num_features, *((1, 1) if isinstance(norm, nn.BatchNorm2d) else ())) for norm in norms]
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    passes = len({size for _, size in rows_by_group})  # the images of each size go through the network together
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    buckets = [torch.zeros(min(_BUCKET, parameters - at), device=device) for at in range(0, parameters, _BUCKET)]

    def normalise() -> None:
        for norm, values in zip(norms, inputs, strict=True):
            for _ in range(passes):
                norm(values).sum().backward()

    return {
        "gather of supports and their targets, with backward": lambda: (
            distributed.gather_rows_and_constants(z, h, dtype=torch.float32)[0].sum().backward()
        ),
        f"batch normalisation, {len(norms)} layers x {passes} sizes, with backward": normalise,
        "mean prediction for me-max, with backward": lambda: (
            distributed.mean_over_ranks(probabilities).sum().backward()
        ),
        f"gradients, {4 * parameters / 1e6:,.3f} MB": lambda: [dist.all_reduce(bucket) for bucket in buckets],
    }
