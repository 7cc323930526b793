"""Image networks of timm as backbones: its features and names of weights, our batch normalisation over ranks."""

from __future__ import annotations

import difflib

import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from paws_hpc.models.norm import GlobalBatchNorm1d, GlobalBatchNorm2d


def timm_backbone(name: str, *, seed: int = 0) -> nn.Module:
    """A network of timm without its classifier: images (B, 3, H, W) to features (B, ``feature_dim``).

    It is on the CPU, with timm's initial weights as a function of ``seed``; nothing is downloaded, and PyTorch's global
    random state is not changed. Vision transformers take crops of several sizes (``dynamic_img_size``).

    Raises:
        ValueError: timm has no such network, or it takes images of one size only or draws random numbers in training.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "timm.list_models() has their names."
        raise ValueError(f"model.timm={name!r} is no network of timm {timm.__version__}. {hint}")
    config = timm.get_pretrained_cfg(name)
    options = {"dynamic_img_size": True} if config is not None and config.fixed_input_size else {}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        try:
            network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
        except TypeError as error:
            raise ValueError(
                f"model.timm={name!r} takes images of one size only, and large and small crops have two. Choose a "
                "convolutional network, or a vision transformer with timm's dynamic_img_size."
            ) from error
        _normalise_over_ranks(network)
    random = [layer for layer in network.modules() if getattr(layer, "drop_prob", 0) or getattr(layer, "p", 0)]
    if random:
        raise ValueError(f"model.timm={name!r} has {type(random[0]).__name__}, so that a run could not be repeated.")
    network.feature_dim = network.head_hidden_size
    return network


class _GlobalBatchNormAct2d(GlobalBatchNorm2d):
    """timm's normalisation with an activation behind it."""

    def __init__(self, like: BatchNormAct2d) -> None:
        super().__init__(like.num_features, like.eps, like.momentum)
        self.drop, self.act = like.drop, like.act

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def _normalise_over_ranks(network: nn.Module) -> None:
    """Put our batch normalisations, with their weights, in the place of PyTorch's."""
    for name, layer in list(network.named_modules()):
        if not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            continue
        kind = GlobalBatchNorm2d if isinstance(layer, nn.BatchNorm2d) else GlobalBatchNorm1d
        ours = kind(layer.num_features, layer.eps, layer.momentum)
        if isinstance(layer, BatchNormAct2d):
            ours = _GlobalBatchNormAct2d(layer)
        ours.load_state_dict(layer.state_dict())
        network.set_submodule(name, ours)
