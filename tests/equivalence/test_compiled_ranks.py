"""A compiled network on two ranks, under DistributedDataParallel, is one graph per size and trains as it is written.

Its normalisation is as fused as that of one rank.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.exc import InductorError
from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode

from paws_hpc.engine.compiled import compile_passes
from paws_hpc.engine.parallel import replicate
from paws_hpc.models.config import ModelConfig
from paws_hpc.models.encoder import Encoder, build_encoder
from paws_hpc.models.norm import GlobalBatchNorm2d, set_statistics
from tests.ranks import results_of, run_on_ranks

SIZES = (16, 8)
FUSED = (4, 8, 8, 8)  # images, channels, height and width


def passes(rank: int, world: int) -> dict[bool, tuple[int, list[dict[str, Tensor]]]]:
    """With blocks kept and recomputed: graphs that were compiled, and gradients and buffers of two steps, both ways."""
    found = {}
    for recomputed in (False, True):
        graphs, values = 0, []

        def counted(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            nonlocal graphs
            graphs += 1
            return aot_eager(graph, inputs)

        torch.compiler.reset()
        # More parameters than DistributedDataParallel's first bucket holds, 1 MiB: there it would cut the graph.
        config = ModelConfig(
            name="small_resnet", channels=[16, 64, 192], prediction_head=True, checkpoint_activations=recomputed
        )
        for compiled in (False, True):
            encoder = build_encoder(config, seed=1).double()  # normalisation rounds otherwise in one graph
            assert sum(parameter.nbytes for parameter in encoder.parameters()) > 4 * 2**20
            if compiled:
                compile_passes(encoder, backend=counted)
            values.append(trained(encoder, rank))
        found[recomputed] = (graphs, values)
    return found


class ScheduledError(Exception):
    """Inductor has fused what it will, and would now write and compile kernels, which takes a minute on a CPU."""


def kernels(rank: int, world: int) -> dict[str, list[tuple[int, int]]]:
    """Of normalisation and ReLU, by where statistics come from: of the forward and the backward graph of inductor for
    CPUs, kernels that pass over the activations, and other kernels. What the graphs compute is that of eager mode."""
    found: dict[str, list[tuple[int, int]]] = {}

    def count(nodes: list[BaseSchedulerNode]) -> None:
        sizes = [
            max(int(math.prod(math.prod(sizes) for sizes in part.group[1])) for part in node.get_nodes())
            for node in nodes
            if not (node.is_extern() or isinstance(node, NopKernelSchedulerNode))
        ]
        passes = sum(size >= math.prod(FUSED) for size in sizes)
        graphs.append((passes, len(sizes) - passes))
        raise ScheduledError

    def schedule(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        with pytest.raises(InductorError, match="ScheduledError"):
            compile_fx_inner(copy.deepcopy(graph), inputs, **options)
        return make_boxed_func(graph.forward)

    random = torch.Generator().manual_seed(rank)
    for statistics in ("local", "global"):
        torch.compiler.reset()
        graphs: list[tuple[int, int]] = []
        layers = nn.Sequential(GlobalBatchNorm2d(FUSED[1]), nn.ReLU())
        set_statistics(layers, statistics)
        rows, upstream = (torch.randn(FUSED, generator=random) for _ in range(2))
        compiled = torch.compile(layers, backend=partial(compile_fx, inner_compile=schedule), fullgraph=True)
        values = []
        with inductor.patch(_post_fusion_custom_pass=count, fx_graph_cache=False):
            for forward in (layers, compiled):
                input = rows.clone().requires_grad_()
                output = forward(input)
                values.append([output, *torch.autograd.grad((output * upstream).sum(), [input, *layers.parameters()])])
        for expected, value in zip(*values, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
        found[statistics] = graphs
    return found


def broken(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    raise OSError("no such file: gcc")


def failing(rank: int, world: int) -> dict[str, list[dict[str, Tensor]]]:
    """Gradients and buffers of two steps as written, and where rank 1 has no compiler, or meets a graph break."""
    config, found = ModelConfig(name="small_resnet", channels=[16, 64, 192]), {}
    for fault in ("compiler", "graph break"):
        values = []
        for compiled in (False, True):
            torch.compiler.reset()
            encoder = build_encoder(config, seed=1).double()
            if compiled:
                if rank == 1 and fault == "graph break":
                    encoder.projection.register_forward_pre_hook(lambda *_: print(end=""))
                compile_passes(encoder, backend=broken if rank == 1 and fault == "compiler" else aot_eager)
            values.append(trained(encoder, rank))
        found[fault] = values
    return found


def trained(encoder: Encoder, rank: int) -> dict[str, Tensor]:
    """Gradients and buffers of two steps on ranks."""
    model = replicate(encoder, torch.device("cpu"))
    for step in range(2):
        random = torch.Generator().manual_seed(10 * step + rank)
        _, z = model([torch.randn(4, 3, size, size, generator=random, dtype=torch.float64) for size in SIZES])
        z.pow(3).sum().backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    return {**gradients, **dict(encoder.named_buffers())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(folder, {2: [passes, failing]})
    return folder


@pytest.mark.parametrize("recomputed", [False, True])
def test_two_ranks_train_a_compiled_network_as_it_is_written(folder: Path, recomputed: bool) -> None:
    for found in results_of(passes, 2, folder):
        graphs, (written, compiled) = found[recomputed]
        assert graphs == len(SIZES), "no graph is cut"
        for name, expected in written.items():
            torch.testing.assert_close(compiled[name], expected, rtol=1e-9, atol=1e-10)


def test_statistics_of_all_ranks_take_no_pass_over_the_activations_more_than_local_ones(tmp_path: Path) -> None:
    """Two passes forward, moments and the rest, and two backward, sums and the rest; their neighbours are in them.

    The moments of all ranks take three kernels over channels more (the count, the total, the combination), whatever the
    number of activations.
    """
    run_on_ranks(tmp_path, {2: [kernels]})
    for found in results_of(kernels, 2, tmp_path):
        assert [passes for passes, _ in found["local"]] == [2, 2]
        assert [passes for passes, _ in found["global"]] == [2, 2]
        more = [there - here for (_, here), (_, there) in zip(found["local"], found["global"], strict=True)]
        assert more == [3, 0]


@pytest.mark.parametrize("fault", ["compiler", "graph break"])
def test_a_compiler_that_fails_on_one_rank_is_used_on_none(folder: Path, fault: str) -> None:
    """Gradients of several buckets: a compiled rank and one that is not would add up other ones, or wait for ever."""
    for found in results_of(failing, 2, folder):
        written, fallen_back = found[fault]
        for name, expected in written.items():
            torch.testing.assert_close(fallen_back[name], expected, rtol=0, atol=0)
