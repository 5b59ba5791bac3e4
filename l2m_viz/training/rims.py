"""Rims: frames of one colour around a picture, as undistortion, rectification and letter boxes leave them.

Photos of a collection have none, real pairs often do. Where both views have the same rim, it matches itself perfectly
and means nothing: a network that has never met one is certain of it.

A rim covers the pixels beyond four parabolas. With x and y from -1 to 1 across the image, the left side is covered
where

    x < -1 + 2 max(0, width + bow y^2)

and the others likewise: a lens that is straightened bends the border, outwards or inwards.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from l2m_viz.errors import L2MError
from l2m_viz.geometry import normalized_grid
from l2m_viz.training.stream import PairBatch

_DOMAIN = 0x72696D  # "rim": the seed of a pair may serve here, too


@dataclass(frozen=True)
class RimCfg:
    """Which pairs get rims, and how wide."""

    # Share of the pairs.
    share: float = 0.0
    # Of these, the share whose two views have the same one, as two frames of one camera; else each has its own.
    same: float = 0.5
    # Share of these that are black; the others are of any grey.
    black: float = 0.8
    # Largest width at the middle of a side, as a share of the image's; one side in two has none.
    width: float = 0.06
    # Largest difference between the middle of a side and its ends, either way.
    bow: float = 0.05

    def __post_init__(self) -> None:
        for name in ("share", "same", "black"):
            if not 0 <= getattr(self, name) <= 1:
                raise L2MError(f"RimCfg {name}", expected="a share, 0 to 1", got=f"{getattr(self, name):g}")
        for name in ("width", "bow"):
            if not 0 <= getattr(self, name) < 0.25:
                expected = "from 0 to below 0.25: opposite sides must not meet"
                raise L2MError(f"RimCfg {name}", expected=expected, got=f"{getattr(self, name):g}")


@dataclass(frozen=True)
class Rims:
    """The rims of B images. One without a rim has width and bow 0.

    Attributes:
        width: At the middle of the left, top, right and bottom side, a share of the image's width or height.
        bow: What the ends of the side have more.
        grey: The colour, in [0, 1].
    """

    width: Float[Tensor, "b 4"]
    bow: Float[Tensor, "b 4"]
    grey: Float[Tensor, " b"]

    @property
    def drawn(self) -> Bool[Tensor, " b"]:
        """Which images have one."""
        return ((self.width != 0) | (self.bow != 0)).any(dim=1)

    def select(self, index: Int64[Tensor, " n"]) -> "Rims":
        """Those of some images."""
        return Rims(self.width[index], self.bow[index], self.grey[index])

    def cover(self, points: Float[Tensor, "b h w 2"]) -> Bool[Tensor, "b h w"]:
        """Whether normalised points lie below the rim."""
        x, y = points.unbind(-1)
        left, top, right, bottom = (
            2 * (self.width[:, side, None, None] + self.bow[:, side, None, None] * along**2).clamp(min=0)
            for side, along in enumerate((y, x, y, x))
        )
        return (x < -1 + left) | (x > 1 - right) | (y < -1 + top) | (y > 1 - bottom)


def sample_rims(cfg: RimCfg, seeds: Int64[Tensor, " b"]) -> tuple[Rims, Rims]:
    """Draw the rims of the two views of pairs; a pair's are a function of its seed and the settings alone."""
    drawn = [_draw(cfg, seed) for seed in seeds.tolist()]
    sides = torch.tensor(np.array(drawn), dtype=torch.float32)  # [b, view, width of 4, bow of 4, grey]
    rims_A, rims_B = (Rims(view[:, :4], view[:, 4:8], view[:, 8]) for view in sides.unbind(1))
    return rims_A, rims_B


def with_rims(batch: PairBatch, cfg: RimCfg) -> PairBatch:
    """Cover the rims of some pairs: their pixels have no colour left, and nothing there is covisible.

    Depth and validity stay those of the scene.
    """
    rims_A, rims_B = sample_rims(cfg, batch.seeds)
    some = (rims_A.drawn | rims_B.drawn).nonzero().flatten()
    if not len(some):
        return batch
    A, B = rims_A.select(some), rims_B.select(some)
    warp_A_to_B, warp_B_to_A = batch.warp_A_to_B[some], batch.warp_B_to_A[some]
    grid = normalized_grid((batch.image_A.shape[1], batch.image_A.shape[2])).expand_as(warp_A_to_B)
    covered_A, covered_B = A.cover(grid), B.cover(grid)
    changed = {
        "image_A": torch.where(covered_A[..., None], A.grey[:, None, None, None], batch.image_A[some]),
        "image_B": torch.where(covered_B[..., None], B.grey[:, None, None, None], batch.image_B[some]),
        "covisibility_A_to_B": batch.covisibility_A_to_B[some] & ~covered_A & ~B.cover(warp_A_to_B),
        "covisibility_B_to_A": batch.covisibility_B_to_A[some] & ~covered_B & ~A.cover(warp_B_to_A),
    }
    return replace(
        batch, **{name: getattr(batch, name).index_copy(0, some, v) for name, v in changed.items()}
    )


def _draw(cfg: RimCfg, seed: int) -> np.ndarray:
    """Width and bow of four sides and the grey, of both views; zeros for a pair without."""
    rng = np.random.default_rng([seed % 2**64, _DOMAIN])
    if rng.random() >= cfg.share:
        return np.zeros((2, 9))
    same = rng.random() < cfg.same
    view_A, view_B = (_sides(cfg, rng) for _ in range(2))
    return np.stack([view_A, view_A if same else view_B])


def _sides(cfg: RimCfg, rng: np.random.Generator) -> np.ndarray:
    present = rng.random(4) < 0.5
    width, bow = cfg.width * rng.random(4) * present, cfg.bow * rng.uniform(-1, 1, 4) * present
    grey = 0.0 if rng.random() < cfg.black else rng.random()
    return np.concatenate([width, bow, [grey]])
