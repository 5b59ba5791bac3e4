"""Figures are made of what they are given: sizes, colour ranges, grey where there is nothing."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from l2m_viz.errors import ShapeError
from l2m_viz.matching import Matches
from l2m_viz.show import figures
from l2m_viz.show.colors import NOTHING, colorize, flow_colors, value_limits
from l2m_viz.show.figures import Panel

HW = (30, 50)


def _pixels(figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(figures.to_png(figure))).convert("RGB"))


def test_colour_ends_are_those_of_the_map_and_holes_are_grey():
    values = torch.linspace(0, 1, 50).expand(HW)
    mask = torch.ones(HW, dtype=torch.bool)
    mask[:10] = False
    colors = colorize(values, "certainty", mask)
    np.testing.assert_allclose(colors[20, 0], [0.267, 0.005, 0.329], atol=2e-3)  # viridis, both ends
    np.testing.assert_allclose(colors[20, -1], [0.993, 0.906, 0.144], atol=2e-3)
    assert (colors[:10] == NOTHING).all()


def test_limits_of_each_kind():
    values = torch.arange(101.0)[None]
    assert value_limits(values, "certainty", None) == (0, 1)
    assert value_limits(values, "error", None) == (0, 95)
    assert value_limits(values, "depth", None) == (1, 99)
    assert value_limits(values, "depth", torch.zeros(1, 101, dtype=torch.bool)) == (0, 1)


def test_flow_wheel_has_opposite_hues_for_opposite_directions_and_white_for_none():
    flow = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]])
    colors = flow_colors(flow, max_px=1.0)
    torch.testing.assert_close(colors[0, 0], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(colors[0, 1], torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(colors[0, 2], torch.ones(3))


def test_panels_draw_every_picture_and_no_empty_axes():
    red = torch.tensor([1.0, 0.0, 0.0]).expand(*HW, 3)
    figure = figures.panels(
        Panel("one", red),
        Panel("two", torch.rand(HW), "certainty", label="x"),
        Panel("three", red),
        Panel("four", red),
    )
    drawn = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_title() for axis in drawn if axis.get_title()] == ["one", "two", "three", "four"]
    assert len(drawn) == 4
    assert sum(len(axis.child_axes) for axis in drawn) == 1  # one colour bar
    picture = _pixels(figure)
    assert ((picture == [255, 0, 0]).all(-1)).mean() > 0.1


@pytest.mark.parametrize(
    ("values", "points"),
    [([-1e-6, 1.0], "neither"), ([-0.1, 1.0], "min"), ([0.0, 1.1], "max"), ([-9.0, 9.0], "both")],
)
def test_a_bar_is_pointed_where_values_lie_beyond_its_end(values, points):
    shown = torch.tensor([[*values, 50.0, -50.0]])
    mask = torch.tensor([[True, True, False, False]])  # what is not shown does not count
    figure = figures.panels(Panel("one", shown, "error", mask, limits=(0.0, 1.0)))
    (bar,) = figure.axes[0].child_axes
    assert bar._colorbar.extend == points


def test_lines_end_at_the_matched_points():
    a, b = torch.zeros(*HW, 3), torch.zeros(40, 60, 3)
    matches = Matches(torch.tensor([[10.0, 5.0]]), torch.tensor([[20.0, 30.0]]), torch.tensor([0.7]))
    figure = figures.matches(a, b, matches)
    (segment,) = figure.axes[0].collections[0].get_segments()
    np.testing.assert_allclose(segment, [[10, 5], [50 + 1 + 20, 30]])


def test_lines_between_narrow_strips_fit_on_a_page():
    """Two towers of 1x300 px would be a figure of 1,400 inches."""
    strip = torch.zeros(300, 1, 3)
    figure = figures.matches(strip, strip, Matches(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0)))
    assert figure.get_size_inches().max() < 12
    assert figure.get_size_inches().min() < 4  # and no empty page beside them


def test_no_matches_is_a_picture_too():
    empty = Matches(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0))
    assert _pixels(figures.matches(torch.zeros(*HW, 3), torch.zeros(*HW, 3), empty)).std() > 0


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ShapeError, match="at least one Panel"):
        figures.panels()


def test_similarity_is_blue_over_light_grey_to_red_on_a_fixed_scale():
    colors = colorize(torch.tensor([[-1.0, 0.0, 1.0]]), "similarity")
    assert colors[0, 0, 2] > colors[0, 0, 0] + 0.4
    assert colors[0, 2, 0] > colors[0, 2, 2] + 0.4
    assert colors[0, 1].std() < 0.01
    assert colors[0, 1].mean() > NOTHING + 0.3  # unrelated is not unknown
    assert value_limits(torch.tensor([[0.2, 0.3]]), "similarity") == (-1, 1)


def test_marked_points_are_where_the_pixels_are():
    picture = torch.ones(*HW, 3)
    picture[20, 30] = torch.tensor([1.0, 0.0, 0.0])
    figure = figures.panels(Panel("one", picture, points=torch.tensor([[30.5, 20.5]])))
    shown = _pixels(figure).astype(int)
    red = np.argwhere((shown[..., 0] > 200) & (shown[..., 1] < 80))
    ring = np.argwhere(shown.max(-1) < 60)
    ring = ring[np.linalg.norm(ring - red.mean(0), axis=1) < 15]  # not the title's letters
    assert len(ring) > 10
    np.testing.assert_allclose(ring.mean(0), red.mean(0), atol=1)


def test_compositing_table_has_the_gaussians_colours_depths_and_unit():
    weights, depths = torch.tensor([0.5, 0.25]), torch.tensor([1.0, 2.345])
    colors = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.2]])
    (axis,) = figures.compositing_table(weights, depths, colors, unit="m").axes
    assert [bar.get_height() for bar in axis.patches] == [0.5, 0.25]
    assert [bar.get_facecolor()[:3] for bar in axis.patches] == [(1, 0, 0), (0, 0, 1)]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1.00", "2.35"]
    assert axis.get_xlabel() == "depth of the Gaussian (m), front to back"


def test_a_long_compositing_table_labels_some_of_its_bars():
    (axis,) = figures.compositing_table(torch.rand(130), torch.rand(130)).axes
    assert len(axis.patches) == 130
    assert 15 <= len(axis.get_xticks()) <= 21
    assert axis.get_xlabel() == "depth of the Gaussian, front to back"
