"""Networks: trunks, heads, the encoder that puts them together, and batch normalisation over ranks."""

from paws_hpc.models.encoder import Classifier, Encoder, ModelConfig, build_classifier, build_encoder
from paws_hpc.models.norm import GlobalBatchNorm1d, GlobalBatchNorm2d, set_statistics, untracked_statistics

__all__ = [
    "Classifier",
    "Encoder",
    "GlobalBatchNorm1d",
    "GlobalBatchNorm2d",
    "ModelConfig",
    "build_classifier",
    "build_encoder",
    "set_statistics",
    "untracked_statistics",
]
