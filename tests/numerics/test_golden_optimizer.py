"""LARS, heavy-ball SGD and the schedule follow the reference implementation's float64 trajectories."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paws_hpc.engine.config import OptimizerConfig
from paws_hpc.engine.optimizer import LARS, build_optimizer
from paws_hpc.engine.schedule import warmup_cosine
from tests.objective import load_golden

TRAJECTORIES = ["lars_heavyball_wd1e-6", "lars_nesterov", "sgd_heavyball_nolars", "sgd_nesterov_finetune"]
SCHEDULES = ["small", "imagenet100", "cifar600", "cifar_snn", "finetune10pct_50ep"]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-10, atol=1e-10)


def golden_model(golden: dict[str, Tensor]) -> nn.Module:
    model = nn.Sequential()
    model.add_module("fc1", nn.Linear(6, 8))
    model.add_module("bn1", nn.BatchNorm1d(8))
    model.add_module("relu", nn.ReLU())
    model.add_module("fc2", nn.Linear(8, 4))
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(golden[f"param_{name.replace('.', '_')}"][0])
    return model


def golden_optimizer(golden: dict[str, Tensor], model: nn.Module) -> LARS:
    config = OptimizerConfig(
        name="lars" if golden["lars"] else "sgd",
        momentum=golden["momentum"].item(),
        weight_decay=golden["weight_decay"].item(),
        nesterov=bool(golden["nesterov"]),
    )
    return build_optimizer(model, config)


def golden_lr(golden: dict[str, Tensor], step: int) -> float:
    return warmup_cosine(
        step,
        start=golden["start_lr"].item(),
        peak=golden["ref_lr"].item(),
        final=golden["final_lr"].item(),
        warmup_steps=int(golden["warmup_steps"]),
        total_steps=int(golden["T_max"]),
    )


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_fifteen_steps(name: str) -> None:
    golden = load_golden(name)
    model = golden_model(golden)
    optimizer = golden_optimizer(golden, model)
    for step in range(15):
        lr = golden_lr(golden, step)
        assert lr == pytest.approx(golden["lr"][step].item(), rel=1e-12)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = F.cross_entropy(model(golden["X"][step]), golden["Y"][step])
        assert_equal(loss, golden["loss"][step])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for key, parameter in model.named_parameters():
            stem = key.replace(".", "_")
            assert_equal(parameter.grad, golden[f"grad_{stem}"][step])
            assert_equal(parameter, golden[f"param_{stem}"][step + 1])
            assert_equal(optimizer.state[parameter]["momentum_buffer"], -golden[f"mom_{stem}"][step])


@pytest.mark.parametrize("tag", SCHEDULES)
def test_schedule(tag: str) -> None:
    golden = load_golden("schedules")
    start, peak, final, warmup, total = golden[f"{tag}_conf"].tolist()
    for step, expected in zip(golden[f"{tag}_step"].tolist(), golden[f"{tag}_lr"].tolist(), strict=True):
        actual = warmup_cosine(
            step, start=start, peak=peak, final=final, warmup_steps=int(warmup), total_steps=int(total)
        )
        # The reference rises again past the end; ours stays.
        assert actual == pytest.approx(expected if step < total else final, rel=1e-10, abs=1e-10)
