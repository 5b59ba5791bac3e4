"""Pictures of training pairs show the truth they were given: colours tie points together, grey is what is unknown."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection

from l2m_viz.data import load_sample
from l2m_viz.errors import ShapeError
from l2m_viz.geometry import project, transform_points, unproject_depth
from l2m_viz.show.colors import NOTHING
from l2m_viz.show.pairs import contact_sheet, position_colors, sample_correspondences, warp_error
from l2m_viz.training import PairCfg, make_pair

HW = (48, 64)


@pytest.fixture(scope="module")
def pair():
    return make_pair(load_sample("coffee").image_A, PairCfg(hw=HW, difficulty=0.6), seed=2)


@pytest.fixture(scope="module")
def still():
    """A pair whose second camera is the first."""
    return make_pair(load_sample("coffee").image_A, PairCfg(hw=HW, difficulty=0.0), seed=2)


def _sampled(pair, num):
    return sample_correspondences(pair, num, torch.Generator().manual_seed(0))


def test_correspondences_are_covisible_pixels_and_the_projections_of_their_depth(pair):
    matches = _sampled(pair, 50)
    x, y = matches.points_A.T
    assert ((matches.points_A % 1) == 0.5).all()
    assert pair.covisibility_A_to_B[y.long(), x.long()].all()
    points = transform_points(pair.T_A_to_B, unproject_depth(pair.depth_A, pair.K_A))
    expected, _ = project(points, pair.K_B)
    torch.testing.assert_close(matches.points_B, expected[y.long(), x.long()], atol=5e-3, rtol=0)


def test_correspondences_are_spread_and_at_most_as_many_as_asked(still):
    seen = torch.ones(HW, dtype=torch.bool)
    everywhere = replace(still, covisibility_A_to_B=seen)
    points = _sampled(everywhere, 48).points_A
    assert 40 <= len(points) <= 48 and len(points.unique(dim=0)) == len(points)
    for top in (0, 24):
        for left in (0, 16, 32, 48):  # eight parts of 24x16 px, about six points each
            inside = (points[:, 1] // 24 == top // 24) & (points[:, 0] // 16 == left // 16)
            assert 3 <= inside.sum() <= 9
    assert len(_sampled(everywhere, 10_000)) == HW[0] * HW[1]
    few = torch.zeros_like(seen)
    few[10, 20], few[40, 3] = True, True
    assert sorted(_sampled(replace(still, covisibility_A_to_B=few), 48).points_A.tolist()) == [
        [3.5, 40.5],
        [20.5, 10.5],
    ]
    assert len(_sampled(replace(still, covisibility_A_to_B=~seen), 48)) == 0


def test_every_place_has_a_colour_of_its_own():
    middle, right, left, top, bottom = position_colors(
        torch.tensor([[32.0, 24.0], [64.0, 24.0], [0.0, 24.0], [32.0, 0.0], [32.0, 48.0]]), HW
    )
    torch.testing.assert_close(middle, torch.ones(3))
    torch.testing.assert_close(right, torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(left, torch.tensor([0.0, 1.0, 1.0]))
    assert (top - bottom).abs().sum() > 1


def test_without_motion_the_warped_picture_is_the_picture(still):
    warped, error = warp_error(still)
    seen = still.covisibility_A_to_B
    assert seen.float().mean() > 0.5
    assert error[seen].max() < 1e-3
    torch.testing.assert_close(warped[seen], still.image_A[seen], atol=1e-3, rtol=0)


def test_the_error_is_that_of_the_colours(still):
    brighter = replace(still, image_A=still.image_A * 0.5, image_B=still.image_B * 0.5 + 0.125)
    _, error = warp_error(brighter)
    seen = still.covisibility_A_to_B
    torch.testing.assert_close(error[seen], torch.full((int(seen.sum()),), 0.125), atol=1e-3, rtol=0)


def test_a_sheet_has_a_row_of_five_for_each_pair(pair, still):
    figure = contact_sheet([pair, still, pair], ["one", "two", "three"])
    pictures = [axis for axis in figure.axes if axis.images]
    assert len(pictures) == 15
    columns = [axis.get_title() for axis in pictures[:5]]
    assert columns == ["A", "B", "B warped into A", "covisible in A", "error"]
    assert [axis.get_ylabel() for axis in pictures[::5]] == ["one", "two", "three"]
    boxes = np.array([axis.get_position().extents for axis in pictures])
    assert boxes.min() >= 0 and boxes.max() <= 1
    for first in range(len(boxes)):  # nothing covers anything
        apart = (boxes[first, :2] >= boxes[:, 2:] - 1e-9) | (boxes[:, :2] >= boxes[first, 2:] - 1e-9)
        assert apart.any(axis=1).sum() == len(boxes) - 1
    width, height = figure.get_size_inches()
    sizes = (boxes[:, 2:] - boxes[:, :2]) * [width, height]
    np.testing.assert_allclose(sizes[:, 1] / sizes[:, 0], HW[0] / HW[1])


def test_pairs_may_stand_side_by_side(pair):
    one, two = contact_sheet([pair] * 4), contact_sheet([pair] * 4, side_by_side=2)
    assert sum(bool(axis.images) for axis in two.axes) == 20
    np.testing.assert_allclose(two.get_figwidth(), 2 * one.get_figwidth())
    assert two.get_figheight() < 0.7 * one.get_figheight()
    titles = [axis.get_title() for axis in two.axes if axis.images]
    assert sum(title == "B" for title in titles) == 2


def test_dots_of_one_colour_are_one_point_and_what_is_unseen_is_grey(pair):
    axes = [axis for axis in contact_sheet([pair]).axes if axis.images]
    dots = [[c for c in axis.collections if isinstance(c, PathCollection)] for axis in axes]
    assert [len(found) for found in dots] == [1, 1, 0, 0, 0]
    (in_A,), (in_B,), *_ = dots
    np.testing.assert_array_equal(in_A.get_facecolors(), in_B.get_facecolors())
    expected = _sampled(pair, 40)
    np.testing.assert_allclose(in_A.get_offsets(), expected.points_A, atol=1e-4)
    np.testing.assert_allclose(in_B.get_offsets(), expected.points_B, atol=1e-4)
    unseen = ~pair.covisibility_A_to_B.numpy()
    for axis in (axes[2], axes[4]):
        assert (axis.images[0].get_array()[unseen] == NOTHING).all()
    assert (axes[3].images[0].get_array()[..., 0] == ~unseen).all()


def test_nothing_to_draw_and_titles_of_others_are_errors(pair):
    with pytest.raises(ShapeError, match="0 and 0"):
        contact_sheet([])
    with pytest.raises(ShapeError, match="2 and 1"):
        contact_sheet([pair, pair], ["one"])
