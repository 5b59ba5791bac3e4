import numpy as np
import pytest
import torch
from torch.nn import functional as F

from l2m_viz.encoders import load_encoder
from l2m_viz.encoders.encoder import Encoder
from l2m_viz.errors import ShapeError
from l2m_viz.evaluation import EvalPair
from l2m_viz.geometry import pixel_grid, warp_from_flow
from l2m_viz.show.features import compare_encoders, feature_distance

HW = (48, 80)


class Mean(Encoder):
    """The mean colour of each cell, in another scale and with another channel order each."""

    stride, dim = 8, 3

    def __init__(self, name, order):
        self.name, self.order = name, order

    def _encode(self, image):
        return F.avg_pool2d(image.permute(2, 0, 1), 8).permute(1, 2, 0)[..., self.order]


def make_pair(shift_px=16.0):
    """B's content lies 16 px right of A's."""
    image_A = torch.rand(*HW, 3, generator=torch.Generator().manual_seed(0))
    covisible = (pixel_grid(HW)[..., 0] + shift_px) < HW[1]
    warp = warp_from_flow(torch.tensor([shift_px, 0.0]).expand(*HW, 2), HW)
    known = torch.ones_like(covisible)
    return EvalPair("wall", "a-b", image_A, image_A.roll(int(shift_px), dims=1), warp, covisible, known)


def test_distance_is_zero_where_features_move_with_the_point_and_two_where_they_turn_round():
    features = torch.randn(6, 10, 4, generator=torch.Generator().manual_seed(1))
    moved = features.roll(2, dims=1)
    distance, seen = feature_distance(features, moved, make_pair())
    assert torch.equal(seen, torch.arange(10).expand(6, 10) < 8)
    torch.testing.assert_close(distance[seen], torch.zeros(48), atol=1e-5, rtol=0)
    opposite, _ = feature_distance(features, -3 * moved, make_pair())
    torch.testing.assert_close(opposite[seen], torch.full((48,), 2.0), atol=1e-5, rtol=0)
    with pytest.raises(ShapeError, match="4 and 2 channels"):
        feature_distance(features, moved[..., :2], make_pair())


def pictures(figure):
    return {
        axis.get_title(): np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.get_title()
    }


def test_equal_features_have_equal_colours_across_views_and_encoders():
    encoders = [("first", Mean("first", [0, 1, 2])), ("second", Mean("second", [0, 1, 2]))]
    shown = pictures(compare_encoders(encoders, make_pair()))
    assert len(shown) == 3 + 2 * 3 - 1  # both have the same title of the distances
    here, there = shown["first: the photo"], shown["first: from elsewhere"]
    torch.testing.assert_close(torch.as_tensor(here)[:, :8], torch.as_tensor(there)[:, 2:])
    torch.testing.assert_close(torch.as_tensor(here), torch.as_tensor(shown["second: the photo"]))
    other = pictures(compare_encoders([encoders[0], ("turned", Mean("turned", [2, 0, 1]))], make_pair()))
    assert abs(other["first: the photo"] - other["turned: the photo"]).max() > 0.1


def test_encoders_of_other_widths_have_a_basis_of_their_own():
    figure = compare_encoders(
        [("sift", load_encoder("dense-sift")), ("mean", Mean("mean", [0, 1, 2]))], make_pair()
    )
    shown = pictures(figure)
    assert shown["sift: the photo"].shape == (12, 20, 3)
    assert shown["mean: the photo"].shape == (6, 10, 3)


def test_no_encoder_is_no_comparison():
    with pytest.raises(ShapeError, match="at least one encoder"):
        compare_encoders([], make_pair())
