"""What building and calling the networks promises: names, grouping, initial weights, the classifier, clear errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from paws_hpc.models.blocks import ResidualBlock
from paws_hpc.models.config import NETWORKS, ModelConfig
from paws_hpc.models.encoder import Encoder, build_classifier, build_encoder
from paws_hpc.models.names import to_torchvision
from paws_hpc.models.norm import GlobalBatchNorm1d, GlobalBatchNorm2d, set_statistics, untracked_statistics

SMALL = ModelConfig(name="small_resnet", channels=[4, 6])


def images(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def weights(encoder: Encoder) -> dict[str, Tensor]:
    return dict(encoder.state_dict())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_that_a_config_may_name_can_be_built(name: str) -> None:
    with torch.device("meta"):
        timm = "resnet18" if name == "timm" else None
        assert Encoder(ModelConfig(name=name, timm=timm)).output_dim > 0


@pytest.mark.parametrize("name", ["resnet50", "resnet18"])
def test_torchvision_weights_load_strictly_and_give_the_same_features(name: str):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torchvision.models.get_model(name, weights=None)
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    theirs.fc = torch.nn.Identity()
    encoder = build_encoder(ModelConfig(name=name, prediction_head=True), seed=0)
    backbone = encoder.backbone
    backbone.load_state_dict(state, strict=True)
    for training in (False, True):
        x = images(4, 64)
        torch.testing.assert_close(backbone.train(training)(x), theirs.train(training)(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(backbone.bn1.running_var, theirs.bn1.running_var)
    theirs.load_state_dict(to_torchvision(encoder.state_dict()), strict=True)
    classifier = build_classifier(encoder, 10)
    assert to_torchvision(classifier.state_dict()).keys() == theirs.state_dict().keys(), "of a fine-tuned one too"


def test_images_of_equal_size_share_one_pass_wherever_they_stand():
    """Training mode: supports and large crops share their statistics, small crops have their own."""
    large, small, more = images(5, 16), images(4, 8, seed=1), images(3, 16, seed=2)
    encoder = build_encoder(ModelConfig(name="small_resnet", channels=[4, 6], prediction_head=True), seed=0)
    h, z = encoder([large, small, more])
    twin = build_encoder(ModelConfig(name="small_resnet", channels=[4, 6], prediction_head=True), seed=0)
    both_h, both_z = twin([torch.cat([large, more])])
    small_h, small_z = twin([small])
    torch.testing.assert_close(h, torch.cat([both_h[:5], small_h, both_h[5:]]))
    torch.testing.assert_close(z, torch.cat([both_z[:5], small_z, both_z[5:]]))
    for name, value in encoder.named_buffers():
        torch.testing.assert_close(value, twin.get_buffer(name))
    alone, alone_z = build_encoder(SMALL, seed=0)([large])
    assert not torch.allclose(h[:5], alone, atol=1e-3), "statistics were not shared"
    assert alone_z is alone, "without a prediction head z is h"


@pytest.mark.parametrize("name", ["small_resnet", "wide_resnet", "resnet18", "timm"])
def test_initial_weights_are_a_function_of_the_seed_alone(name: str):
    config = ModelConfig(name=name, depth=10, timm="resnet18d" if name == "timm" else None)
    before = torch.random.get_rng_state()
    first = weights(build_encoder(config, seed=5))
    assert torch.equal(torch.random.get_rng_state(), before), "the global random state was used"
    with torch.random.fork_rng():
        torch.manual_seed(123)
        again = weights(build_encoder(config, seed=5))
    other = weights(build_encoder(config, seed=6))
    assert all(torch.equal(first[key], again[key]) for key in first)
    drawn = [key for key, value in first.items() if value.dim() >= 2]
    assert not any(torch.equal(first[key], other[key]) for key in drawn)
    assert all(torch.isfinite(value).all() for value in first.values())


def test_the_prediction_head_changes_no_other_initial_weight():
    plain = weights(build_encoder(ModelConfig(name="resnet18"), seed=1))
    headed = weights(build_encoder(ModelConfig(name="resnet18", prediction_head=True), seed=1))
    assert len(headed) > len(plain)
    assert all(torch.equal(value, headed[key]) for key, value in plain.items())


def test_initial_weights_have_the_documented_distributions():
    encoder = build_encoder(ModelConfig(name="resnet18"), seed=0)
    for layer in encoder.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.weight.numel() > 30_000:
            fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
            assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
        if isinstance(layer, torch.nn.Linear):
            bound = layer.in_features**-0.5
            assert layer.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        if isinstance(layer, GlobalBatchNorm2d):
            assert torch.equal(layer.weight, torch.ones_like(layer.weight)), "no gamma starts at zero"


def test_the_classifier_sits_on_the_first_projection_layer_and_starts_at_zero():
    encoder = build_encoder(SMALL, seed=0).eval()
    classifier = build_classifier(encoder, 7)
    x = images(4, 16)
    projection = encoder.projection
    expected = F.relu(projection.bn1(projection.fc1(encoder.backbone(x))))
    torch.testing.assert_close(classifier.features(x), expected)
    assert torch.equal(classifier(x), torch.zeros(4, 7))


def test_fine_tuning_a_classifier_leaves_its_encoder_alone():
    encoder = build_encoder(SMALL, seed=0)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    classifier = build_classifier(encoder, 3)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(classifier(images(6, 16)), torch.arange(6) % 3).backward()
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    changed = [
        not torch.equal(value, before[f"backbone.{key}"]) for key, value in classifier.backbone.named_parameters()
    ]
    assert all(changed), "every weight of the backbone trains"


def test_frozen_statistics_stay_while_the_affine_part_trains():
    encoder = build_encoder(SMALL, seed=0)
    encoder([images(8, 16)])
    running = {name: value.clone() for name, value in encoder.named_buffers()}
    expected = encoder.eval()([images(8, 16, seed=1)])[0]
    set_statistics(encoder.train(), "frozen")
    h, _ = encoder([images(8, 16, seed=1)])
    torch.testing.assert_close(h, expected)
    h.square().sum().backward()
    assert all(torch.equal(value, running[name]) for name, value in encoder.named_buffers())
    norms = [layer for layer in encoder.modules() if isinstance(layer, GlobalBatchNorm1d | GlobalBatchNorm2d)]
    assert all(layer.weight.grad.abs().sum() > 0 for layer in norms)


def test_an_untracked_pass_gives_the_same_outputs_and_gradients_and_moves_no_running_statistic():
    tracked, encoder = build_encoder(SMALL, seed=0), build_encoder(SMALL, seed=0)
    inputs = [images(8, 16), images(6, 8, seed=1)]
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    expected = tracked(inputs)[0]
    expected.square().sum().backward()
    with untracked_statistics(encoder), untracked_statistics(encoder.backbone):
        h = encoder(inputs)[0]
    h.square().sum().backward()
    assert torch.equal(h, expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(encoder.parameters(), tracked.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())
    encoder(inputs)
    assert all(torch.equal(value, tracked.get_buffer(name)) for name, value in encoder.named_buffers())


def test_channels_last_changes_the_layout_only():
    plain = build_encoder(SMALL, seed=0)
    last = build_encoder(SMALL, seed=0).to(memory_format=torch.channels_last)
    inputs = [images(4, 16), images(4, 8)]
    expected = plain(inputs)[0]
    measured = last([x.contiguous(memory_format=torch.channels_last) for x in inputs])[0]
    torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "dims"),
    [
        (ModelConfig(name="resnet50", width=2, prediction_head=True), (4096, 4096, 2048, 512)),
        (ModelConfig(name="wide_resnet", width=2, prediction_head=True), (128, 128, 128, 32)),
        (ModelConfig(projection_hidden_dim=99, projection_dim=64, prediction_head=True), (2048, 99, 64, 16)),
    ],
    ids=["resnet50-2x", "wrn28w2", "overrides"],
)
def test_head_sizes_follow_the_backbone_unless_stated(config: ModelConfig, dims: tuple[int, ...]):
    with torch.device("meta"):
        encoder = Encoder(config)
    bottleneck = encoder.prediction.fc1.out_features
    assert (encoder.feature_dim, encoder.projection.fc1.out_features, encoder.output_dim, bottleneck) == dims


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "resnt50"}, "did you mean 'resnet50'"),
        ({"name": "wideresnet"}, "did you mean 'wide_resnet'"),
        ({"name": "wide_resnet", "depth": 27}, r"model.depth=27 .* 28"),
        ({"width": 0}, "model.width=0"),
        ({"projection_dim": 0}, "model.projection_dim=0"),
        ({"channels": []}, "model.channels"),
    ],
)
def test_an_impossible_model_is_refused_by_name(fields: dict[str, object], message: str):
    with pytest.raises(ValueError, match=f"(?i){message}"):
        ModelConfig(**fields)


def test_the_config_chooses_recomputation():
    encoder = build_encoder(ModelConfig(name="wide_resnet", depth=10, checkpoint_activations=True), seed=0)
    blocks = [block for block in encoder.modules() if isinstance(block, ResidualBlock)]
    assert len(blocks) == 3
    assert all(block.recomputed for block in blocks)
