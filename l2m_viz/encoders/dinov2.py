"""The vision transformer of DINOv2 (Oquab et al. 2023): images in, normalised patch tokens out.

Parameters have the names of the official checkpoints, so that those load strictly.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from l2m_viz.encoders.linear import linear
from l2m_viz.errors import ShapeError
from l2m_viz.geometry import HW

_NORM_EPS = 1e-6
# Position embeddings are resized by (cells + 0.1) / trained cells, DINOv2's guard against a size that rounds down. The
# factor, not the sizes, places the samples, so that the 0.1 moves them: weights were trained with it.
_POSITION_OFFSET = 0.1


@dataclass(frozen=True)
class DinoCfg:
    """Size of the transformer.

    Attributes:
        dim: Channels of a token.
        depth: Number of blocks.
        num_heads: Heads of each attention.
        patch_size: Pixels of the image to a token.
        train_side: Side in pixels of the square images that the position embedding was learned on.
        mlp_ratio: Hidden channels of an MLP to ``dim``.
    """

    dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    patch_size: int = 14
    train_side: int = 518
    mlp_ratio: int = 4


DINOV2_VITS14 = DinoCfg(dim=384, depth=12, num_heads=6)
DINOV2_VITB14 = DinoCfg(dim=768, depth=12, num_heads=12)
DINOV2_VITL14 = DinoCfg()


class DinoViT(nn.Module):
    """DINOv2 without registers."""

    def __init__(self, cfg: DinoCfg | None = None) -> None:
        super().__init__()
        self.cfg = cfg = cfg or DINOV2_VITL14
        num_trained = (cfg.train_side // cfg.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_trained, cfg.dim))
        self.mask_token = nn.Parameter(
            torch.zeros(1, cfg.dim)
        )  # for pre-training; here so that files load strictly
        self.patch_embed = _PatchEmbedding(cfg)
        self.blocks = nn.ModuleList(_Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.dim, eps=_NORM_EPS)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b {self.cfg.dim} h2 w2"]:
        """Return the patch tokens (B, C, H / 14, W / 14) after the last norm, of ImageNet-normalised images.

        Raises:
            ShapeError: a side is not a multiple of the patch size.
        """
        batch, patch = len(images), self.cfg.patch_size
        if any(side % patch or side == 0 for side in images.shape[-2:]):
            expected = f"images (B, 3, H, W) with sides that are multiples of {patch}"
            raise ShapeError("DINOv2", expected=expected, got=str(tuple(images.shape)))
        hw = (images.shape[-2] // patch, images.shape[-1] // patch)
        tokens = self.patch_embed(images)  # [b n c]
        tokens = torch.cat([self.cls_token.to(tokens.dtype).expand(batch, -1, -1), tokens], dim=1)
        tokens = tokens + self._position_embedding(hw).to(tokens.dtype)  # [b 1+n c]
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 1:].transpose(1, 2).unflatten(2, hw)

    def _position_embedding(self, hw: HW) -> Float[Tensor, "1 n {self.cfg.dim}"]:
        """Embeddings of the class token and of every cell, interpolated bicubically from the trained grid."""
        trained = math.isqrt(self.pos_embed.shape[1] - 1)
        if hw == (trained, trained):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().unflatten(1, (trained, trained)).permute(0, 3, 1, 2)  # [1 c m m]
        factors = ((hw[0] + _POSITION_OFFSET) / trained, (hw[1] + _POSITION_OFFSET) / trained)
        resized = F.interpolate(grid, scale_factor=factors, mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1].float(), resized.flatten(2).transpose(1, 2)], dim=1)


class _PatchEmbedding(nn.Module):
    def __init__(self, cfg: DinoCfg) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, cfg.dim, kernel_size=cfg.patch_size, stride=cfg.patch_size)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n c"]:
        return self.proj(images).flatten(2).transpose(1, 2)


class _Block(nn.Module):
    """Pre-norm transformer block with LayerScale."""

    def __init__(self, cfg: DinoCfg) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.dim, eps=_NORM_EPS)
        self.attn = _Attention(cfg)
        self.ls1 = _LayerScale(cfg.dim)
        self.norm2 = nn.LayerNorm(cfg.dim, eps=_NORM_EPS)
        self.mlp = _MLP(cfg)
        self.ls2 = _LayerScale(cfg.dim)

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))


class _Attention(nn.Module):
    def __init__(self, cfg: DinoCfg) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.dim, 3 * cfg.dim)
        self.proj = nn.Linear(cfg.dim, cfg.dim)

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        query, key, value = (
            linear(self.qkv, tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each [b heads n c/heads]
        attended = F.scaled_dot_product_attention(query, key, value)
        return linear(self.proj, attended.transpose(1, 2).flatten(2))


class _LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return tokens * self.gamma


class _MLP(nn.Module):
    def __init__(self, cfg: DinoCfg) -> None:
        super().__init__()
        hidden = cfg.mlp_ratio * cfg.dim
        self.fc1 = nn.Linear(cfg.dim, hidden)
        self.fc2 = nn.Linear(hidden, cfg.dim)

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return linear(self.fc2, linear(self.fc1, tokens, gelu=True))
