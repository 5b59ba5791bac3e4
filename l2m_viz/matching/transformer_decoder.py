"""RoMa's match decoder: a transformer over the coarse cells that scores anchors in the other image."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from l2m_viz.encoders.linear import linear

_NORM_EPS = 1e-5


@dataclass(frozen=True)
class TransformerCfg:
    """Size of the match decoder; its width is that of its input.

    Attributes:
        blocks: Number of transformer blocks.
        heads: Heads of each attention.
        mlp_ratio: Hidden channels of an MLP to the width.
    """

    blocks: int = 5
    heads: int = 8
    mlp_ratio: int = 4


class TransformerDecoder(nn.Module):
    """Pre-norm transformer blocks without positions: where a cell may go is in its Gaussian-process channels."""

    def __init__(self, cfg: TransformerCfg, dim: int, num_anchors: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Block(cfg, dim) for _ in range(cfg.blocks)))
        self.to_out = nn.Linear(dim, num_anchors + 1)

    def forward(
        self, features: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b a h w"], Float[Tensor, "b 1 h w"]]:
        """Return the anchors' logits and the certainty logit of every cell."""
        tokens = features.flatten(2).transpose(1, 2)  # [b n c]
        out = (
            linear(self.to_out, self.blocks(tokens)).float().transpose(1, 2).unflatten(2, features.shape[-2:])
        )
        return out[:, :-1], out[:, -1:]


class _Block(nn.Module):
    def __init__(self, cfg: TransformerCfg, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.attn = _Attention(dim, cfg.heads)
        self.norm2 = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.mlp = _MLP(dim, cfg.mlp_ratio * dim)

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        query, key, value = linear(self.qkv, tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)  # [b heads n c/heads]
        return linear(self.proj, attended.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return linear(self.fc2, linear(self.fc1, tokens, gelu=True))
