"""A wide ResNet that leaves out biases where normalisation cancels them is the network that adds them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from paws_hpc.engine.parallel import replicate
from paws_hpc.models.blocks import set_recomputed
from paws_hpc.models.norm import CancelledBiasConv2d, GlobalBatchNorm2d, set_statistics, untracked_statistics
from paws_hpc.models.resnet import WideResNet
from paws_hpc.whole_graph import whole_graph
from tests.ranks import results_of, run_on_ranks

SETTINGS = ("global", "local", "frozen", "untracked", "evaluation", "recomputed", "compiled")
BATCH = 6


class TwoSizes(WideResNet):
    """Passes over images of one size and of another, whose features are stacked."""

    def __init__(self) -> None:
        super().__init__(depth=10, width=1)
        self.encode = super().forward

    def forward(self, images: list[Tensor]) -> Tensor:
        return torch.cat([self.encode(of_one_size) for of_one_size in images])


def network() -> TwoSizes:
    """Biases and statistics that are far from what a network begins with."""
    torch.manual_seed(1)
    made = TwoSizes().double()
    with torch.no_grad():
        for layer in made.modules():
            if isinstance(layer, nn.Conv2d):
                layer.bias.normal_()
            elif isinstance(layer, GlobalBatchNorm2d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
    return made


def adding_biases(made: TwoSizes) -> TwoSizes:
    """The same network, convolving as PyTorch does."""
    for layer in made.modules():
        if isinstance(layer, CancelledBiasConv2d):
            layer.forward = partial(nn.Conv2d.forward, layer)
        elif isinstance(layer, GlobalBatchNorm2d):
            layer.track_shift = lambda shift: None
    return made


def trained(made: TwoSizes, setting: str, rank: int, world: int) -> dict[str, Tensor]:
    """Features, gradients and buffers of two passes of a step, of large and of small images."""
    made.train(setting != "evaluation")
    set_statistics(made, setting if setting in ("local", "frozen") else "global")
    set_recomputed(made, setting == "recomputed")
    if setting == "compiled":
        torch.compiler.reset()
        made.encode = whole_graph(made.encode, backend="aot_eager")
    # As on GPUs: a parameter that the graph lacks would be waited for without end.
    model = DistributedDataParallel(made, broadcast_buffers=False) if world > 1 else made
    for step in range(2):
        model.zero_grad()
        random = torch.Generator().manual_seed(step)
        images = [torch.randn(BATCH, 3, size, size, generator=random, dtype=torch.float64) for size in (12, 8)]
        own = [each.chunk(world)[rank] for each in images]
        with untracked_statistics(made) if setting == "untracked" else nullcontext():
            features = model(own)
        features.sin().sum().backward()
    found = {"features": features.detach()}
    for name, parameter in made.named_parameters():
        found[f"gradient of {name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found | dict(made.named_buffers())


def both(rank: int, world: int) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What is computed without and with the biases, by setting."""
    found = {}
    for setting in SETTINGS:
        lean = network()
        full = adding_biases(copy.deepcopy(lean))
        # Written out, as compiled normalisation rounds otherwise.
        as_written = "global" if setting == "compiled" else setting
        found[setting] = trained(lean, setting, rank, world), trained(full, as_written, rank, world)
    return found


def unused(rank: int, world: int) -> list[str]:
    """Parameters that DistributedDataParallel found unused: it leaves their gradients as they are."""
    made = network()
    images = [torch.randn(BATCH, 3, size, size, dtype=torch.float64) for size in (12, 8)]
    model = replicate(made, torch.device("cpu"))
    model(images).sin().sum().backward()
    return [name for name, parameter in made.named_parameters() if parameter.grad is None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(folder, {1: [both], 2: [both, unused]})
    return folder


@pytest.mark.parametrize("world", [1, 2])
def test_features_gradients_and_statistics_are_those_with_biases(world: int, folder: Path) -> None:
    for ranks in results_of(both, world, folder):
        for setting, (lean, full) in ranks.items():
            assert lean.keys() == full.keys(), setting
            for name, expected in full.items():
                torch.testing.assert_close(
                    lean[name], expected, rtol=1e-12, atol=1e-12, msg=lambda m, where=(setting, name): f"{where}: {m}"
                )


def test_two_ranks_train_it_as_one_does(folder: Path) -> None:
    alone = results_of(both, 1, folder)[0]["global"][0]
    for ranks in results_of(both, 2, folder):
        for name, expected in alone.items():
            if "features" not in name:  # a rank has its own
                mean = expected / 2 if "gradient" in name else expected  # DistributedDataParallel averages sums
                torch.testing.assert_close(ranks["global"][0][name], mean, rtol=1e-12, atol=1e-12)


def test_on_several_ranks_no_parameter_is_unused(folder: Path) -> None:
    """Of one that is, the step would wait to read whether another rank used it; a CUDA graph cannot."""
    assert results_of(unused, 2, folder) == [[], []]


@pytest.mark.parametrize("frozen", [False, True])
def test_biases_train_where_running_statistics_normalise_and_nowhere_else(frozen: bool) -> None:
    made = network()
    set_statistics(made, "frozen" if frozen else "local")
    made([torch.randn(4, 3, 8, 8, dtype=torch.float64)]).sin().sum().backward()
    for layer in made.modules():
        if isinstance(layer, CancelledBiasConv2d):
            assert (layer.bias.grad is not None) == frozen
