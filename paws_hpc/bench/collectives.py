"""The collectives of one training step, one kind after the other, on several ranks.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m paws_hpc.bench.collectives SCENE REPEATS

``SCENE`` is a :class:`paws_hpc.bench.recipes.Scene` as JSON. Rank 0 prints one line of JSON. Ranks use NCCL on GPUs,
one each, and gloo elsewhere.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paws_hpc import distributed
from paws_hpc.bench.contender import ContenderError
from paws_hpc.bench.counting import rows_of
from paws_hpc.bench.recipes import Scene, cores
from paws_hpc.bench.timeline import synchronise
from paws_hpc.config import Config
from paws_hpc.models.encoder import Encoder, build_encoder
from paws_hpc.models.norm import GlobalBatchNorm1d, GlobalBatchNorm2d

_BUCKET_BYTES = 25 << 20  # of DistributedDataParallel
_WARM = 2


def measure(scene: Scene, *, ranks: int, repeats: int) -> dict[str, Any]:
    """Start the ranks on this machine and wait for what rank 0 says.

    Raises:
        ContenderError: they failed; the last line that they printed is the message.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    module = ["-m", "paws_hpc.bench.collectives", json.dumps(asdict(scene)), str(repeats)]
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // ranks))}
    done = subprocess.run([*command, *module], capture_output=True, text=True, check=False, env=os.environ | threads)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"ranks"')]
    if done.returncode or not lines:
        errors = [line for line in done.stderr.splitlines() if "Error" in line and "ChildFailedError" not in line]
        raise ContenderError(f"collectives on {ranks} ranks failed: {(errors or [done.stderr.strip()])[-1]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


class _Counted(TorchDispatchMode):
    """Collectives that are called, and the bytes of the larger side of each: what every rank sends or ends up with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls += 1
            sides = [[leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] for value in args]
            self.bytes += max(sum(side) for side in sides)
        return func(*args, **(kwargs or {}))


def kinds(config: Config, encoder: Encoder, device: torch.device) -> dict[str, Callable[[], object]]:
    """The collectives of a step by name, each with its backward pass."""
    supports, _ = rows_of(config)[0]
    rows = distributed.per_rank(supports, name="support rows")
    z = torch.randn(rows, encoder.output_dim, device=device, requires_grad=True)
    h = z.detach()
    probabilities = torch.rand(config.pretrain.support.classes, device=device, requires_grad=True)
    norms = [layer for layer in encoder.modules() if isinstance(layer, GlobalBatchNorm1d | GlobalBatchNorm2d)]
    inputs = [_norm_input(layer, device) for layer in norms]
    passes = len({size for _, size in rows_of(config)})  # the images of each size go through the network together
    buckets = _buckets(sum(parameter.numel() for parameter in encoder.parameters()), device)

    def normalise() -> None:
        for layer, values in zip(norms, inputs, strict=True):
            for _ in range(passes):
                layer(values).sum().backward()

    def reduce_gradients() -> None:
        for bucket in buckets:
            dist.all_reduce(bucket)

    return {
        "gather of supports and their targets, with backward": lambda: (
            distributed.gather_rows_and_constants(z, h, dtype=torch.float32)[0].sum().backward()
        ),
        f"batch normalisation, {len(norms)} layers x {passes} sizes, with backward": normalise,
        "mean prediction for me-max, with backward": lambda: (
            distributed.mean_over_ranks(probabilities).sum().backward()
        ),
        "gradients": reduce_gradients,
    }


def _norm_input(layer: nn.Module, device: torch.device) -> Tensor:
    """As small as it can be, so that nearly all of the layer's time is communication."""
    assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
    pixels = (1, 1) if isinstance(layer, nn.BatchNorm2d) else ()
    return torch.randn(2, layer.num_features, *pixels, device=device, requires_grad=True)


def _buckets(parameters: int, device: torch.device) -> list[Tensor]:
    each = _BUCKET_BYTES // 4
    return [torch.zeros(min(each, parameters - start), device=device) for start in range(0, parameters, each)]


def _time(run: Callable[[], object], *, repeats: int, cuda: bool) -> Iterable[float]:
    for number in range(_WARM + repeats):
        synchronise(cuda)
        dist.barrier()
        began = time.perf_counter()
        run()
        synchronise(cuda)
        if number >= _WARM:
            yield time.perf_counter() - began


def main(scene: Scene, repeats: int) -> None:
    """Be one rank; see the module's docstring."""
    config = scene.config()
    cuda = config.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    encoder = build_encoder(config.model, seed=config.seed).to(device)
    found = {}
    for name, run in kinds(config, encoder, device).items():
        with _Counted() as counted:
            run()
        found[name] = {
            "seconds": statistics.median(_time(run, repeats=repeats, cuda=cuda)),
            "calls": counted.calls,
            "bytes": counted.bytes,
        }
    if distributed.is_main():
        print(json.dumps({"ranks": distributed.world_size(), "backend": dist.get_backend(), "kinds": found}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Scene(**json.loads(sys.argv[1])), int(sys.argv[2]))
    # torch 2.11 keeps a process group for good once a dispatch mode has seen one of its collectives. Its threads would
    # outlive the interpreter, and abort if they still hold a tensor then.
    sys.stdout.flush()
    os._exit(0)
