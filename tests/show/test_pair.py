import math

import pytest
import torch
from matplotlib.collections import LineCollection

from l2m_viz.errors import L2MError
from l2m_viz.geometry import normalized_grid, pixel_grid, warp_from_flow
from l2m_viz.matching import Match, Matches
from l2m_viz.show.figures import to_png
from l2m_viz.show.pair import blend, legend_html, mark_point, match_lines, match_numbers, view_pair

HW_A, HW_B = (40, 64), (48, 80)


def shift_match(flow_px, certainty=1.0, hw_A=HW_A, hw_B=HW_B) -> Match:
    """B shows A moved by ``flow_px`` = (x, y)."""
    forward = warp_from_flow(torch.tensor(flow_px).expand(*hw_A, 2), hw_B)
    backward = warp_from_flow(-torch.tensor(flow_px).expand(*hw_B, 2), hw_A)
    return Match(forward, torch.full(hw_A, certainty), backward, torch.full(hw_B, certainty), hw_A, hw_B)


def ramp(hw, origin=(0.0, 0.0)):
    """A picture whose colour tells the position: red is x / 100, green y / 100."""
    xy = (pixel_grid(hw) + torch.tensor(origin)) / 100
    return torch.cat([xy, torch.full((*hw, 1), 0.5)], dim=-1)


def test_warped_b_is_a_where_b_is_a_shifted():
    view = view_pair(ramp(HW_A), ramp(HW_B, origin=(-7.0, -3.0)).clamp(0, 1), shift_match((7.0, 3.0)))
    torch.testing.assert_close(view.warped_B[1:-1, 1:-1], view.image_A[1:-1, 1:-1], atol=1e-5, rtol=0)


def test_large_pictures_are_reduced_but_keep_their_shape():
    view = view_pair(ramp(HW_A), ramp(HW_B).clamp(0, 1), shift_match((0.0, 0.0)), long_side=32)
    assert view.image_A.shape == view.warped_B.shape == (20, 32, 3)
    assert view.image_B.shape == (19, 32, 3)
    assert view.certainty.shape == (20, 32)


def test_blend_goes_from_a_to_warped_b():
    view = view_pair(torch.zeros(*HW_A, 3), torch.ones(*HW_B, 3), shift_match((7.0, 3.0)))
    for share in (0.0, 0.25, 1.0):
        assert torch.all(blend(view, share, 0.5) == share)


def test_uncertain_pixels_are_hatched_and_never_show_b():
    match = shift_match((0.0, 0.0))
    certainty = match.certainty_A_to_B.clone()
    certainty[:, :20] = 0.2
    match = Match(match.warp_A_to_B, certainty, match.warp_B_to_A, match.certainty_B_to_A, HW_A, HW_B)
    view = view_pair(torch.zeros(*HW_A, 3), torch.ones(*HW_B, 3), match)
    hatched = blend(view, 1.0, 0.5)[:, :19]
    assert sorted(hatched.unique().tolist()) == pytest.approx([0.45, 0.55])  # the two greys, not B's white
    assert torch.all(blend(view, 1.0, 0.5)[:, 21:] == 1)
    assert torch.all(blend(view, 1.0, 0.1) == 1)  # a lower threshold shows B
    assert torch.all(blend(view, 0.0, 0.5) == 0)  # share 0 is A everywhere


def test_blend_refuses_a_percentage():
    view = view_pair(ramp(HW_A), ramp(HW_B).clamp(0, 1), shift_match((0.0, 0.0)))
    with pytest.raises(L2MError, match=r"share in \[0, 1\], got 50"):
        blend(view, 50, 0.5)


def test_mark_is_drawn_at_the_point_of_the_original():
    image = torch.zeros(60, 100, 3)
    marked = mark_point(
        image, torch.tensor([150.0, 45.0]), (120, 200), color=(0.0, 1.0, 0.0)
    )  # shown at half size
    weight = marked[..., 1]
    center = (pixel_grid((60, 100)) * weight[..., None]).sum((0, 1)) / weight.sum()
    torch.testing.assert_close(center, torch.tensor([75.0, 22.5]), atol=0.15, rtol=0)
    assert not image.any()  # a copy


def test_numbers_of_a_known_match():
    match = shift_match((3.0, 1.0), certainty=0.75)
    numbers = {number.name: number.value for number in match_numbers(match, 12, 0.5)}
    assert numbers["overlap"] == pytest.approx(0.75)
    assert numbers["certain pixels of A"] == pytest.approx(100)
    assert numbers["cycle error"] == pytest.approx(0, abs=1e-4)
    assert numbers["matches"] == 12


def test_numbers_without_a_certain_pixel_have_no_cycle_error():
    numbers = {number.name: number.value for number in match_numbers(shift_match((3.0, 1.0), 0.2), 0, 0.5)}
    assert numbers["certain pixels of A"] == 0
    assert math.isnan(numbers["cycle error"])


def test_lines_join_the_matched_points():
    match = Match(
        normalized_grid(HW_A), torch.ones(HW_A), normalized_grid(HW_B), torch.ones(HW_B), HW_A, (80, 160)
    )
    view = view_pair(ramp(HW_A), torch.zeros(80, 160, 3), match)
    matches = Matches(torch.tensor([[10.0, 20.0]]), torch.tensor([[40.0, 20.0]]), torch.tensor([0.9]))
    figure = match_lines(view, match, matches)
    (axis,) = figure.axes  # the colour bar is left to the page
    (lines,) = axis.collections
    assert isinstance(lines, LineCollection)
    (line,) = lines.get_segments()
    gap = HW_A[1] // 40
    assert line.tolist() == [[10.0, 20.0], [HW_A[1] + gap + 20.0, 10.0]]  # B is drawn at A's height: halved
    assert to_png(figure).startswith(b"\x89PNG")


def test_no_match_draws_no_line():
    match = shift_match((0.0, 0.0))
    view = view_pair(ramp(HW_A), ramp(HW_B).clamp(0, 1), match)
    none = Matches(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0))
    assert not match_lines(view, match, none).axes[0].collections


def test_legend_runs_through_the_colour_map():
    html = legend_html("certainty", "0", "1", "certainty")
    assert html.index("#440154") < html.index("#fde725")  # viridis, first to last
