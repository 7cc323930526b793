"""Vision transformers (Dosovitskiy et al. 2021) for crops of several sizes.

State-dict names are timm's without ``head``, so that its weights load into a backbone with ``strict``.
Legend: B images, N tokens (patches and one more that gathers the image), D features, A attention heads.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paws_hpc.models.blocks import ResidualBlock
from paws_hpc.models.config import VIT_PATCH_SIZE


class Attention(nn.Module):
    """Self-attention of all tokens, scaled dot products."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        queries, keys, values = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, A, N, D/A)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """fc1-gelu-fc2, of each token by itself."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class TransformerBlock(ResidualBlock):
    """Attention, then a MLP, each normalised before and with a shortcut around it; (B, N, D) to (B, N, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def transform(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Vision transformer backbone without dropout, so that it draws nothing; features are the extra token's.

    The defaults are ViT-S/16.

    Args:
        image_size: pixels for which positions are learnt; those of images of other sizes are interpolated.
        patch_size: pixels.
        dim: D, a multiple of ``heads``.
        blocks: how many.
        heads: A.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = VIT_PATCH_SIZE,
        dim: int = 384,
        blocks: int = 12,
        heads: int = 6,
    ) -> None:
        super().__init__()
        self.patch_size, self.feature_dim = patch_size, dim
        self.grid = image_size // patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        patches = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=patches))  # (B, D, H/patch, W/patch)
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to features (B, ``feature_dim``).

        Raises:
            ValueError: H or W is no multiple of the patch size.
        """
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images of {height} x {width} pixels are not divided into patches of {self.patch_size}: "
                "choose crops of a multiple of it."
            )
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(images.shape[0], -1, -1), patches], 1)
        x = x + self.positions(height // self.patch_size, width // self.patch_size)
        return self.norm(self.blocks(x))[:, 0]

    def positions(self, rows: int, columns: int) -> Tensor:
        """(1, 1 + rows * columns, D): the learnt positions, bicubically interpolated if the grid is another one."""
        if (rows, columns) == (self.grid, self.grid):
            return self.pos_embed
        token, grid = self.pos_embed[:, :1], self.pos_embed[0, 1:].unflatten(0, (self.grid, self.grid))
        down, across = (_bicubic(self.grid, count, grid) for count in (rows, columns))
        with torch.autocast(grid.device.type, enabled=False):
            resized = torch.einsum("rR,cC,RCd->rcd", down, across, grid)
        return torch.cat([token, resized.flatten(0, 1)[None]], 1)


def _bicubic(before: int, after: int, like: Tensor) -> Tensor:
    """(after, before) weights of a line's old places in each new one, which sum to 1.

    Multiplied with them, a grid is interpolated with a gradient that GPUs too sum in one order; torch's own is not.
    """
    places = torch.eye(before, device=like.device, dtype=like.dtype)[None, None]
    return F.interpolate(places, size=(after, before), mode="bicubic", align_corners=False)[0, 0]
