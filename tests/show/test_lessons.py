"""Figures of the lessons: what is drawn is read back from matplotlib's own objects."""

# matplotlib's stubs give its read-back methods unions that no caller can narrow
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false, reportOptionalSubscript=false

import pytest
import torch
from matplotlib.collections import EllipseCollection

from l2m_viz.errors import L2MError
from l2m_viz.gaussians.reference import ScreenGaussians
from l2m_viz.geometry import Camera, intrinsics, rotation_from_axis_angle
from l2m_viz.show.lessons import curves, discs, spotlight, top_view


def screen_of(covars2d, means2d, visible=None):
    xx, xy, yy = (torch.linalg.inv(covars2d)[:, i, j] for i, j in ((0, 0), (0, 1), (1, 1)))
    shown = torch.ones(len(means2d), dtype=torch.bool) if visible is None else visible
    return ScreenGaussians(means2d, torch.stack([xx, xy, yy], dim=-1), torch.ones(len(means2d)), shown)


def test_top_view_draws_x_and_z_and_hides_what_is_below():
    points = torch.tensor([[1.0, -5.0, 3.0], [2.0, 7.0, 4.0]])  # +y is down: the first is above the second
    figure = top_view(points, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), unit="km")
    (dots,) = figure.axes[0].collections
    assert torch.as_tensor(dots.get_offsets()).tolist() == [[2.0, 4.0], [1.0, 3.0]]
    assert dots.get_facecolors()[1].tolist() == [1, 0, 0, 1]  # drawn last, on top
    assert "km" in figure.axes[0].get_xlabel()


def test_top_view_draws_frusta_in_the_world():
    K = intrinsics(20.0, (30, 40))  # the border columns lie 45 degrees from the axis
    # a quarter turn about y: world x becomes the camera's -z
    quarter = rotation_from_axis_angle(torch.tensor([0.0, torch.pi / 2, 0.0]))
    w2c = torch.eye(4)
    w2c[:3, :3] = quarter
    w2c[:3, 3] = -quarter @ torch.tensor([1.0, 0.0, 2.0])
    points = torch.tensor([[0.0, 0.0, 3.0]])
    figure = top_view(points, torch.ones(1, 3), {"B": Camera(K, w2c, width=40, height=30)})
    left, right, center = (torch.as_tensor(line.get_xydata()) for line in figure.axes[0].lines)
    assert center.tolist() == [pytest.approx([1.0, 2.0], abs=1e-6)]
    forward = torch.tensor([-1.0, 0.0])  # the camera looks along world -x
    for line in (left, right):
        ray = (line[1] - line[0]).float()
        assert ray @ forward == pytest.approx(3.0, abs=1e-5)  # z-depth 3
        assert ray.norm() == pytest.approx(3 * 2**0.5, abs=1e-5)
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "camera B"


def test_discs_are_one_standard_deviation():
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])  # first axis 36.87 degrees from +x
    covars = torch.stack([turn @ torch.diag(torch.tensor([9.0, 1.0])) @ turn.T, torch.eye(2), torch.eye(2)])
    means = torch.tensor([[12.5, 6.5], [13.5, 7.5], [90.0, 90.0]])  # the last one is far from the window
    figure = discs(torch.zeros(30, 40, 3), screen_of(covars, means), (10, 5, 20, 9))
    (ellipses,) = (c for c in figure.axes[0].collections if isinstance(c, EllipseCollection))
    assert torch.as_tensor(ellipses.get_offsets()).tolist() == [[12.5, 6.5], [13.5, 7.5]]
    assert sorted([ellipses.get_widths()[0], ellipses.get_heights()[0]]) == pytest.approx([2, 6], abs=1e-4)
    longest = ellipses.get_angles()[0] if ellipses.get_widths()[0] > 3 else ellipses.get_angles()[0] + 90
    assert longest % 180 == pytest.approx(36.87, abs=0.01)
    assert (*figure.axes[0].get_xlim(), *figure.axes[0].get_ylim()) == (10, 20, 9, 5)


def test_discs_leave_out_what_is_not_visible():
    screen = screen_of(torch.eye(2)[None], torch.tensor([[2.5, 2.5]]), torch.tensor([False]))
    figure = discs(torch.zeros(4, 6, 3), screen, (0, 0, 6, 4))
    assert len(figure.axes[0].collections[0].get_offsets()) == 0


@pytest.mark.parametrize("window", [(0, 0, 7, 4), (3, 0, 3, 4), (-1, 0, 3, 4)])
def test_discs_refuse_a_window_outside(window):
    screen = screen_of(torch.eye(2)[None], torch.tensor([[2.5, 2.5]]))
    with pytest.raises(L2MError, match="window inside 6x4"):
        discs(torch.zeros(4, 6, 3), screen, window)


def test_spotlight_is_yellow_at_the_largest_weight_and_dim_elsewhere():
    image = torch.rand(20, 36, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(5, 9)  # cells of 4x4 px
    weights[1, 6] = 0.02
    shown = spotlight(image, weights)
    near = (
        slice(5, 7),
        slice(25, 27),
    )  # half a pixel, an eighth of a cell, from the middle of cell (1, 6) either way
    expected = torch.lerp(0.5 * image[near], torch.tensor([1.0, 0.9, 0.1]), 0.875**2)
    torch.testing.assert_close(shown[near], expected)
    away = torch.ones(20, 36, dtype=torch.bool)
    away[0:12, 20:32] = False  # light falls off towards the middles of the next cells
    assert torch.equal(shown[away], 0.5 * image[away])
    torch.testing.assert_close(spotlight(image, 100 * weights), shown)  # only ratios count


def test_spotlight_needs_light():
    with pytest.raises(L2MError, match="a weight above 0"):
        spotlight(torch.zeros(4, 6, 3), torch.zeros(2, 3))


def test_curves():
    x, y = torch.tensor([1.0, 10.0]), torch.tensor([3.0, 4.0])
    figure = curves(x, {"up": y, "down": -y}, x_label="shift (px)", y_label="PSNR (dB)", log_x=True)
    (axis,) = figure.axes
    assert [line.get_xydata().tolist() for line in axis.lines] == [[[1, 3], [10, 4]], [[1, -3], [10, -4]]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["up", "down"]
    figure.draw_without_rendering()
    assert not legend.get_window_extent().overlaps(axis.get_window_extent()), "it covers no curve"
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_xscale()) == ("shift (px)", "PSNR (dB)", "log")
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "10"]
    assert not curves(x, {"up": y}, x_label="", y_label="").legends
