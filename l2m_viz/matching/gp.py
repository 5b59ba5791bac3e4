"""The coarse stage of RoMa and L2M++: a Gaussian process says where each cell may be, a transformer decides.

Symbols: x features of the cells of A, y of B; K_xy their kernel; f the embedded coordinates of the cells of B. The
posterior mean of f at x is K_xy (K_yy + sigma^2 I)^-1 f (Edstedt et al., DKM, CVPR 2023, section 3.2).
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2m_viz.geometry import HW, normalized_grid
from l2m_viz.matching.anchors import anchors_to_warp
from l2m_viz.matching.stages import StageOutput
from l2m_viz.matching.transformer_decoder import TransformerCfg, TransformerDecoder

_NORM_GUARD = 1e-6  # keeps the cosine of a feature of length 0 finite


@dataclass(frozen=True)
class GPCfg:
    """Settings of the Gaussian process.

    Attributes:
        dim: Channels of the embedded coordinates.
        temperature: The kernel is exp((cosine - 1) / temperature).
        noise: Variance of the noise, sigma^2.
    """

    dim: int = 512
    temperature: float = 0.2
    noise: float = 0.1


@dataclass(frozen=True)
class GPCoarseCfg:
    """Settings of the coarse stage.

    Attributes:
        stride: Of the features it works on.
        gp: The Gaussian process.
        decoder: The transformer.
        anchor_hw: Rows and columns of the anchors, whatever the size of the images.
        wrap: Let the neighbours of an anchor wrap around the rows' ends, see `anchors_to_warp`: the official weights
            were trained so.
    """

    stride: int = 14
    gp: GPCfg = field(default_factory=GPCfg)
    decoder: TransformerCfg = field(default_factory=TransformerCfg)
    anchor_hw: HW = (64, 64)
    wrap: bool = False


class GPCoarse(nn.Module):
    """Match every coarse cell of each image to anchors in the other."""

    def __init__(self, cfg: GPCoarseCfg, width: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.gp = GaussianProcess(cfg.gp)
        self.decoder = TransformerDecoder(
            cfg.decoder, cfg.gp.dim + width, cfg.anchor_hw[0] * cfg.anchor_hw[1]
        )

    def forward(
        self, features_A: dict[int, Tensor], features_B: dict[int, Tensor]
    ) -> tuple[StageOutput, StageOutput]:
        """Both directions from feature maps (B, C, h, w) by stride."""
        map_A, map_B = features_A[self.cfg.stride], features_B[self.cfg.stride]
        mean_A, mean_B = self.gp(map_A, map_B)
        inputs = torch.cat([mean_A.to(map_A), map_A], dim=1), torch.cat([mean_B.to(map_B), map_B], dim=1)
        if map_A.shape != map_B.shape:
            return self._stage(*self.decoder(inputs[0])), self._stage(*self.decoder(inputs[1]))
        logits, certainty = self.decoder(torch.cat(inputs))
        there, back = zip(logits.chunk(2), certainty.chunk(2), strict=True)
        return self._stage(*there), self._stage(*back)

    def _stage(self, logits: Float[Tensor, "b a h w"], certainty: Float[Tensor, "b 1 h w"]) -> StageOutput:
        warp = anchors_to_warp(logits, self.cfg.anchor_hw, wrap=self.cfg.wrap)
        return StageOutput(
            self.cfg.stride, warp, certainty, anchor_logits=logits, anchor_hw=self.cfg.anchor_hw
        )


class GaussianProcess(nn.Module):
    """Regression from features to embedded coordinates."""

    def __init__(self, cfg: GPCfg) -> None:
        super().__init__()
        self.cfg = cfg
        self.pos_conv = nn.Conv2d(2, cfg.dim, 1)

    def forward(
        self, features_A: Float[Tensor, "b c h w"], features_B: Float[Tensor, "b c h2 w2"]
    ) -> tuple[Float[Tensor, "b d h w"], Float[Tensor, "b d h2 w2"]]:
        """Return the posterior mean of B's embedded coordinates at the cells of A, and of A's at those of B.

        In float32 whatever the autocast: the kernel matrix is close to singular.
        """
        hw_A, hw_B = _hw(features_A), _hw(features_B)
        with torch.autocast(features_A.device.type, enabled=False):
            x, y = (
                _unit_rows(features.float().flatten(2).transpose(1, 2))
                for features in (features_A, features_B)
            )
            K_xy = self._kernel(x, y)
            mean_A = K_xy @ self._solve(y, self._embedded_grid(hw_B))
            mean_B = K_xy.transpose(1, 2) @ self._solve(x, self._embedded_grid(hw_A))
        return mean_A.transpose(1, 2).unflatten(2, hw_A), mean_B.transpose(1, 2).unflatten(2, hw_B)

    def _kernel(self, x: Float[Tensor, "b n c"], y: Float[Tensor, "b m c"]) -> Float[Tensor, "b n m"]:
        return ((x @ y.transpose(1, 2) - 1) / self.cfg.temperature).exp()

    def _solve(self, y: Float[Tensor, "b m c"], f: Float[Tensor, "m d"]) -> Float[Tensor, "b m d"]:
        """(K_yy + sigma^2 I)^-1 f by Cholesky: half the work of an inverse, and it does not lose the digits."""
        K_yy = self._kernel(y, y)
        K_yy = K_yy + self.cfg.noise * torch.eye(K_yy.shape[-1], device=K_yy.device)
        return torch.cholesky_solve(f.expand(len(y), -1, -1), torch.linalg.cholesky(K_yy))

    def _embedded_grid(self, hw: HW) -> Float[Tensor, "n d"]:
        """Fourier features cos(8 pi (W p + b)) of the cells' normalised coordinates p."""
        grid = normalized_grid(hw, device=self.pos_conv.weight.device).permute(2, 0, 1)[None]
        return torch.cos(8 * math.pi * self.pos_conv(grid)).flatten(2)[0].T


def _unit_rows(x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
    """Rows of length 1 (or 0), so that their products are cosines."""
    return x / (x.norm(dim=-1, keepdim=True) + _NORM_GUARD)


def _hw(features: Tensor) -> HW:
    return features.shape[-2], features.shape[-1]
