"""The coarse stage of small models: self- and cross-attention, then a softmax over every cell of the other image.

After LoFTR (Sun et al., CVPR 2021) and LightGlue (Lindenberger et al., ICCV 2023): it learns from far fewer pairs than
a Gaussian process with anchors. Symbols: N cells of A, M cells of B, d channels.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from l2m_viz.encoders.linear import linear
from l2m_viz.geometry import HW
from l2m_viz.matching.anchors import anchors_to_warp
from l2m_viz.matching.stages import StageOutput


@dataclass(frozen=True)
class AttentionCoarseCfg:
    """Size of the attention coarse stage."""

    stride: int = 16
    dim: int = 192
    layers: int = 4
    heads: int = 4


class AttentionCoarse(nn.Module):
    """Match every coarse cell of each image to every cell of the other."""

    def __init__(self, cfg: AttentionCoarseCfg, width: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.entry = nn.Linear(width, cfg.dim)
        self.layers = nn.ModuleList(AttentionLayer(cfg.dim, cfg.heads) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.dim)
        self.descriptor = nn.Linear(cfg.dim, cfg.dim)
        self.log_scale = nn.Parameter(
            torch.tensor(math.log(15.0))
        )  # of cosine similarities before the softmax
        # A cell's own features, and how much of its probability the best place holds.
        self.certainty = nn.Sequential(
            nn.Linear(cfg.dim + 2, cfg.dim // 2), nn.GELU(), nn.Linear(cfg.dim // 2, 1)
        )

    def forward(
        self, features_A: dict[int, Tensor], features_B: dict[int, Tensor]
    ) -> tuple[StageOutput, StageOutput]:
        """Both directions from feature maps (B, C, h, w) by stride; one matrix of scores serves both."""
        map_A, map_B = features_A[self.cfg.stride], features_B[self.cfg.stride]
        hw_A, hw_B = _hw(map_A), _hw(map_B)
        a, b = (self.entry(m.flatten(2).transpose(1, 2)) for m in (map_A, map_B))  # [b n d], [b m d]
        head_dim = self.cfg.dim // self.cfg.heads
        turn_A, turn_B = (rotary_phases(hw, head_dim, a.device) for hw in (hw_A, hw_B))
        for layer in self.layers:
            a, b = layer(a, b, turn_A, turn_B)
        a, b = self.norm(a), self.norm(b)
        # Similarities and what follows in float32: a softmax over near ties needs the digits.
        with torch.autocast(a.device.type, enabled=False):
            desc_A, desc_B = (F.normalize(self.descriptor(x.float()), dim=-1) for x in (a, b))
            scores = (
                self.log_scale.clamp(max=math.log(100.0)).exp() * desc_A @ desc_B.transpose(1, 2)
            )  # [b n m]
            return (
                self._stage(a.float(), scores, hw_A, hw_B),
                self._stage(b.float(), scores.transpose(1, 2), hw_B, hw_A),
            )

    def _stage(
        self, tokens: Float[Tensor, "b n d"], scores: Float[Tensor, "b n m"], hw: HW, hw_to: HW
    ) -> StageOutput:
        logits = scores.transpose(1, 2).unflatten(2, hw)  # [b m h w]
        warp = anchors_to_warp(logits, hw_to, neighborhood="square")
        log_p = F.log_softmax(scores, dim=-1).max(dim=-1, keepdim=True).values
        best = scores.max(dim=-1, keepdim=True).values / 15
        certainty = self.certainty(torch.cat([tokens, log_p, best], dim=-1))  # [b n 1]
        return StageOutput(
            self.cfg.stride,
            warp,
            certainty.transpose(1, 2).unflatten(2, hw),
            anchor_logits=logits,
            anchor_hw=hw_to,
        )


class AttentionLayer(nn.Module):
    """Self-attention with rotary positions, cross-attention without, and an MLP, each on a normalised residual path.

    Where a cell lies says much about its neighbours and nothing about its place in the other image.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(dim) for _ in range(3))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out_self = nn.Linear(dim, dim)
        self.qk_cross = nn.Linear(dim, dim, bias=False)  # queries and keys alike: the relation is symmetric
        self.v_cross = nn.Linear(dim, dim, bias=False)
        self.out_cross = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, a: Float[Tensor, "b n d"], b: Float[Tensor, "b m d"], turn_A: Tensor, turn_B: Tensor
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b m d"]]:
        """Both images' tokens, each informed by the other's."""
        a, b = a + self._self(a, turn_A), b + self._self(b, turn_B)
        qk_A, v_A = self._cross_inputs(a)
        qk_B, v_B = self._cross_inputs(b)
        a = a + linear(self.out_cross, _merge(attend(qk_A, qk_B, v_B)))
        b = b + linear(self.out_cross, _merge(attend(qk_B, qk_A, v_A)))
        return a + self._mlp(a), b + self._mlp(b)

    def _self(self, x: Tensor, turn: Tensor) -> Tensor:
        q, k, v = (self._split(part) for part in linear(self.qkv, self.norm_self(x)).chunk(3, dim=-1))
        attended = attend(rotate(q, turn), rotate(k, turn), v)
        return linear(self.out_self, _merge(attended))

    def _mlp(self, x: Tensor) -> Tensor:
        wide, _, narrow = self.mlp
        return linear(narrow, linear(wide, self.norm_mlp(x), gelu=True))  # pyright: ignore[reportArgumentType]

    def _cross_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm_cross(x)
        return self._split(linear(self.qk_cross, normed)), self._split(linear(self.v_cross, normed))

    def _split(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b heads n c"]:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention."""
    return F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype))


def rotary_phases(hw: HW, head_dim: int, device: torch.device) -> Float[Tensor, "2 n c"]:
    """Cosines and sines of rotary position embeddings (Su et al., RoFormer): half the channels for x, half for y.

    Wavelengths run from 2 pi to 200 pi cells, so that the farthest cells of a large picture are still apart.
    """
    quarter = head_dim // 4
    frequency = 100.0 ** (-torch.arange(quarter, device=device) / quarter)
    y, x = (torch.arange(side, device=device)[:, None] * frequency for side in hw)  # [h c/4], [w c/4]
    phase = torch.cat([x[None].expand(hw[0], -1, -1), y[:, None].expand(-1, hw[1], -1)], dim=-1).reshape(
        -1, 2 * quarter
    )  # [n c/2]
    return torch.stack([phase.cos(), phase.sin()]).repeat(1, 1, 2)


def rotate(x: Float[Tensor, "b heads n c"], turn: Float[Tensor, "2 n c"]) -> Float[Tensor, "b heads n c"]:
    """Turn the channel pairs (i, i + c/2) by each cell's phases; scores then depend on differences of position."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = turn.to(x.dtype)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _merge(x: Float[Tensor, "b heads n c"]) -> Float[Tensor, "b n d"]:
    return x.transpose(1, 2).flatten(2)


def _hw(feature_map: Tensor) -> HW:
    return feature_map.shape[-2], feature_map.shape[-1]
