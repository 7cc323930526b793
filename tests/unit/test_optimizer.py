"""LARS as users meet it: what it adapts, how it resumes, and what bad settings are told."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from paws_hpc.engine.config import OptimizerConfig
from paws_hpc.engine.optimizer import LARS, build_optimizer, set_rates, split_parameters
from paws_hpc.engine.schedule import warmup_cosine


class Block(nn.Module):
    """A residual block whose shortcut has a normalisation inside a Sequential, as ResNet's has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.norm = nn.LayerNorm((4, 5))  # affine parameters of two dimensions
        self.fc = nn.Linear(5, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.bn(self.conv(images)) + self.downsample(images)
        return self.fc(self.norm(features.mean(3).reshape(-1, 4, 5)))


def names(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[str]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [known[id(parameter)] for parameter in parameters]


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 + 0.01 * step
        images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


def new(seed: int = 0, **settings: object) -> tuple[Block, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Block()
    return model, build_optimizer(model, OptimizerConfig(**settings))  # type: ignore[arg-type]


def test_biases_and_every_normalisation_are_neither_adapted_nor_decayed() -> None:
    model, optimizer = new()
    weights, excluded = optimizer.param_groups
    assert names(model, weights["params"]) == ["conv.weight", "downsample.0.weight", "fc.weight"]
    assert names(model, excluded["params"]) == [
        "conv.bias",
        "bn.weight",
        "bn.bias",
        "downsample.1.weight",  # the reference misses this one
        "downsample.1.bias",
        "norm.weight",
        "norm.bias",
        "fc.bias",
    ]
    assert weights["adapt"]
    assert weights["weight_decay"] == 1e-6
    assert not excluded["adapt"]
    assert excluded["weight_decay"] == 0


def test_adamw_with_a_rising_decay_follows_its_equations() -> None:
    """Against NumPy in float64; biases and normalisations take no decay."""
    config = OptimizerConfig(name="adamw", weight_decay=0.04, final_weight_decay=0.4)
    torch.manual_seed(0)
    model, total = Block().double(), 6
    optimizer = build_optimizer(model, config)
    decayed = {"conv.weight", "downsample.0.weight", "fc.weight"}
    weights = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    first, second = ({name: np.zeros_like(value) for name, value in weights.items()} for _ in range(2))
    for step in range(total):
        lr, decay = 0.01 * (step + 1), 0.4 + (0.04 - 0.4) / 2 * (1 + math.cos(math.pi * step / total))
        set_rates(optimizer, lr=lr, weight_decay=config.weight_decay_at(step, total_steps=total))
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(2, 3, 5, 5, generator=generator, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.numpy()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            kept = 1 - lr * decay if name in decayed else 1.0
            weights[name] = kept * weights[name] - lr * mean / (np.sqrt(square) + 1e-8)
            np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_decay_goes_from_its_start_to_its_end_or_stays() -> None:
    rising = OptimizerConfig(weight_decay=0.04, final_weight_decay=0.4)
    values = [rising.weight_decay_at(step, total_steps=8) for step in (0, 4, 8, 9)]
    assert values == pytest.approx([0.04, 0.22, 0.4, 0.4], abs=1e-15)
    assert {OptimizerConfig(weight_decay=1e-6).weight_decay_at(step, total_steps=8) for step in range(9)} == {1e-6}


def test_frozen_parameters_stay_out_and_shared_ones_come_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].bias.requires_grad_(False)
    model[1].weight = model[0].weight
    weights, excluded = split_parameters(model)
    assert names(model, weights) == ["0.weight"]
    assert names(model, excluded) == ["1.bias"]
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(model.requires_grad_(False), OptimizerConfig())


def test_tensors_of_norm_zero_and_with_gradient_zero_take_plain_steps() -> None:
    zero = nn.Parameter(torch.zeros(2, 2))
    still, moving = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    zero.grad, still.grad, moving.grad = torch.full((2, 2), 3.0), torch.zeros(2, 2), torch.full((2, 2), 3.0)
    without = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([zero, still, moving, without], lr=0.5, weight_decay=0.1)
    optimizer.step()
    assert without not in optimizer.state
    assert torch.equal(without, torch.ones(2, 2))
    assert torch.equal(zero, torch.full((2, 2), -1.5))  # u = g
    assert torch.equal(still, torch.ones(2, 2))  # no decay either
    # u = (3 + 0.1) * 0.001 * 2 / (6 + 0.1 * 2) = 0.001: as long as the weight's norm times the trust coefficient
    torch.testing.assert_close(moving, torch.full((2, 2), 1 - 0.5e-3), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "nesterov"), [("lars", False), ("lars", True), ("sgd", False), ("sgd", True), ("adamw", False)]
)
def test_resuming_gives_the_same_bits(name: str, nesterov: bool) -> None:
    """Saved and loaded with ``weights_only=True`` after 3 of 7 steps, as a checkpoint is."""
    model, optimizer = new(name=name, nesterov=nesterov)
    run(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(model, optimizer, range(3, 7))
    resumed, its_optimizer = new(seed=1, name=name, nesterov=nesterov)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(state["model"])
    its_optimizer.load_state_dict(state["optimizer"])
    run(resumed, its_optimizer, range(3, 7))
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    forgetful, fresh = new(seed=1, name=name, nesterov=nesterov)
    forgetful.load_state_dict(state["model"])
    run(forgetful, fresh, range(3, 7))
    assert not torch.equal(forgetful.fc.weight, model.fc.weight)  # the buffers do matter


def test_a_step_reads_nothing_back_from_the_device() -> None:
    """Fake tensors have no values: asking for one, which would make the host wait for a GPU, raises."""
    with FakeTensorMode():
        for settings in ({"nesterov": False}, {"nesterov": True}, {"name": "adamw"}):
            model, optimizer = new(**settings)
            model(torch.randn(2, 3, 5, 5)).mean().backward()
            optimizer.step()


class Launches(TorchDispatchMode):
    """Counts the kernels that CUDA launches: of a function of lists one, if all tensors that go together are alike."""

    count = 0
    NONE = ("new_empty", "split", "as_strided", "view", "unsqueeze", "unbind", "empty", "detach", "_record_function")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lists = [each for each in args if isinstance(each, list)]
        if function._opname.startswith("_foreach"):
            alike = all(len({(one.shape, one.stride()) for one in row}) == 1 for row in zip(*lists, strict=True))
            self.count += 1 if alike else len(lists[0])
        elif not function._opname.startswith(self.NONE):
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_launches_as_many_kernels_for_many_tensors_as_for_few(nesterov: bool) -> None:
    counts = []
    for tensors in (2, 40):
        parameters = [nn.Parameter(torch.randn(8, 1 + n, 1, 1)) for n in range(tensors)]
        excluded = [nn.Parameter(torch.randn(2 + n)) for n in range(tensors)]
        for parameter in parameters + excluded:
            parameter.grad = torch.ones_like(parameter).contiguous(memory_format=torch.contiguous_format)
        groups = [{"params": parameters}, {"params": excluded, "adapt": False, "weight_decay": 0.0}]
        optimizer = LARS(groups, lr=0.1, nesterov=nesterov)
        optimizer.step()
        with Launches() as launches:
            optimizer.step()
        counts.append(launches.count)
    assert counts[0] == counts[1] < 40


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"name": "adam"}, "optimizer.name='adam'.*lars, sgd, adamw"),
        ({"name": "adamw", "nesterov": True}, "optimizer.nesterov=true does not go with optimizer.name=adamw"),
        ({"final_weight_decay": -1.0}, "optimizer.final_weight_decay=-1.0"),
        ({"momentum": 1.0}, "optimizer.momentum=1.0"),
        ({"weight_decay": -1.0}, "optimizer.weight_decay=-1.0"),
        ({"peak_lr": -0.1}, "optimizer.peak_lr=-0.1"),
        ({"peak_lr": math.nan}, "optimizer.peak_lr=nan"),
        ({"warmup_epochs": -1.0}, "optimizer.warmup_epochs=-1.0"),
    ],
)
def test_an_impossible_setting_names_its_field(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        OptimizerConfig(**settings)


def test_schedule_of_a_run_that_is_all_warm_up_ends_at_the_final_value() -> None:
    values = [warmup_cosine(step, start=0.0, peak=4.0, final=1.0, warmup_steps=4, total_steps=4) for step in range(6)]
    assert values == [0.0, 1.0, 2.0, 3.0, 1.0, 1.0]


def test_schedule_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"warm-up of 5 steps does not fit into a run of 4"):
        warmup_cosine(0, start=0.0, peak=1.0, final=0.0, warmup_steps=5, total_steps=4)
    with pytest.raises(ValueError, match="step=-1"):
        warmup_cosine(-1, start=0.0, peak=1.0, final=0.0, warmup_steps=1, total_steps=4)
