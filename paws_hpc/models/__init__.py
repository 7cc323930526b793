"""Networks: trunks, heads, the encoder that puts them together, and batch normalisation over ranks."""

from paws_hpc.models.encoder import Classifier, Encoder, ModelConfig, build_classifier, build_encoder
from paws_hpc.models.norm import GlobalBatchNorm1d, GlobalBatchNorm2d, set_statistics, untracked_statistics
from paws_hpc.models.vit import VitConfig

__all__ = [
    "Classifier",
    "Encoder",
    "GlobalBatchNorm1d",
    "GlobalBatchNorm2d",
    "ModelConfig",
    "VitConfig",
    "build_classifier",
    "build_encoder",
    "set_statistics",
    "untracked_statistics",
]
