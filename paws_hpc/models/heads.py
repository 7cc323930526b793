"""The projection and prediction heads: small MLPs on feature rows (B, D)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from paws_hpc.models.norm import GlobalBatchNorm1d


class ProjectionHead(nn.Module):
    """fc1-bn1-relu-fc2-bn2-relu-fc3: backbone features (B, D) to representations h (B, ``output_dim``).

    Every linear layer has a bias and fc3 is followed by no normalisation (the paper's appendix A).
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.bn1 = GlobalBatchNorm1d(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.bn2 = GlobalBatchNorm1d(hidden_dim)
        self.fc3 = nn.Linear(hidden_dim, output_dim)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) to (B, ``output_dim``)."""
        hidden = F.relu(self.bn1(self.fc1(features)))
        hidden = F.relu(self.bn2(self.fc2(hidden)))
        return self.fc3(hidden)


class PredictionHead(nn.Module):
    """bn1-fc1-bn2-relu-fc2: representations h (B, D) to anchors z (B, D), through a bottleneck of ``hidden_dim``."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.bn1 = GlobalBatchNorm1d(dim)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.bn2 = GlobalBatchNorm1d(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, representations: Tensor) -> Tensor:
        """(B, D) to (B, D)."""
        hidden = F.relu(self.bn2(self.fc1(self.bn1(representations))))
        return self.fc2(hidden)
