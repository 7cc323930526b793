"""Blocks that recompute their activations train as blocks that keep them, to the bit, and communicate no more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from paws_hpc.engine.parallel import replicate
from paws_hpc.models.blocks import set_recomputed
from paws_hpc.models.initialisation import initialise
from paws_hpc.models.norm import set_statistics
from paws_hpc.models.resnet import BasicBlock, Bottleneck, ResNet, SmallResNet, WideResNet
from paws_hpc.models.vit import VisionTransformer
from tests.ranks import Collectives, results_of, run_on_ranks

TRUNKS: dict[str, Callable[[], nn.Module]] = {
    "bottleneck": lambda: ResNet(Bottleneck, [2, 1]),
    "basic": lambda: ResNet(BasicBlock, [1, 1]),
    "wide": lambda: WideResNet(depth=10, width=2),
    "transformer": lambda: VisionTransformer(image_size=24, patch_size=8, dim=8, blocks=2, heads=2),
    "small": lambda: SmallResNet([4, 6, 6]),
}
STATISTICS = ("global", "local")


class TwoSizes(nn.Module):
    """Two passes through a backbone before one backward pass, as the encoder makes for large and small crops."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, large: Tensor, small: Tensor) -> Tensor:
        return torch.cat([self.backbone(large), self.backbone(small)])


def trained(backbone: nn.Module, rank: int, world: int) -> dict[str, Any]:
    """One step's values, gradients and buffers, what was communicated, and bytes kept for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    generator = torch.Generator().manual_seed(1)
    crops = [torch.randn(4 * world, 3, size, size, generator=generator).chunk(world)[rank] for size in (24, 16)]
    model = replicate(TwoSizes(backbone), torch.device("cpu"))
    with Collectives() as collectives:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = model(*crops)
        outputs.pow(3).sum().backward()
    given = {name: parameter.grad for name, parameter in backbone.named_parameters()}
    gradients = {f"{name}.grad": value for name, value in given.items() if value is not None}
    values = {"outputs": outputs.detach()} | gradients | dict(backbone.named_buffers())
    return {"values": values, "collectives": dict(collectives.counts), "kept": sum(kept.values())}


def both(rank: int, world: int) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Every backbone, with activations kept and recomputed."""
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, build in TRUNKS.items():
        for statistics in STATISTICS:
            for recomputed in (False, True):
                backbone = build()
                initialise(backbone, seed=2)
                set_statistics(backbone, statistics)
                set_recomputed(backbone, recomputed)
                results.setdefault((name, statistics), []).append(trained(backbone, rank, world))
    return results


def compiled(rank: int, world: int) -> tuple[list[int], dict[str, tuple[Tensor, Tensor]]]:
    """A backbone compiled as one graph: gatherings of the forward and the backward graph, and pairs of values."""
    gathers: list[int] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        gathers.append(sum("all_gather_into_tensor" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    eager = SmallResNet([4])
    initialise(eager, seed=2)
    eager.double()  # normalisation rounds otherwise in one graph
    set_recomputed(eager, True)
    twin = copy.deepcopy(eager)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    values = []
    for backbone, call in ((eager, eager), (twin, torch.compile(twin, backend=backend, fullgraph=True))):
        outputs = call(images)
        outputs.pow(3).sum().backward()
        gradients = {name: parameter.grad for name, parameter in backbone.named_parameters()}
        values.append({"outputs": outputs.detach()} | gradients | dict(backbone.named_buffers()))
    return gathers, {name: (value, values[1][name]) for name, value in values[0].items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(folder, {2: [both, compiled]})
    return folder


@pytest.mark.parametrize("world", [1, 2])
def test_recomputed_blocks_train_as_kept_ones_and_communicate_no_more(world: int, folder: Path) -> None:
    for results in [both(0, 1)] if world == 1 else results_of(both, 2, folder):
        assert len(results) == len(TRUNKS) * len(STATISTICS)
        for case, (kept, recomputed) in results.items():
            assert recomputed["collectives"] == kept["collectives"], case
            assert bool(kept["collectives"]) == (world > 1)
            assert recomputed["kept"] < 0.7 * kept["kept"], case
            for name, value in kept["values"].items():
                assert torch.equal(recomputed["values"][name], value), (case, name)


def test_compiled_recomputation_is_the_same_and_does_not_communicate_again(folder: Path) -> None:
    for gathers, pairs in results_of(compiled, 2, folder):
        assert gathers == [3, 0], "one for each normalisation layer, in the forward graph alone"
        for name, (expected, measured) in pairs.items():
            torch.testing.assert_close(measured, expected, rtol=1e-10, atol=1e-12, msg=name)
