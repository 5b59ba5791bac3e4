"""What stage 1 teaches: features that a frozen teacher said of several views, lifted to 3D and rendered at a view.

Symbols: s the stride of a feature map in pixels; a cell is s x s pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from l2m_viz.data.images import resize_image
from l2m_viz.gaussians import (
    FeatureView,
    FitCfg,
    Gaussians,
    LiftedFeatures,
    gaussians_from_depth,
    lift_features,
    rasterize,
)
from l2m_viz.gaussians.lift_features import Method
from l2m_viz.geometry import HW
from l2m_viz.lifting import View
from l2m_viz.training.contrast import ContrastCfg, info_nce


@dataclass(frozen=True)
class GoalCfg:
    """How the teacher's features come to a view."""

    # Into Gaussians: their weighted mean, in a blink, or FiT3D's optimisation, in many seconds a photo.
    method: Method = "closed-form"
    fit: FitCfg = field(default_factory=lambda: FitCfg(num_steps=100))
    # Cells that the Gaussians cover less than this teach nothing.
    min_alpha: float = 0.9
    # Gaussians to the side of a cell at most: features are smooth, and four are drawn sixteen times as fast as eight.
    gaussians_a_cell: int = 4


@dataclass(frozen=True)
class Goal:
    """What the student is to say at one view.

    Attributes:
        features: Rendered from the lifted features.
        seen: True where the photo showed the scene, and the Gaussians cover the cell.
    """

    features: Float[Tensor, "h w d"]
    seen: Bool[Tensor, "h w"]


@torch.no_grad()
def feature_goals(
    maps: Float[Tensor, "n d h w"], known: Sequence[View], at: Sequence[View], stride: int, cfg: GoalCfg
) -> list[Goal]:
    """Lift what the teacher said of the known views into Gaussians, and render it elsewhere.

    Args:
        maps: The teacher's features, one map a known view.
        known: The photo itself, then other views of it.
        at: Where to render.
        stride: Of the maps.
        cfg: Settings.
    """
    step = next(t for t in range(max(1, stride // cfg.gaussians_a_cell), 0, -1) if stride % t == 0)
    views = [_feature_view(view, features, stride, step) for view, features in zip(known, maps, strict=True)]
    if cfg.method == "closed-form":
        views = [replace(view, image=None, image_mask=None) for view in views]
    with torch.enable_grad():
        lifted = lift_features(thinned_gaussians(known[0], step), views, cfg.method, cfg.fit)
    return [_goal(lifted, view, stride, step, cfg.min_alpha) for view in at]


def thinned_gaussians(photo: View, step: int) -> Gaussians:
    """Gaussians of every step-th pixel of every step-th row of a photo, each as large as what it stands for."""
    first = step // 2
    depth = torch.where(photo.hole_mask, torch.nan, photo.depth)[first::step, first::step]
    # Pixel i of the thinned photo has its centre, i + 0.5, at step i + first + 0.5 of the photo.
    K = photo.camera.K.clone()
    K[:2, 2] = (K[:2, 2] - first - 0.5) / step + 0.5
    K[[0, 1], [0, 1]] /= step
    return gaussians_from_depth(photo.image[first::step, first::step].contiguous(), depth.contiguous(), K)


def goal_losses(
    said: Float[Tensor, "v d h w"], goals: Sequence[Goal], cfg: ContrastCfg, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """How far the student is from the goals, and InfoNCE between the two over the places of these views.

    The distance is FiT3D's L1, over the goals' own mean deviation: saying their mean everywhere has distance 1. The
    views are of different scenes, or one place would be told apart from itself.
    """
    a = torch.cat(
        [rows.permute(1, 2, 0)[goal.seen.to(rows.device)] for rows, goal in zip(said, goals, strict=True)]
    )
    b = torch.cat([goal.features[goal.seen] for goal in goals]).to(a.device)
    if len(a) < 2:
        return (said * 0).sum(), (said * 0).sum()
    deviation = (b - b.mean(dim=0)).abs().mean()
    agree = (a - b).abs().mean() / deviation.clamp(min=1e-6)
    chosen = torch.randperm(len(a), generator=draw)[: cfg.points * len(goals)].to(a.device)
    contrast, _ = info_nce(F.normalize(a[chosen], dim=1), F.normalize(b[chosen], dim=1), cfg.temperature)
    return agree, contrast


def _feature_view(view: View, features: Float[Tensor, "d h w"], stride: int, step: int) -> FeatureView:
    """A known view at the Gaussians' resolution; only cells and pixels that the photo showed are believed."""
    shown = ~view.hole_mask & ~view.inpainted_mask
    hw = _divided(shown, step)
    return FeatureView(
        view.camera.resized(hw),
        features.permute(1, 2, 0).float().cpu(),
        mask=whole_cells(shown, stride),
        image=resize_image(view.image, hw),
        image_mask=whole_cells(shown, step),
    )


def _goal(lifted: LiftedFeatures, view: View, stride: int, step: int, min_alpha: float) -> Goal:
    """Render at the Gaussians' resolution, then take each cell's mean.

    At a cell a pixel, the nearest of the many Gaussians in it would hide all others: features would come from one of
    its corners.
    """
    shown = ~view.hole_mask & ~view.inpainted_mask
    render = rasterize(lifted.gaussians, view.camera.resized(_divided(shown, step)))
    assert render.features is not None
    features, alpha = render.features, render.alpha[..., None]
    if lifted.up_projection is not None:  # learned on what is composited over nothing
        features = lifted.decode(features / alpha.clamp(min=1e-6)) * alpha
    both = torch.cat([features, alpha], dim=-1).permute(2, 0, 1)
    *sums, covered = F.avg_pool2d(both, stride // step)
    # What is composited is a sum of weights alpha; divided by it, it is their mean.
    goal = torch.stack(sums, dim=-1) / covered[..., None].clamp(min=1e-6)
    return Goal(goal, (covered > min_alpha) & whole_cells(shown, stride))


def whole_cells(mask: Bool[Tensor, "h w"], stride: int) -> Bool[Tensor, "h2 w2"]:
    """Cells all of whose pixels are in the mask."""
    hw = _divided(mask, stride)
    return mask.reshape(hw[0], stride, hw[1], stride).all(dim=3).all(dim=1)


def _divided(mask: Bool[Tensor, "h w"], stride: int) -> HW:
    return mask.shape[0] // stride, mask.shape[1] // stride
