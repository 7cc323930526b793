"""The encoder: backbone, projection head and optional prediction head; and the classifier that fine-tuning makes of it.

B images. Targets and nearest neighbours are computed from h = projection(backbone(x)), anchors from z = prediction(h),
which is h itself without a prediction head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paws_hpc.models.blocks import set_recomputed
from paws_hpc.models.config import ModelConfig
from paws_hpc.models.heads import PredictionHead, ProjectionHead
from paws_hpc.models.initialisation import initialise
from paws_hpc.models.norm import set_statistics
from paws_hpc.models.resnet import BasicBlock, Bottleneck, ResNet, SmallResNet, WideResNet
from paws_hpc.models.vit import VisionTransformer


class Encoder(nn.Module):
    """Backbone, projection head and optional prediction head.

    Attributes:
        backbone: images (B, 3, H, W) to features (B, ``feature_dim``).
        projection: features to h (B, ``output_dim``).
        prediction: h to z (B, ``output_dim``), or None.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = _BACKBONES[config.name](config)
        assert isinstance(self.backbone.feature_dim, int)
        self.feature_dim = self.backbone.feature_dim
        hidden_dim = config.projection_hidden_dim or self.feature_dim
        default_dim = self.feature_dim // config.width if config.name.startswith("resnet") else self.feature_dim
        self.output_dim = config.projection_dim or default_dim
        self.projection = ProjectionHead(self.feature_dim, hidden_dim, self.output_dim)
        self.prediction: PredictionHead | None = None
        if config.prediction_head:
            self.prediction = PredictionHead(self.output_dim, max(1, self.output_dim // 4))
        set_recomputed(self, config.checkpoint_activations)

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Encode batches (B_i, 3, H_i, W_i) to (h, z), both (sum B_i, ``output_dim``), rows in the order of ``inputs``.

        Images of equal size go through the network in one pass, wherever they stand in the list, so that in training
        they share their normalisation statistics: supports with both large crops, small crops among themselves.
        """
        members: dict[torch.Size, list[int]] = {}
        for index, images in enumerate(inputs):
            members.setdefault(images.shape[2:], []).append(index)
        rows: dict[int, tuple[Tensor, Tensor]] = {}
        for indices in members.values():
            h, z = self._encode(torch.cat([inputs[index] for index in indices]))
            if len(members) == 1:
                return h, z
            sizes = [inputs[index].shape[0] for index in indices]
            rows.update(zip(indices, zip(h.split(sizes), z.split(sizes), strict=True), strict=True))
        h = torch.cat([rows[index][0] for index in range(len(inputs))])
        if self.prediction is None:
            return h, h
        return h, torch.cat([rows[index][1] for index in range(len(inputs))])

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h = self.projection(self.backbone(images))
        return h, h if self.prediction is None else self.prediction(h)


def build_encoder(config: ModelConfig, *, seed: int) -> Encoder:
    """Make an encoder on the CPU whose weights are a function of ``config`` and ``seed`` (see :mod:`.initialisation`).

    PyTorch's global random state is neither read nor changed.
    """
    with torch.device("meta"):
        encoder = Encoder(config)
    if config.name == "timm":
        encoder.backbone = nn.Identity()  # timm initialises its networks itself
    encoder.to_empty(device="cpu")
    initialise(encoder, seed=seed)
    if config.name == "timm":
        encoder.backbone = _timm(config, seed)
    return encoder


class Classifier(nn.Module):
    """What is fine-tuned: backbone, the projection head's first layer (fc1-bn1-relu), a linear classifier on top."""

    def __init__(self, backbone: nn.Module, projection: ProjectionHead, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc1 = projection.fc1
        self.bn1 = projection.bn1
        weight = self.fc1.weight
        self.linear = nn.utils.skip_init(
            nn.Linear, self.fc1.out_features, num_classes, device=weight.device, dtype=weight.dtype
        )
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to what the linear classifier sees, (B, projection_hidden_dim)."""
        return F.relu(self.bn1(self.fc1(self.backbone(images))))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, ``num_classes``)."""
        return self.linear(self.features(images))


def build_classifier(encoder: Encoder, num_classes: int) -> Classifier:
    """Copy an encoder's lower part and put a zero-initialised linear classifier on it, as the paper fine-tunes.

    The encoder keeps its own weights. The copy normalises with each rank's own statistics; :func:`set_statistics`
    changes that. It has the encoder's device, dtype and training mode.

    Raises:
        ValueError: fewer than two classes.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: a classifier needs at least two classes.")
    classifier = Classifier(copy.deepcopy(encoder.backbone), copy.deepcopy(encoder.projection), num_classes)
    set_statistics(classifier, "local")
    return classifier.train(encoder.training)


def _timm(config: ModelConfig, seed: int = 0) -> nn.Module:
    from paws_hpc.models.timm_backbone import timm_backbone  # noqa: PLC0415 - an extra

    assert config.timm is not None
    return timm_backbone(config.timm, seed=seed)


_BACKBONES: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "resnet50": lambda config: ResNet(Bottleneck, [3, 4, 6, 3], width=config.width),
    "resnet18": lambda config: ResNet(BasicBlock, [2, 2, 2, 2], width=config.width),
    "wide_resnet": lambda config: WideResNet(depth=config.depth, width=config.width),
    "small_resnet": lambda config: SmallResNet([config.width * channels for channels in config.channels]),
    "timm": _timm,
    "vit_s16": lambda config: VisionTransformer(),
}
