"""The networks compute what the reference implementation's do: outputs, running statistics, parameter counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paws_hpc.models.config import ModelConfig
from paws_hpc.models.encoder import Encoder, build_encoder

GOLDEN = Path(__file__).parents[1] / "golden"
WRN = ModelConfig(name="wide_resnet", depth=28, width=2)
RESNET50 = ModelConfig(name="resnet50", prediction_head=True)
PREFIXES = {"fc": "projection", "pred": "prediction"}


def ours(key: str) -> str:
    """Our name of one of the golden state dict's entries."""
    first, rest = key.split(".", 1)
    return f"{PREFIXES[first]}.{rest}" if first in PREFIXES else f"backbone.{key}"


def filled(entry: int, key: str, shape: list[int]) -> Tensor:
    """The golden README's formula for entry j: no random numbers, so any implementation can be filled alike."""
    i, j = torch.arange(int(np.prod(shape)), dtype=torch.float64), float(entry)
    if len(shape) >= 2:
        values = torch.sin(0.37 * i + j) * (2 / np.prod(shape[1:])) ** 0.5
    elif key.endswith("running_var"):
        values = 1 + 0.3 * torch.sin(i + j) ** 2
    elif key.endswith("running_mean"):
        values = 0.1 * torch.sin(2 * i + j)
    elif key.endswith("bias"):
        values = 0.1 * torch.cos(i + j)
    else:
        values = 1 + 0.1 * torch.sin(i + j)
    return values.reshape(shape)


def golden_encoder(config: ModelConfig, network: str) -> Encoder:
    entries = json.loads((GOLDEN / "state_dict_keys.json").read_text())[network]
    state = {ours(key): filled(j, key, shape) for j, (key, shape) in enumerate(entries)}
    encoder = build_encoder(config, seed=0).double()
    missing = [key for key in encoder.state_dict() if key not in state and not key.endswith("num_batches_tracked")]
    assert not missing
    _, unexpected = encoder.load_state_dict(state, strict=False)
    assert not unexpected
    return encoder


def golden_inputs(sizes: np.ndarray) -> list[Tensor]:
    counted = [torch.arange(2 * 3 * s * s, dtype=torch.float64) for s in sizes]
    return [torch.sin(0.05 * i + q).reshape(2, 3, s, s) for q, (i, s) in enumerate(zip(counted, sizes, strict=True))]


@torch.no_grad()
def computed(config: ModelConfig, network: str, inputs: list[Tensor]) -> tuple[dict[str, Tensor], Encoder]:
    """What the golden file holds, under its names."""
    encoder = golden_encoder(config, network)
    if network == "wrn28w2":
        encoder.backbone.bn1.momentum = 0.99  # the reference's, which WideResNet's docstring says why we do not keep
    values = {}
    for mode in ("eval", "train"):
        values[f"h_{mode}"], values[f"z_{mode}"] = encoder.train(mode == "train")(inputs)
    values["bn1_running_mean"] = encoder.backbone.bn1.running_mean
    values["bn1_running_var"] = encoder.backbone.bn1.running_var
    values["fc_bn1_running_mean"] = encoder.projection.bn1.running_mean[:128]
    return values, encoder


@pytest.mark.parametrize(
    ("config", "network", "stored"), [(WRN, "wrn28w2", 1e-12), (RESNET50, "resnet50", 1e-6)], ids=["wrn", "resnet50"]
)
def test_outputs_and_running_statistics_equal_the_reference(config: ModelConfig, network: str, stored: float):
    """As far as the numbers are defined.

    In training mode a batch is two images, and of two values normalisation keeps little more than which is larger.
    Through 50 layers that magnifies rounding by 10^11: on another processor the reference would have other numbers.
    So each is compared to three times what it moves by where inputs are rounded otherwise in their last of 53 bits.
    """
    golden = np.load(GOLDEN / f"forward_{network}.npz")
    inputs = golden_inputs(golden["sizes"])
    values, encoder = computed(config, network, inputs)
    moved = dict.fromkeys(values, 0.0)
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        bits = [torch.randint(-1, 2, images.shape, generator=random, dtype=images.dtype) for images in inputs]
        others = [images * (1 + 2**-52 * last) for images, last in zip(inputs, bits, strict=True)]
        for key, other in computed(config, network, others)[0].items():
            moved[key] = max(moved[key], (other - values[key]).abs().max().item())
    for key, found in values.items():
        expected = torch.from_numpy(golden[key]).double()
        scale = expected.abs().max().item()
        written = 1e-12 if key.endswith(("mean", "var")) else stored  # the precision of the file
        tolerance = max(written, 3 * moved[key] / scale)
        assert tolerance < 5e-3, f"{key}: nothing would be compared"
        torch.testing.assert_close(
            found, expected, rtol=written, atol=tolerance * scale, msg=lambda m, key=key: f"{key}: {m}"
        )
    assert count(encoder) == golden["n_params_total"]
    assert count(encoder.backbone) == golden["n_params_trunk"]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("config", "backbone", "feature_dim"),
    [
        (ModelConfig(name="wide_resnet", depth=28, width=2), 1_468_352, 128),
        (ModelConfig(name="resnet50"), 23_508_032, 2048),
        (ModelConfig(name="resnet50", width=2), 93.9e6, 4096),
        (ModelConfig(name="resnet50", width=4), 375e6, 8192),
        (ModelConfig(name="resnet18"), 11_176_512, 512),
    ],
    ids=["wrn28w2", "resnet50", "resnet50-2x", "resnet50-4x", "resnet18"],
)
def test_backbones_have_the_published_parameter_counts(config: ModelConfig, backbone: float, feature_dim: int):
    with torch.device("meta"):
        encoder = Encoder(config)
    measured = count(encoder.backbone)
    assert measured == backbone if isinstance(backbone, int) else abs(measured / backbone - 1) < 2e-3
    assert encoder.feature_dim == feature_dim
    assert encoder.projection.fc1.out_features == feature_dim
