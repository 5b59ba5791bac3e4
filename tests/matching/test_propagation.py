"""Propagation on surfaces whose truth is known, against its definition cell by cell, and its two forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from l2m_viz.errors import L2MError
from l2m_viz.geometry import normalized_grid
from l2m_viz.matching.propagation import PropagationCfg, propagate

HW, DTYPES = (30, 44), (torch.float32, torch.float64)  # the kernel, and torch operations
EDGE, HALO = 20, 5  # first column of the right surface; columns left of it that the warp gets wrong


def _doubt(warp):
    """Logits of a certainty at which every cell asks."""
    return torch.zeros_like(warp[:, :1])


def _cells(hw, dtype=torch.float32):
    """Normalised size (x, y) of a cell."""
    return torch.tensor([2 / hw[1], 2 / hw[0]], dtype=dtype).view(2, 1, 1)


def _two_surfaces(dtype):
    """B is A with everything left of an edge moved by (3, 1) cells and the rest by (-4, 0), and the true warp."""
    generator = torch.Generator().manual_seed(1)
    features_A = torch.randn(1, 8, *HW, generator=generator, dtype=dtype)
    features_B = torch.randn(1, 8, *HW, generator=generator, dtype=dtype)
    features_B[..., 1:, 3 : EDGE + 3] = features_A[..., :-1, :EDGE]
    features_B[..., : HW[1] - 4][..., EDGE + 3 :] = features_A[..., EDGE + 7 :]  # behind it, where both land
    moved = torch.tensor([-4.0, 0.0], dtype=dtype).view(2, 1, 1).expand(2, *HW).clone()
    moved[:, :, :EDGE] = torch.tensor([3.0, 1.0], dtype=dtype).view(2, 1, 1)
    warp = normalized_grid(HW, dtype=dtype).permute(2, 0, 1) + moved * _cells(HW, dtype)
    return features_A, features_B, warp[None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_smeared_edge_becomes_sharp(dtype):
    features_A, features_B, true = _two_surfaces(dtype)
    smeared = true.clone()  # the right surface's motion reaches over the left one's border
    grid = normalized_grid(HW, dtype=dtype).permute(2, 0, 1)
    smeared[..., EDGE - HALO : EDGE] = (
        grid + torch.tensor([-4.0, 0.0], dtype=dtype).view(2, 1, 1) * _cells(HW, dtype)
    )[..., EDGE - HALO : EDGE]
    result = propagate(features_A, features_B, smeared, _doubt(smeared))
    # not beside the border of the picture, where the window is half outside of what was copied
    inner = (..., slice(2, -3), slice(2, EDGE - 1))
    torch.testing.assert_close(result[inner], true[inner], atol=1e-5, rtol=0)
    assert not torch.allclose(smeared[inner], true[inner], atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_right_stays_as_it_is(dtype):
    features_A, features_B, true = _two_surfaces(dtype)
    result = propagate(features_A, features_B, true, _doubt(true))
    torch.testing.assert_close(
        result[..., 2:-3, 2 : EDGE - 1], true[..., 2:-3, 2 : EDGE - 1], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_affine_warp_is_continued_to_itself_whatever_the_features_say(dtype):
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, 2, 5, *HW, generator=generator, dtype=dtype)
    turn = torch.tensor([[0.8, -0.5], [0.4, 0.9]], dtype=dtype)
    warp = (normalized_grid(HW, dtype=dtype) @ turn.T + 0.1).permute(2, 0, 1).expand(2, 2, *HW)
    inner = (
        ...,
        slice(10, -10),
        slice(10, -10),
    )  # as far in as twice the largest reach: both neighbours exist
    cfg = PropagationCfg(reaches=(2, 5), margin=0.0, min_move=1e-3)
    result = propagate(features[0], features[1], warp, _doubt(warp), cfg)
    torch.testing.assert_close(result[inner], warp[inner], atol=1e-6, rtol=0)


def _by_definition(features_A, features_B, warp, certainty, cfg):
    """One cell, one candidate, one cell of its window at a time."""
    (h, w), (h2, w2) = features_A.shape[-2:], features_B.shape[-2:]
    units_A, units_B = F.normalize(features_A, dim=1), F.normalize(features_B, dim=1)
    displacement = warp - normalized_grid((h, w), dtype=warp.dtype).permute(2, 0, 1)

    def candidate(b, row, column, step):
        near, far = (
            (min(max(row + n * step[0], 0), h - 1), min(max(column + n * step[1], 0), w - 1)) for n in (1, 2)
        )
        moved = 2 * displacement[b, :, near[0], near[1]] - displacement[b, :, far[0], far[1]]
        return warp[b, :, row, column] - displacement[b, :, row, column] + moved

    def agreement(b, row, column, step):
        target = candidate(b, row, column, step) if step else warp[b, :, row, column]
        sampled = F.grid_sample(units_B[b : b + 1], target.view(1, 1, 1, 2), align_corners=False)
        return (units_A[b, :, row, column] * sampled[0, :, 0, 0]).sum().item()

    out, half = warp.clone(), cfg.window // 2
    steps = [(r * v, r * u) for r in cfg.reaches for v, u in ((-1, 0), (0, -1), (0, 1), (1, 0))]
    for b in range(len(warp)):
        for row in range(h):
            for column in range(w):
                if not cfg.asking[0] <= certainty[b, 0, row, column] <= cfg.asking[1]:
                    continue
                window = [
                    (v, u)
                    for v in range(max(0, row - half), min(h, row + half + 1))
                    for u in range(max(0, column - half), min(w, column + half + 1))
                ]
                mean = lambda step: sum(agreement(b, *cell, step) for cell in window) / len(window)  # noqa: E731, B023
                best = cfg.margin + mean(None)
                for step in steps:
                    place = candidate(b, row, column, step)
                    cells = (place - warp[b, :, row, column]) * torch.tensor([w2 / 2, h2 / 2])
                    if cells.norm() > cfg.min_move and mean(step) > best:
                        best, out[b, :, row, column] = mean(step), place
    return out


def _noise(hw_A=(7, 9), hw_B=(6, 11), channels=5, amount=0.3):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    warp = normalized_grid(hw_A, dtype=torch.float64).permute(2, 0, 1) + amount * draw(2, 2, *hw_A)
    return draw(2, channels, *hw_A), draw(2, channels, *hw_B), warp


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_definition(dtype):
    features_A, features_B, warp = _noise()
    cfg = PropagationCfg(reaches=(1, 3), margin=0.05, asking=(0.2, 0.9))
    logit = torch.randn(2, 1, 7, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2
    expected = _by_definition(features_A, features_B, warp, logit.sigmoid(), cfg)
    assert (expected != warp).any(dim=1).float().mean() > 0.2
    result = propagate(features_A.to(dtype), features_B.to(dtype), warp.to(dtype), logit.to(dtype), cfg)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [3, 8, 33])  # fewer than a vector register holds, as many, and more
@pytest.mark.parametrize("amount", [0.02, 1.0])  # and with most targets outside
def test_both_forms_agree(channels, amount):
    features_A, features_B, warp = _noise((37, 50), (41, 33), channels, amount)
    exact = propagate(features_A, features_B, warp, _doubt(warp))
    torch.testing.assert_close(
        propagate(features_A.float(), features_B.float(), warp.float(), _doubt(warp)).double(),
        exact,
        atol=1e-5,
        rtol=0,
    )


def test_a_higher_margin_moves_less():
    features_A, features_B, warp = (part.float() for part in _noise((20, 30), (22, 28)))
    moved = [
        (
            (
                propagate(features_A, features_B, warp, _doubt(warp), PropagationCfg(margin=margin)) - warp
            ).abs()
            > 1e-4
        )
        .sum()
        .item()
        for margin in (0.0, 0.3, 2.1)  # cosines differ by 2 at most
    ]
    assert moved[0] > moved[1] > moved[2] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_targets_that_are_nowhere_do_not_spread(dtype):
    features_A, features_B, warp = (part.to(dtype) for part in _noise((20, 30), (22, 28)))
    warp[:, :, 3, 4], warp[:, :, 8, 20] = math.nan, math.inf
    result = propagate(features_A, features_B, warp, _doubt(warp))
    assert result[:, :, 3, 4].isnan().all()
    rest = torch.ones(20, 30, dtype=torch.bool)
    rest[3, 4] = rest[8, 20] = False
    assert result[:, :, rest].isfinite().all()


def test_half_precision_features_are_compared_in_float32():
    features_A, features_B, warp = _noise((20, 30), (22, 28))
    half = features_A.bfloat16(), features_B.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = propagate(*half, warp.float(), _doubt(warp))
    assert result.dtype == torch.float32
    torch.testing.assert_close(
        result, propagate(*(part.float() for part in half), warp.float(), _doubt(warp))
    )


def test_no_gradient_goes_through():
    features_A, features_B, warp = (part.float().requires_grad_() for part in _noise())
    assert not propagate(features_A, features_B, warp, _doubt(warp)).requires_grad


@pytest.mark.parametrize(
    "wrong", [{"reaches": ()}, {"reaches": (0, 4)}, {"window": 4}, {"window": 0}, {"asking": (0.9, 0.1)}]
)
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(L2MError, match=next(iter(wrong))):
        PropagationCfg(**wrong)
