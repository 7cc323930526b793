"""The vision transformer is torchvision's network under timm's names, and takes crops of any size in whole patches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionVit

from paws_hpc.config import Config
from paws_hpc.data.config import CropConfig, ViewsConfig
from paws_hpc.engine.config import OptimizerConfig
from paws_hpc.engine.starting_weights import load_backbone
from paws_hpc.models.config import ModelConfig
from paws_hpc.models.encoder import Encoder, build_encoder
from paws_hpc.models.vit import VisionTransformer
from tests.conftest import Stores
from tests.tiny import small_vit, tiny_config, training_of

MODEL = ModelConfig(name="vit_s16", projection_dim=8)
THEIRS = {
    r"encoder\.layers\.encoder_layer_(\d+)": r"blocks.\1",
    r"\.ln_(\d)": r".norm\1",
    r"self_attention\.in_proj_": "attn.qkv.",
    r"self_attention\.out_proj": "attn.proj",
    r"mlp\.0": "mlp.fc1",
    r"mlp\.3": "mlp.fc2",
    r"conv_proj": "patch_embed.proj",
    r"class_token": "cls_token",
    r"encoder\.pos_embedding": "pos_embed",
    r"encoder\.ln": "norm",
}


@pytest.fixture
def small() -> Iterator[None]:
    with small_vit(image_size=32, patch_size=8):
        yield


def renamed(name: str) -> str:
    for pattern, replacement in THEIRS.items():
        name = re.sub(pattern, replacement, name)
    return name


def images(count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size))


def test_features_and_gradients_are_torchvisions() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = TorchvisionVit(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=64)
    theirs.heads = torch.nn.Identity()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and the token begin at 0 there
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    ours = VisionTransformer(image_size=32, patch_size=8, dim=16, blocks=2, heads=2)
    ours.load_state_dict({renamed(name): value for name, value in theirs.state_dict().items()}, strict=True)
    features, expected = ours(images(3, 32)), theirs(images(3, 32))
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    features.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    grads = {renamed(name): parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-5, msg=name)


def test_vit_s16_has_timms_names_and_shapes() -> None:
    with torch.device("meta"):
        ours = Encoder(ModelConfig(name="vit_s16")).backbone.state_dict()
        theirs = timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


@pytest.mark.usefixtures("small")
def test_a_file_of_timms_names_is_a_start(tmp_path: Path) -> None:
    source = build_encoder(MODEL, seed=1)
    torch.save(
        source.backbone.state_dict() | {"head.weight": torch.zeros(5, 16), "head.bias": torch.zeros(5)}, tmp_path / "w"
    )
    encoder = build_encoder(MODEL, seed=2)
    load_backbone(encoder, tmp_path / "w")
    torch.testing.assert_close(encoder.backbone(images(2, 32)), source.backbone(images(2, 32)), rtol=0, atol=0)


def test_positions_of_other_sizes_are_those_in_between() -> None:
    """What grows evenly from row to row does so on another grid too, to a twentieth of a patch; constants stay."""
    backbone = VisionTransformer(image_size=96, patch_size=8, dim=2, blocks=1, heads=1)
    heights = (torch.arange(12.0) + 0.5) / 12
    with torch.no_grad():
        backbone.pos_embed[0, 1:, 0] = heights.repeat_interleave(12)
        backbone.pos_embed[0, 1:, 1] = 7.0
    other = backbone.positions(18, 6)[0, 1:].reshape(18, 6, 2)
    expected = ((torch.arange(18.0) + 0.5) / 18)[:, None].expand(18, 6)
    torch.testing.assert_close(other[3:-3, :, 0], expected[3:-3], rtol=0, atol=0.05 / 12)
    torch.testing.assert_close(other[..., 1], torch.full((18, 6), 7.0))
    assert backbone.positions(12, 12) is backbone.pos_embed
    with torch.no_grad():
        backbone.pos_embed.normal_(generator=torch.Generator().manual_seed(0))
    grid = backbone.pos_embed[:, 1:].unflatten(1, (12, 12)).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(grid, size=(18, 6), mode="bicubic").flatten(2).mT
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(backbone.positions(18, 6)[:, 1:], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small")
def test_large_and_small_crops_train_every_weight_and_a_size_that_patches_do_not_divide_is_refused() -> None:
    encoder = build_encoder(MODEL, seed=0)
    h, _ = encoder([images(6, 32), images(6, 16)])
    h.pow(3).sum().backward()
    unmoved = [
        name for name, value in encoder.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0
    ]
    assert not unmoved
    with pytest.raises(ValueError, match=r"12 x 12 .* patches of 8"):
        encoder([images(2, 12)])


@pytest.mark.usefixtures("small")
def test_initial_weights_are_small_normal_and_of_the_seed_alone() -> None:
    first, again, other = (build_encoder(MODEL, seed=seed).backbone for seed in (3, 3, 4))
    for name, value in first.named_parameters():
        assert torch.equal(value, again.get_parameter(name))
        if value.dim() > 1:
            assert not torch.equal(value, other.get_parameter(name)), name
            assert value.abs().max() <= 0.04
    drawn = torch.cat([value.flatten() for value in first.parameters() if value.dim() > 1])
    assert drawn.std().item() == pytest.approx(0.02 * 0.8796, rel=0.03)  # of a normal cut at two deviations
    assert torch.equal(first.norm.weight, torch.ones(16))


def test_the_recipe_trains_step_by_step_with_its_decay(digits_stores: Stores) -> None:
    """The loss of one batch falls when that batch is trained on, and the optimiser's decay is the schedule's."""
    config = tiny_config(digits_stores.train, digits_stores.test, digits_stores.train)
    config.model = ModelConfig(name="vit_s16")
    config.optimizer = OptimizerConfig(
        name="adamw", start_lr=2e-3, peak_lr=2e-3, warmup_epochs=0.0, weight_decay=0.04, final_weight_decay=0.4
    )
    config.objective.support_warmup_fraction = 1.0
    config.pretrain.batch_size = 32
    with small_vit():
        training = training_of(config, digits_stores.train)
    batch = training.stream.batch(20)
    losses = [
        training.step(training.stream.batch(20))["train/loss_support_nce"].item() for _ in range(24)
    ]  # by 12 a fifth, more or less by rounding
    assert losses[-1] < 0.8 * losses[0]
    decays = [group["weight_decay"] for group in training.optimizer.param_groups]
    assert decays == [config.optimizer.weight_decay_at(batch.step, total_steps=training.total_steps), 0.0]
    assert 0.04 < decays[0] < 0.4


def test_crops_that_patches_do_not_divide_and_a_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"views\.large\.size=200 must be multiples of 16, the patches of vit_s16"):
        Config(model=MODEL, views=ViewsConfig(large=CropConfig(size=200, count=2)))
    with pytest.raises(ValueError, match=r"model\.width=2 does not apply to model\.name=vit_s16"):
        ModelConfig(name="vit_s16", width=2)
