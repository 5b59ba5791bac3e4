import math

import pytest
import torch

from l2m_viz.errors import ShapeError
from l2m_viz.geometry import normalized_grid
from l2m_viz.matching.stages import StageOutput
from l2m_viz.training.losses import (
    MatcherLossCfg,
    anchor_cross_entropy,
    matcher_losses,
    reduce_losses,
    robust_distance,
    truth_at_stride,
)

HW = (32, 48)


@pytest.fixture
def shift():
    """Truth of a picture that moved by (4, -2) px: normalised warp and where it stays inside."""
    warp = normalized_grid(HW) + torch.tensor([2 * 4 / HW[1], -2 * 2 / HW[0]])
    return warp[None], (warp.abs() <= 1).all(dim=-1)[None]


@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16])
def test_truth_of_a_shift_is_the_shift_at_every_stride(shift, stride):
    warp, seen = truth_at_stride(*shift, stride)
    cells = (HW[0] // stride, HW[1] // stride)
    expected = normalized_grid(cells).permute(2, 0, 1) + torch.tensor([8 / HW[1], -4 / HW[0]])[:, None, None]
    torch.testing.assert_close(warp[0], expected)
    assert seen.shape == (1, *cells)
    assert seen.any()


def test_a_cell_astride_a_depth_edge_has_no_truth(shift):
    warp, _ = shift
    torn = warp.clone()
    torn[0, :, 20:, 0] += 0.9  # the surface right of column 20 is elsewhere
    _, seen = truth_at_stride(torn, torch.ones(1, *HW, dtype=torch.bool), 8)
    assert not seen[0, :, 2].any()  # its middle pixels are columns 19 and 20
    assert seen[0, :, [0, 1, 3, 4]].all()


def test_a_cell_counts_only_if_its_middle_is_covisible(shift):
    seen = torch.ones(1, *HW, dtype=torch.bool)
    seen[0, 3, 4] = False
    _, at_8 = truth_at_stride(shift[0], seen, 8)
    assert not at_8[0, 0, 0]
    assert at_8.sum() == at_8.numel() - 1


def test_a_stride_must_divide_the_size(shift):
    with pytest.raises(ShapeError, match="sides that 5 divides"):
        truth_at_stride(*shift, 5)


def test_cross_entropy_by_hand():
    logits = torch.tensor([0.0, math.log(3.0)]).view(1, 2, 1, 1)  # anchors at x = -0.5 and 0.5: p = 1/4, 3/4
    at = lambda x, soft: anchor_cross_entropy(  # noqa: E731
        logits, (1, 2), torch.tensor([x, 0.0]).view(1, 2, 1, 1), soft=soft
    ).item()
    assert at(0.5, True) == pytest.approx(-math.log(0.75))
    assert at(0.0, True) == pytest.approx(-0.5 * math.log(0.25) - 0.5 * math.log(0.75))
    assert at(0.25, True) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert at(0.25, False) == pytest.approx(-math.log(0.75))
    assert at(-3.0, True) == pytest.approx(-math.log(0.25))  # beyond the border the border counts


def test_robust_distance_by_hand():
    # 0.25 scale and error 0.75: 0.25^0.5 (9 + 1)^0.25
    assert robust_distance(torch.tensor(0.75), 0.25, 0.5).item() == pytest.approx(0.5 * 10**0.25)
    assert robust_distance(torch.tensor(0.0), 0.25, 0.5).item() == pytest.approx(0.5)


def _stage(stride, warp, anchors=None):
    b, _, h, w = warp.shape
    return StageOutput(
        stride,
        warp.clone().requires_grad_(),
        torch.zeros(b, 1, h, w, requires_grad=True),
        anchor_logits=anchors,
        anchor_hw=None if anchors is None else (2, 3),
    )


def test_a_perfect_answer_costs_the_least(shift):
    warp, seen = shift
    perfect, _ = truth_at_stride(warp, seen, 8)
    cfg = MatcherLossCfg()
    exact = reduce_losses(matcher_losses([_stage(8, perfect)], warp, seen, HW, cfg), cfg)
    off = reduce_losses(matcher_losses([_stage(8, perfect + 0.1)], warp, seen, HW, cfg), cfg)
    assert exact["position_8"].item() == pytest.approx((1e-4 * 8) ** 0.5, rel=1e-3)
    assert off["position_8"] > 5 * exact["position_8"]
    assert exact["certainty_8"].item() == pytest.approx(math.log(2))


def test_the_total_has_every_iteration_of_a_refiner(shift):
    warp, seen = shift
    perfect, _ = truth_at_stride(warp, seen, 8)
    cfg = MatcherLossCfg()
    stages = [_stage(8, perfect + 0.02), _stage(8, perfect + 0.01)]
    both = reduce_losses(matcher_losses(stages, warp, seen, HW, cfg), cfg)
    first, last = (reduce_losses(matcher_losses([stage], warp, seen, HW, cfg), cfg) for stage in stages)
    assert both["total"].item() == pytest.approx((first["total"] + last["total"]).item())
    assert both["position_8"].item() == pytest.approx(last["position_8"].item())


def test_errors_are_pixels_of_the_other_image(shift):
    warp, seen = shift
    perfect, _ = truth_at_stride(warp, seen, 8)
    moved = (
        perfect + torch.tensor([2 * 3 / 100, 2 * 4 / 60])[:, None, None]
    )  # 3 px of 100 wide, 4 px of 60 high
    (loss,) = matcher_losses([_stage(8, moved)], warp, seen, (60, 100), MatcherLossCfg())
    torch.testing.assert_close(loss.epe_px[loss.covisible], torch.full((int(loss.covisible.sum()),), 5.0))


def test_a_refiner_learns_only_where_the_stage_before_was_near(shift):
    warp, seen = shift
    coarse, _ = truth_at_stride(warp, seen, 16)
    coarse = coarse.clone()
    coarse[..., 0] += 2 * 70 / HW[1]  # 70 px off in the first column: more than 8 cells of 8 px
    fine, _ = truth_at_stride(warp, seen, 8)
    logits = torch.zeros(1, 6, 2, 3, requires_grad=True)
    losses = matcher_losses([_stage(16, coarse, logits), _stage(8, fine)], warp, seen, HW, MatcherLossCfg())
    assert not losses[1].counts[..., :2].any()
    assert losses[1].counts[..., 2:].any()


def test_without_any_truth_the_loss_is_finite_and_teaches_certainty(shift):
    warp, _ = shift
    nothing = torch.zeros(1, *HW, dtype=torch.bool)
    stage = _stage(8, truth_at_stride(warp, nothing, 8)[0])
    cfg = MatcherLossCfg()
    total = reduce_losses(matcher_losses([stage], warp, nothing, HW, cfg), cfg)["total"]
    total.backward()
    assert total.item() == pytest.approx(cfg.certainty_weight * math.log(2))
    assert (stage.warp.grad == 0).all()
    assert stage.certainty_logit.grad is not None
    assert (stage.certainty_logit.grad > 0).all()  # less certain everywhere


def test_a_stage_that_saw_the_first_pairs_only_is_judged_by_their_truth(shift):
    warp, covisible = (torch.cat([part, part.roll(7, dims=1)]) for part in shift)
    coarse, fine = (_stage(stride, truth_at_stride(warp, covisible, stride)[0] + 0.05) for stride in (16, 8))
    whole = matcher_losses([coarse, fine], warp, covisible, HW, MatcherLossCfg())
    fewer = matcher_losses([coarse, fine.first(1)], warp, covisible, HW, MatcherLossCfg())
    torch.testing.assert_close(fewer[0].position, whole[0].position)
    torch.testing.assert_close(fewer[1].position, whole[1].position[:1])
    torch.testing.assert_close(fewer[1].certainty, whole[1].certainty[:1])
