"""Losses of the dense matcher: RoMa's (Edstedt et al., CVPR 2024, section 3.4), as maps first and numbers after.

Symbols: s the stride of a stage, epe the end-point error. Lengths are in normalised units, in which an image's side is
2; for images that are not square an error in pixels is divided by half the geometric mean of the sides.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from l2m_viz.errors import ShapeError
from l2m_viz.geometry import HW
from l2m_viz.matching.stages import StageOutput


@dataclass(frozen=True)
class MatcherLossCfg:
    """Weights and shapes of the terms; the defaults are RoMa's where nothing else is said."""

    certainty_weight: float = 0.01
    # Exponent and scale of the generalised Charbonnier penalty; the scale is multiplied by the stride.
    robust_exponent: float = 0.5
    robust_scale: float = 1e-4
    # A refiner learns only where the stage before it was within this many cells of its own: {stride: cells}.
    reach: dict[int, float] = field(default_factory=lambda: {1: 4.0, 2: 4.0, 4: 8.0, 8: 8.0})
    # Share the coarse target between the four nearest anchors by bilinear weights; RoMa takes the nearest one.
    soft_anchors: bool = True


@dataclass(frozen=True)
class StageLoss:
    """One stage's loss at every cell, before any mean.

    Attributes:
        position: Cross-entropy of the anchors or robust distance; 0 where it does not count.
        certainty: Binary cross-entropy of the certainty.
        counts: Where ``position`` counts.
        epe_px: End-point error in pixels of the other image where there is truth, else 0.
        covisible: Where there is truth.
    """

    stride: int
    position: Float[Tensor, "b h w"]
    certainty: Float[Tensor, "b h w"]
    counts: Bool[Tensor, "b h w"]
    epe_px: Float[Tensor, "b h w"]
    covisible: Bool[Tensor, "b h w"]


def truth_at_stride(
    warp: Float[Tensor, "b h w 2"], covisibility: Bool[Tensor, "b h w"], stride: int
) -> tuple[Float[Tensor, "b 2 h2 w2"], Bool[Tensor, "b h2 w2"]]:
    """Read the truth at the centres of a stage's cells.

    An even cell's centre lies between its four middle pixels: their mean, if all four are covisible and land together
    (a cell astride a depth edge has no one answer).

    Raises:
        ShapeError: the stride does not divide the size, or is neither 1 nor even.
    """
    height, width = covisibility.shape[-2:]
    if height % stride or width % stride or (stride > 1 and stride % 2):
        raise ShapeError("truth_at_stride", expected=f"sides that {stride} divides", got=f"{height}x{width}")
    if stride == 1:
        return warp.permute(0, 3, 1, 2), covisibility
    middle = slice(stride // 2 - 1, stride // 2 + 1)
    cells = warp.unflatten(2, (-1, stride)).unflatten(1, (-1, stride))[
        :, :, middle, :, middle
    ]  # [b h 2 w 2 xy]
    seen = covisibility.unflatten(2, (-1, stride)).unflatten(1, (-1, stride))[:, :, middle, :, middle]
    spread = (cells.amax(dim=(2, 4)) - cells.amin(dim=(2, 4))).amax(dim=-1)
    together = spread < 2 * _MAX_STRETCH * 2 / min(height, width)
    return cells.mean(dim=(2, 4)).permute(0, 3, 1, 2), seen.all(dim=4).all(dim=2) & together


_MAX_STRETCH = (
    4  # px in the other image for one px in this one; beyond it two neighbours are on different surfaces
)


def matcher_losses(
    stages: list[StageOutput],
    warp: Float[Tensor, "b h w 2"],
    covisibility: Bool[Tensor, "b h w"],
    hw_to: HW,
    cfg: MatcherLossCfg,
) -> list[StageLoss]:
    """The loss of every stage of one direction.

    Args:
        stages: What the network predicted, coarse first; each for all pairs of the batch or for the first of them.
        warp: True position in the other image, normalised; anything (finite) where not covisible.
        covisibility: Where the truth is known.
        hw_to: Size of the other image in pixels.
        cfg: Settings.
    """
    losses, before = [], None
    for stage in stages:
        n = len(stage.warp)
        target, seen = truth_at_stride(warp[:n], covisibility[:n], stage.stride)
        counts = seen
        if before is not None and stage.anchor_logits is None and stage.stride in cfg.reach:
            near = _upsampled(before[:n], seen) < cfg.reach[stage.stride] * stage.stride
            counts = seen & near
        epe_px = _epe_px(stage.warp, target, hw_to) * seen
        if stage.anchor_logits is not None and stage.anchor_hw is not None:
            position = anchor_cross_entropy(
                stage.anchor_logits, stage.anchor_hw, target, soft=cfg.soft_anchors
            )
        else:
            normalized = epe_px * 2 / (hw_to[0] * hw_to[1]) ** 0.5
            position = robust_distance(normalized, cfg.robust_scale * stage.stride, cfg.robust_exponent)
        logit = stage.certainty_logit[:, 0].float()
        certainty = F.binary_cross_entropy_with_logits(logit, counts.float(), reduction="none")
        losses.append(
            StageLoss(stage.stride, torch.where(counts, position, 0.0), certainty, counts, epe_px, seen)
        )
        before = epe_px.detach()
    return losses


def anchor_cross_entropy(
    logits: Float[Tensor, "b a h w"], anchor_hw: HW, target: Float[Tensor, "b 2 h w"], *, soft: bool
) -> Float[Tensor, "b h w"]:
    """Cross-entropy of the anchors' scores against the anchors nearest to the target (RoMa, eq. 10)."""
    rows, columns = anchor_hw
    x = ((target[:, 0] + 1) / 2 * columns - 0.5).clamp(0, columns - 1)
    y = ((target[:, 1] + 1) / 2 * rows - 0.5).clamp(0, rows - 1)
    log_p = F.log_softmax(logits.float(), dim=1)
    if not soft:
        index = y.round().long() * columns + x.round().long()
        return -log_p.gather(1, index[:, None])[:, 0]
    x0, y0 = x.floor(), y.floor()
    loss = torch.zeros_like(x)
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (1 - (x - x0 - dx).abs()) * (1 - (y - y0 - dy).abs())
            index = (y0 + dy).clamp(max=rows - 1) * columns + (x0 + dx).clamp(max=columns - 1)
            loss = loss - weight * log_p.gather(1, index.long()[:, None])[:, 0]
    return loss


def robust_distance(epe: Float[Tensor, "*n"], scale: float, exponent: float) -> Float[Tensor, "*n"]:
    """Generalised Charbonnier penalty scale^a ((epe / scale)^2 + 1)^(a / 2) (Barron, CVPR 2019; RoMa, eq. 11)."""
    return scale**exponent * ((epe / scale).square() + 1) ** (exponent / 2)


def reduce_losses(losses: list[StageLoss], cfg: MatcherLossCfg) -> dict[str, Tensor]:
    """Means over the cells that count, and their ``total``; a batch without any truth gives 0, never NaN.

    Of a refiner that runs more than once the last iteration is named; the total has all.
    """
    terms: dict[str, Tensor] = {}
    total = torch.zeros((), device=losses[0].certainty.device)
    for loss in losses:
        position = loss.position.sum() / loss.counts.sum().clamp(min=1)
        certainty = loss.certainty.mean()
        terms[f"position_{loss.stride}"], terms[f"certainty_{loss.stride}"] = position, certainty
        total = total + position + cfg.certainty_weight * certainty
    return terms | {"total": total}


def _epe_px(warp: Tensor, target: Tensor, hw_to: HW) -> Float[Tensor, "b h w"]:
    """End-point error in pixels of the other image; its gradient at 0 is 0."""
    difference = warp.float() - target
    x, y = difference[:, 0] * (hw_to[1] / 2), difference[:, 1] * (hw_to[0] / 2)
    return (x * x + y * y + 1e-12).sqrt()


def _upsampled(
    epe_px: Float[Tensor, "b h w"], like: Float[Tensor, "b h2 w2"] | Tensor
) -> Float[Tensor, "b h2 w2"]:
    return F.interpolate(epe_px[:, None], size=like.shape[-2:], mode="nearest")[:, 0]
