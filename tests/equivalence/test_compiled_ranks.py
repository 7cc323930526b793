"""A compiled network on two ranks, under DistributedDataParallel, is one graph per size and trains as it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from paws_hpc.engine.compiled import compile_passes
from paws_hpc.engine.parallel import replicate
from paws_hpc.models.config import ModelConfig
from paws_hpc.models.encoder import build_encoder
from tests.ranks import results_of, run_on_ranks

SIZES = (16, 8)


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
            model = replicate(encoder, torch.device("cpu"))
            for step in range(2):
                random = torch.Generator().manual_seed(10 * step + rank)
                _, z = model([torch.randn(4, 3, size, size, generator=random, dtype=torch.float64) for size in SIZES])
                z.pow(3).sum().backward()
            gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
            values.append({**gradients, **dict(encoder.named_buffers())})
        found[recomputed] = (graphs, values)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(folder, {2: [passes]})
    return folder


@pytest.mark.parametrize("recomputed", [False, True])
def test_two_ranks_train_a_compiled_network_as_it_is_written(folder: Path, recomputed: bool) -> None:
    for found in results_of(passes, 2, folder):
        graphs, (written, compiled) = found[recomputed]
        assert graphs == len(SIZES), "no graph is cut"
        for name, expected in written.items():
            torch.testing.assert_close(compiled[name], expected, rtol=1e-9, atol=1e-10)
