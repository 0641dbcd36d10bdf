"""ViT-Tiny for 32×32 images (Dosovitskiy et al., arXiv 2010.11929; width and heads of DeiT-Ti, arXiv 2012.12877)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """A pre-norm transformer layer: self-attention and a GELU feed-forward of four times the width."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(self.attention(self.norm1(x)))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attention(self, x: Tensor) -> Tensor:
        """Return what the heads read, beside each other: (b, length, heads · size)."""
        if not self.heads:  # all were removed
            return x[..., :0]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ViT(nn.Module):
    """A vision transformer on square patches with a class token and learned positions.

    Prunable are the linear layers and the patch projection; token, positions and norms stay.

    Args:
        num_classes: outputs.
        in_channels: image channels.
        image_size: side of the square image in pixels, divisible by `patch`.
        patch: side of a patch in pixels.
        dim: width; depth: layers; heads: attention heads.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
        patch: int = 4,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(f"image_size must be divisible by the patch of {patch} pixels, and {image_size} is not")
        self.patches = nn.Conv2d(in_channels, dim, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, (image_size // patch) ** 2 + 1, dim).normal_(std=0.02))
        self.layers = nn.Sequential(*(Layer(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.layers(x))[:, 0])


def vit_tiny(num_classes: int, in_channels: int = 3, image_size: int = 32) -> ViT:
    """ViT-Tiny with 4×4 patches: width 192, 12 layers, 3 heads, 5.4 M weights."""
    return ViT(num_classes, in_channels, image_size)
