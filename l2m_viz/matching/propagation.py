"""Propagation: a cell may take over what its neighbours across an edge know.

A coarse stage smears the motion of near things over what lies beside them, and refiners, which look a few cells around
the present target, do not get out of it. But where a few cells farther the warp is right, it says where this cell would
be if it belonged to that surface: two neighbours in line, one twice as far as the other, continue the surface to here.
Of all these targets and its own a cell keeps the one at which the features agree best (PatchMatch, Barnes et al., 2009;
planes as in PatchMatch Stereo, Bleyer et al., 2011). On a smooth warp all say the same, and nothing changes.

Two forms of the same rule: a numba kernel for the CPU, and torch operations for other devices, float64 and export.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz._simd import LANES
from l2m_viz.constants import constant
from l2m_viz.errors import L2MError
from l2m_viz.geometry import (
    from_integer_centers,
    normalized_grid,
    to_integer_centers,
    to_normalized,
    to_pixel,
)
from l2m_viz.parallel import is_traced, run_kernel


@dataclass(frozen=True)
class PropagationCfg:
    """Which neighbours are asked, and when one is believed.

    Attributes:
        reaches: Distances of the nearer neighbour in cells, to the left, to the right, above and below.
        window: Side of the square of cells whose agreement is averaged; odd.
        margin: A neighbour's cosine has to be higher than the cell's own by this.
        min_move: A neighbour counts only if its target is farther than this from the cell's own, in cells of B; less is
            what the refiner is for.
        asking: Lowest and highest certainty of a cell that asks. The others are right already, or nowhere in B; leaving
            them out saves half of the time.
    """

    reaches: tuple[int, ...] = (4, 8)
    window: int = 3
    margin: float = 0.1
    min_move: float = 1.0
    asking: tuple[float, float] = (0.002, 0.95)

    def __post_init__(self) -> None:
        if not self.reaches or min(self.reaches) < 1:
            raise L2MError("PropagationCfg reaches", expected="distances of 1 or more", got=str(self.reaches))
        if self.window < 1 or self.window % 2 == 0:
            raise L2MError("PropagationCfg window", expected="an odd number of cells", got=str(self.window))
        if not 0 <= self.asking[0] <= self.asking[1] <= 1:
            got = str(self.asking)
            raise L2MError("PropagationCfg asking", expected="0 <= lowest <= highest <= 1", got=got)


def propagate(
    features_A: Float[Tensor, "b c h w"],
    features_B: Float[Tensor, "b c h2 w2"],
    warp: Float[Tensor, "b 2 h w"],
    certainty_logit: Float[Tensor, "b 1 h w"],
    cfg: PropagationCfg | None = None,
) -> Float[Tensor, "b 2 h w"]:
    """Return the warp (normalised) with every cell's best target; there are no gradients.

    Features are compared by the dot product of A's unit vector with B's unit vectors, interpolated, and zero outside.
    """
    cfg = cfg or PropagationCfg()
    dtype = torch.promote_types(features_A.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(warp.device.type, enabled=False):
        units_A, units_B = (
            F.normalize(features.to(dtype).permute(0, 2, 3, 1).contiguous(), dim=-1)
            for features in (features_A, features_B)
        )
        certainty = certainty_logit[:, 0].float().sigmoid()
        asks = (certainty >= cfg.asking[0]) & (certainty <= cfg.asking[1])
        if warp.device.type == "cpu" and dtype == torch.float32 and not is_traced():
            return _propagate_in_numba(units_A, units_B, warp.float(), asks, cfg)
        units_A, units_B = units_A.permute(0, 3, 1, 2), units_B.permute(0, 3, 1, 2)
        return _propagate_in_torch(units_A, units_B, warp.to(dtype), asks, cfg)


def _propagate_in_numba(
    units_A: Float[Tensor, "b h w c"],
    units_B: Float[Tensor, "b h2 w2 c"],
    warp: Float[Tensor, "b 2 h w"],
    asks: Bool[Tensor, "b h w"],
    cfg: PropagationCfg,
) -> Float[Tensor, "b 2 h w"]:
    from l2m_viz.matching import _propagate

    hw_B = (units_B.shape[1], units_B.shape[2])
    fill = -units_A.shape[-1] % LANES  # zeros change no dot product
    units_A, units_B = F.pad(units_A, (0, fill)), F.pad(units_B, (0, fill, 1, 1, 1, 1))
    targets = to_integer_centers(to_pixel(warp.permute(0, 2, 3, 1), hw_B)).contiguous()
    out = torch.empty_like(targets)
    settings = np.array(cfg.reaches), cfg.window // 2, np.float32(cfg.margin), np.float32(cfg.min_move)
    arrays = (array.numpy() for array in (units_A, units_B, targets, asks.contiguous()))
    run_kernel(_propagate.propagate, *arrays, *settings, out.numpy())
    return to_normalized(from_integer_centers(out), hw_B).permute(0, 3, 1, 2)


def _propagate_in_torch(
    units_A: Float[Tensor, "b c h w"],
    units_B: Float[Tensor, "b c h2 w2"],
    warp: Float[Tensor, "b 2 h w"],
    asks: Bool[Tensor, "b h w"],
    cfg: PropagationCfg,
) -> Float[Tensor, "b 2 h w"]:
    grid = normalized_grid((warp.shape[-2], warp.shape[-1]), device=warp.device, dtype=warp.dtype)
    displacement = warp - grid.permute(2, 0, 1)
    cells = constant(tuple(units_B.shape[:-3:-1]), warp.device, warp.dtype).view(2, 1, 1) / 2
    result, best = warp, cfg.margin + _agreement(units_A, units_B, warp, cfg.window)
    for reach in cfg.reaches:
        for dy, dx in ((-reach, 0), (0, -reach), (0, reach), (reach, 0)):
            near, far = _shifted(displacement, dy, dx), _shifted(displacement, 2 * dy, 2 * dx)
            candidate = warp - displacement + 2 * near - far
            move = ((candidate - warp) * cells).norm(dim=1, keepdim=True)
            is_far = asks[:, None] & (move > cfg.min_move) & (move < torch.inf)
            agreement = _agreement(units_A, units_B, candidate, cfg.window)
            better = is_far & (agreement > best)
            result, best = torch.where(better, candidate, result), torch.where(better, agreement, best)
    return result


def _agreement(units_A: Tensor, units_B: Tensor, warp: Tensor, window: int) -> Float[Tensor, "b 1 h w"]:
    """Mean dot product in the window; a target that is nowhere agrees with nothing."""
    sampled = F.grid_sample(units_B, warp.nan_to_num(2.0).permute(0, 2, 3, 1), align_corners=False)
    cosine = (units_A * sampled).sum(dim=1, keepdim=True)
    return F.avg_pool2d(cosine, window, stride=1, padding=window // 2, count_include_pad=False)


def _shifted(values: Float[Tensor, "b 2 h w"], dy: int, dx: int) -> Float[Tensor, "b 2 h w"]:
    """The values dy rows below and dx columns to the right; beyond the border, those at the border."""
    height, width = values.shape[-2:]
    rows = torch.arange(height, device=values.device) + dy
    columns = torch.arange(width, device=values.device) + dx
    return values[..., rows.clamp(0, height - 1), :][..., columns.clamp(0, width - 1)]
