"""Figures of merit against hand-made numbers and independent implementations."""

import math

import pytest
import torch

from l2m_viz.errors import L2MError
from l2m_viz.evaluation import average_precision, end_point_error, pck, psnr, ssim


def test_end_point_error_is_in_pixels_of_the_target():
    a, b = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.1, -0.2]])
    assert end_point_error(a, b, (20, 60)).item() == pytest.approx(math.hypot(0.1 * 30, 0.2 * 10))


def test_pck_counts_strictly_below():
    assert pck(torch.tensor([0.5, 1.0, 2.0, 4.0]), 1.0) == 0.25
    with pytest.raises(L2MError, match="at least one pixel"):
        pck(torch.zeros(0), 1.0)


def test_average_precision_by_hand_and_with_ties():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    labels = torch.tensor([True, False, True, False])
    assert average_precision(scores, labels) == pytest.approx((1 + 2 / 3) / 2)
    # all equal: one step, precision = share of positives, whatever the order
    assert average_precision(torch.ones(4), labels) == pytest.approx(0.5)
    assert average_precision(torch.ones(4), labels.flip(0)) == pytest.approx(0.5)
    assert math.isnan(average_precision(scores, torch.zeros(4, dtype=torch.bool)))


def test_average_precision_of_random_scores_is_the_base_rate():
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(20000, generator=generator) < 0.3
    assert average_precision(torch.rand(20000, generator=generator), labels) == pytest.approx(0.3, abs=0.02)


def test_psnr_of_a_constant_error():
    truth = torch.rand(6, 9, 3, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(6, 9, dtype=torch.bool)
    assert psnr(truth + 0.1, truth, mask) == pytest.approx(20.0, abs=1e-3)
    assert psnr(truth, truth, mask) == math.inf
    mask[:, 4:] = False
    spoiled = truth.clone()
    spoiled[:, 4:] = 0
    assert psnr(spoiled, truth, mask) == math.inf


def test_ssim_is_one_for_equal_pictures_and_ignores_holes():
    truth = torch.rand(30, 40, 3, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(30, 40, dtype=torch.bool)
    mask[10:14, 20:25] = False
    spoiled = truth.clone()
    spoiled[~mask] = 0
    assert ssim(spoiled, truth, mask) == pytest.approx(1.0)
    assert ssim(truth.flip(0), truth, mask) < 0.2
    with pytest.raises(L2MError, match="at least one pixel"):
        ssim(truth, truth, torch.zeros(30, 40, dtype=torch.bool))
