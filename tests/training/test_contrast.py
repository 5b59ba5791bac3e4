"""The contrastive loss, judged by hand and by views whose correspondence is a shift."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from l2m_viz.geometry import pixel_grid, to_normalized
from l2m_viz.training.contrast import ContrastCfg, info_nce, pair_contrast

HW = (48, 64)


def test_info_nce_by_hand():
    a = torch.eye(2)
    loss, hits = info_nce(a, a, temperature=1.0)  # scores 1 on the diagonal, 0 beside it
    assert loss.item() == pytest.approx(-torch.tensor([1.0, 0.0]).log_softmax(0)[0].item())
    assert hits == 1
    _, hits = info_nce(a, a.flip(0), temperature=1.0)
    assert hits == 0


def test_one_point_has_nothing_to_differ_from():
    a = torch.ones(1, 3, requires_grad=True)
    loss, _ = info_nce(a, a, 0.1)
    loss.backward()
    assert loss.item() == 0


def shifted(count=2, shift_px=8.0):
    """Warp and covisibility where B shows what A shows 8 px further right; the last 8 columns of A have left."""
    grid = pixel_grid(HW)
    target = grid + torch.tensor([shift_px, 0.0])
    covisible = target[..., 0] < HW[1]
    return to_normalized(target, HW).expand(count, *HW, 2), covisible.expand(count, *HW)


def test_features_that_move_with_the_picture_are_found_all():
    draw = torch.Generator().manual_seed(0)
    of_A = torch.randn(2, 32, 6, 8, generator=draw)
    of_B = of_A.roll(1, dims=3)  # one cell to the right
    cfg = ContrastCfg(points=1000)
    loss, hits = pair_contrast(torch.cat([of_A, of_B]), *shifted(), cfg, draw)
    assert hits == 1
    # 2 pairs of 6 x 7 covisible cells; the loss is that of these very features
    rows = F.normalize(of_A[..., :7].permute(0, 2, 3, 1).reshape(-1, 32), dim=1)
    scores = rows @ rows.T / cfg.temperature
    assert loss.item() == pytest.approx(-scores.log_softmax(1).diag().mean().item(), rel=1e-4)
    _, hits = pair_contrast(torch.cat([of_A, of_B.flip(0)]), *shifted(), cfg, draw)
    assert hits < 0.2


def test_the_length_of_features_does_not_count():
    maps = torch.randn(4, 16, 6, 8, generator=torch.Generator().manual_seed(0))
    cfg = ContrastCfg(points=1000)
    loss, _ = pair_contrast(maps, *shifted(), cfg, torch.Generator().manual_seed(1))
    scaled, _ = pair_contrast(7 * maps, *shifted(), cfg, torch.Generator().manual_seed(1))
    assert scaled.item() == pytest.approx(loss.item(), rel=1e-5)
    hotter, _ = pair_contrast(
        maps, *shifted(), replace(cfg, temperature=1.0), torch.Generator().manual_seed(1)
    )
    assert hotter < loss  # random features: the surer, the worse


def test_nothing_covisible_gives_zero_and_no_nan():
    warp, covisible = shifted()
    maps = torch.randn(4, 16, 6, 8, requires_grad=True)
    loss, hits = pair_contrast(maps, warp, torch.zeros_like(covisible), ContrastCfg(), torch.Generator())
    loss.backward()
    assert loss.item() == 0
    assert math.isnan(hits)
    assert torch.isfinite(maps.grad).all()
