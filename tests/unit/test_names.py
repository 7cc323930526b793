"""Names of weights: what is ours loads strictly into torchvision's networks, and theirs into ours."""

from __future__ import annotations

import pytest
import torch
import torchvision

from paws_hpc.models.config import ModelConfig
from paws_hpc.models.encoder import build_encoder
from paws_hpc.models.names import from_torchvision, to_torchvision


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_there_and_back_gives_the_same_names_and_tensors(prefix: str):
    backbone = build_encoder(ModelConfig(name="resnet18"), seed=0).backbone.state_dict()
    theirs = torchvision.models.resnet18(weights=None)
    theirs.load_state_dict(backbone, strict=False)
    saved = {prefix + name: value for name, value in theirs.state_dict().items()}
    assert any("fc." in name for name in saved), "their classification layer is what we leave out"
    back = from_torchvision(saved)
    assert back.keys() == backbone.keys()
    assert all(torch.equal(back[name], value) for name, value in backbone.items())
    ours = {f"backbone.{name}": value for name, value in back.items()} | {"projection.fc1.bias": torch.zeros(1)}
    assert from_torchvision(ours).keys() == backbone.keys(), "files of our own are read by the same function"


def test_weights_without_a_backbone_are_refused_with_what_they_have():
    with pytest.raises(ValueError, match="layer9"):
        to_torchvision({"layer9.weight": torch.zeros(1)})
