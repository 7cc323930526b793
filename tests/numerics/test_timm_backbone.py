"""Networks of timm as backbones: its own features, and our normalisation over ranks."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from paws_hpc.models.config import ModelConfig
from paws_hpc.models.encoder import build_encoder
from paws_hpc.models.names import to_torchvision


@pytest.mark.parametrize("name", ["resnet18d", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_features_equal_timms_own_at_two_sizes_of_crops(name: str) -> None:
    encoder = build_encoder(ModelConfig("timm", timm=name), seed=0).eval()
    sizes = {"dynamic_img_size": True} if name.startswith("vit") else {}
    theirs = timm.create_model(name, num_classes=0, **sizes).eval()
    theirs.load_state_dict(to_torchvision(encoder.state_dict()), strict=True)
    for size in (64, 32):
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            torch.testing.assert_close(encoder.backbone(images), theirs(images), rtol=0, atol=1e-6)
    plain = [layer for layer in encoder.modules() if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d)]
    assert not plain, "statistics are those of all ranks"


def test_a_network_that_cannot_train_so_is_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean 'resnet18d'"):
        build_encoder(ModelConfig("timm", timm="resnet18dd"), seed=0)
    with pytest.raises(ValueError, match=r"model\.name=resnet50 and model\.timm=resnet18d"):
        ModelConfig(timm="resnet18d")
    with pytest.raises(ValueError, match=r"model\.name=timm and model\.timm=None"):
        ModelConfig("timm")
