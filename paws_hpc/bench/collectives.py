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
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException, spawn

from paws_hpc import distributed
from paws_hpc.bench.rounds import CandidateError
from paws_hpc.bench.step_parts import synchronise
from paws_hpc.bench.workloads import Workload, cores, rows_by_crop_group
from paws_hpc.config import Config
from paws_hpc.files import read_json, write_json
from paws_hpc.models.encoder import Encoder, build_encoder
from paws_hpc.models.norm import GlobalBatchNorm1d, GlobalBatchNorm2d

_BUCKET_BYTES = 25 << 20  # of DistributedDataParallel
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
    cuda = config.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("nccl" if cuda else "gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    encoder = build_encoder(config.model, seed=config.seed).to(device)
    seconds = {}
    for name, run in collectives(config, encoder, device).items():
        times = []
        for _ in range(_WARM + repeats):
            synchronise(cuda)
            dist.barrier()
            began = time.perf_counter()
            run()
            synchronise(cuda)
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
    norms = [layer for layer in encoder.modules() if isinstance(layer, GlobalBatchNorm1d | GlobalBatchNorm2d)]
    inputs = [_norm_input(layer, device) for layer in norms]
    passes = len({size for _, size in rows_by_group})  # the images of each size go through the network together
    each, parameters = _BUCKET_BYTES // 4, sum(parameter.numel() for parameter in encoder.parameters())
    buckets = [torch.zeros(min(each, parameters - start), device=device) for start in range(0, parameters, each)]

    def normalise() -> None:
        for layer, values in zip(norms, inputs, strict=True):
            for _ in range(passes):
                layer(values).sum().backward()

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


def _norm_input(layer: nn.Module, device: torch.device) -> Tensor:
    """As small as it can be, so that nearly all of the layer's time is communication."""
    assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
    pixels = (1, 1) if isinstance(layer, nn.BatchNorm2d) else ()
    return torch.randn(2, layer.num_features, *pixels, device=device, requires_grad=True)
