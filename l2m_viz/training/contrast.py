"""Dense contrastive learning: a point's feature in one view is to be nearest to its own in the other, among many."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from l2m_viz.training.losses import truth_at_stride


@dataclass(frozen=True)
class ContrastCfg:
    """InfoNCE (van den Oord et al., 2018)."""

    # Points drawn from each view; all others of the batch are what they must differ from.
    points: int = 128
    temperature: float = 0.07


def info_nce(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], temperature: float) -> tuple[Tensor, float]:
    """Cross-entropy of picking the partner among all, both ways, and how often the most similar one is the partner.

    Rows are of unit length. Fewer than two have nothing to differ from.
    """
    if len(a) < 2:
        return (a * 0).sum(), float("nan")
    scores = a @ b.T / temperature
    own = torch.arange(len(a), device=a.device)
    loss = 0.5 * (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own))
    return loss, (scores.argmax(dim=1) == own).float().mean().item()


def pair_contrast(
    maps: Float[Tensor, "b2 d h2 w2"],
    warp_A_to_B: Float[Tensor, "b h w 2"],
    covisibility_A_to_B: Bool[Tensor, "b h w"],
    cfg: ContrastCfg,
    draw: torch.Generator,
) -> tuple[Tensor, float]:
    """InfoNCE of corresponding points, and the share of points whose nearest feature is their own.

    Args:
        maps: Features of images A, then of images B.
        warp_A_to_B: Where each pixel of A is in B, normalised.
        covisibility_A_to_B: True where B sees it, too.
        cfg: Settings.
        draw: Draws the points.
    """
    of_A, of_B = maps.chunk(2)
    stride = warp_A_to_B.shape[1] // maps.shape[2]
    target, seen = truth_at_stride(warp_A_to_B.to(maps.device), covisibility_A_to_B.to(maps.device), stride)
    found_A, found_B = [], []
    for a, b, xy, mask in zip(of_A, of_B, target, seen, strict=True):
        cells = mask.flatten().nonzero()[:, 0]
        cells = cells[torch.randperm(len(cells), generator=draw)[: cfg.points].to(cells.device)]
        grid = xy.flatten(1)[:, cells].T[None, None]  # [1 1 n 2]
        found_A.append(a.flatten(1)[:, cells].T)
        found_B.append(F.grid_sample(b[None], grid, align_corners=False, padding_mode="border")[0, :, 0].T)
    rows_A, rows_B = (F.normalize(torch.cat(found), dim=1) for found in (found_A, found_B))
    return info_nce(rows_A, rows_B, cfg.temperature)
