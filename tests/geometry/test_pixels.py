"""Pixel centres and grids against hand-written numbers and round trips."""

import pytest
import torch

from l2m_viz.geometry import (
    flow_from_warp,
    from_integer_centers,
    inside_image,
    normalized_grid,
    pixel_grid,
    sample_image,
    to_integer_centers,
    to_normalized,
    to_pixel,
    warp_from_flow,
)

HW = (3, 5)


def test_pixel_grid_counts_centres_at_one_half():
    grid = pixel_grid(HW)
    assert grid.shape == (3, 5, 2)
    assert grid[0, 0].tolist() == [0.5, 0.5]
    assert grid[2, 4].tolist() == [4.5, 2.5]


def test_normalized_grid_is_symmetric_and_half_a_pixel_inside():
    grid = normalized_grid(HW)
    torch.testing.assert_close(grid[0, 0], torch.tensor([-1 + 1 / 5, -1 + 1 / 3]))
    torch.testing.assert_close(grid.flip(0, 1), -grid)


def test_pixel_and_normalized_are_inverse():
    points = torch.rand(7, 2, generator=torch.Generator().manual_seed(0)) * 9 - 2
    torch.testing.assert_close(to_pixel(to_normalized(points, HW), HW), points)
    assert to_normalized(torch.tensor([5.0, 3.0]), HW).tolist() == [1.0, 1.0]


def test_integer_centers_shift_once_and_back():
    assert to_integer_centers(torch.tensor([0.5, 0.5])).tolist() == [0.0, 0.0]
    points = torch.tensor([[3.25, 1.0]])
    assert torch.equal(from_integer_centers(to_integer_centers(points)), points)


def test_identity_warp_has_zero_flow_and_back():
    assert flow_from_warp(normalized_grid(HW), HW).abs().max() < 1e-6
    flow = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(flow_from_warp(warp_from_flow(flow, (7, 4)), (7, 4)), flow, atol=1e-5, rtol=0)


def test_sampling_at_the_grid_returns_the_image_in_both_modes():
    image = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(2))
    for mode in ("bilinear", "nearest"):
        torch.testing.assert_close(sample_image(image, normalized_grid(HW), mode=mode), image)
    assert sample_image(image[..., 0], normalized_grid(HW)).shape == HW


def test_sampling_between_two_pixels_is_their_mean_and_padding_is_a_choice():
    row = torch.tensor([[0.0, 2.0, 4.0, 6.0]])
    half_way = to_normalized(torch.tensor([[1.0, 0.5]]), (1, 4))
    assert sample_image(row, half_way).item() == pytest.approx(1.0)
    outside = torch.tensor([[3.0, 0.0]])
    assert sample_image(row, outside).item() == 6.0
    assert sample_image(row, outside, padding="zeros").item() == 0.0


def test_inside_includes_the_border_and_excludes_nan():
    points = torch.tensor([[1.0, -1.0], [1.0001, 0.0], [float("nan"), 0.0]])
    assert inside_image(points).tolist() == [True, False, False]
