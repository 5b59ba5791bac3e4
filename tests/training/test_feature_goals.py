"""What stage 1 teaches, judged by walls and by features that are places."""

from dataclasses import replace

import pytest
import torch

from l2m_viz.gaussians import FitCfg, rasterize
from l2m_viz.geometry import Camera, intrinsics, pixel_grid
from l2m_viz.lifting import View
from l2m_viz.training.contrast import ContrastCfg
from l2m_viz.training.feature_goals import (
    Goal,
    GoalCfg,
    feature_goals,
    goal_losses,
    thinned_gaussians,
    whole_cells,
)

HW = (48, 64)


def wall(shift_x=0.0, hw=HW):
    """A wall at distance 1 seen from a place further right."""
    pose = torch.eye(4)
    pose[0, 3] = -shift_x
    holes = torch.zeros(hw, dtype=torch.bool)
    image = torch.rand(*hw, 3, generator=torch.Generator().manual_seed(0))
    camera = Camera(intrinsics(60.0, hw), pose, width=hw[1], height=hw[0])
    return View(camera, image, torch.ones(hw), holes, holes.clone())


def constant(*values, hw=(6, 8), channels=4):
    return torch.stack([torch.full((channels, *hw), value) for value in values])


@pytest.mark.parametrize("stride", [8, 16])
def test_the_goal_is_the_mean_of_what_the_teacher_said(stride):
    maps = constant(1.0, 2.0, hw=(HW[0] // stride, HW[1] // stride))
    goals = feature_goals(maps, [wall(), wall()], [wall(), wall()], stride, GoalCfg())
    for goal in goals:
        assert goal.features.shape == (HW[0] // stride, HW[1] // stride, 4)
        assert goal.seen.float().mean() > 0.5
        torch.testing.assert_close(
            goal.features[goal.seen], torch.full_like(goal.features[goal.seen], 1.5), atol=1e-3, rtol=0
        )


def test_features_that_are_places_on_the_wall_are_rendered_where_these_are_seen():
    # 16 px to the right of the picture at distance 1 and focal length 60: the wall moves 16 px to the left
    place = pixel_grid((6, 8)).permute(2, 0, 1)[None] * 8  # px of the photo
    (goal,) = feature_goals(place, [wall()], [wall(16 / 60)], 8, GoalCfg())
    expected = pixel_grid((6, 8)) * 8 + torch.tensor([16.0, 0.0])
    inner = goal.seen.clone()
    inner[[0, -1]] = False
    inner[:, 0] = False
    inner[:, 5:] = False  # beyond what the photo shows, and beside it
    assert inner.sum() == 4 * 4
    torch.testing.assert_close(goal.features[inner], expected[inner], atol=0.2, rtol=0)
    assert not goal.seen[:, 6:].any()  # the Gaussians end there


def test_holes_of_the_new_view_teach_nothing():
    new = wall()
    new.hole_mask[:, 40:] = True
    (goal,) = feature_goals(constant(1.0), [wall()], [new], 8, GoalCfg())
    assert goal.seen[:, :5].any()
    assert not goal.seen[:, 5:].any()


def test_what_was_invented_in_a_known_view_is_not_believed():
    second = wall()
    second.inpainted_mask[:, :40] = True
    (goal,) = feature_goals(constant(1.0, 5.0), [wall(), second], [wall()], 8, GoalCfg())
    left, right = goal.features[1:-1, 1:4], goal.features[1:-1, 6:7]
    torch.testing.assert_close(left, torch.ones_like(left), atol=1e-3, rtol=0)
    torch.testing.assert_close(right, torch.full_like(right, 3.0), atol=1e-3, rtol=0)


def test_optimised_features_come_to_the_same_on_a_wall():
    cfg = GoalCfg(method="optimise", fit=FitCfg(num_steps=5, width=4))
    place = pixel_grid((6, 8)).permute(2, 0, 1)[None] / 8
    maps = torch.cat([place, place + 1, place - 1], dim=1)
    (fitted,) = feature_goals(maps, [wall()], [wall()], 8, cfg)
    (closed,) = feature_goals(maps, [wall()], [wall()], 8, GoalCfg())
    both = fitted.seen & closed.seen
    assert both[1:-1, 1:-1].all()
    torch.testing.assert_close(fitted.features[1:-1, 1:-1], closed.features[1:-1, 1:-1], atol=0.05, rtol=0)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_thinned_gaussians_stand_where_the_surface_is(step):
    # a slanted plane z = 1 + x / 4 in the camera's frame: z (1 - u / 4) = 1 for the ray (u, v, 1)
    view = wall()
    u = (pixel_grid(HW)[..., 0] - 32) / 60
    slanted = replace(view, depth=1 / (1 - u / 4))
    slanted.hole_mask[:, :20] = True
    gaussians = thinned_gaussians(slanted, step)
    x, _, z = gaussians.means.unbind(-1)
    torch.testing.assert_close(z, 1 + x / 4, atol=1e-5, rtol=0)
    assert (60 * x / z + 32).min() > 20
    alpha = rasterize(gaussians, view.camera.resized((HW[0] // step, HW[1] // step))).alpha
    assert alpha[:, 32 // step :].min() > 0.9  # no gaps, however thin


def test_whole_cells_by_brute_force():
    mask = torch.rand(12, 20, generator=torch.Generator().manual_seed(0)) > 0.05
    found = whole_cells(mask, 4)
    for row in range(3):
        for column in range(5):
            assert found[row, column] == mask[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].all()


def random_goals(count=2):
    draw = torch.Generator().manual_seed(1)
    seen = torch.ones(5, 7, dtype=torch.bool)
    seen[0] = False
    return [Goal(torch.randn(5, 7, 16, generator=draw), seen) for _ in range(count)]


def test_a_student_that_says_the_goals_has_nothing_to_learn():
    goals = random_goals()
    said = torch.stack([goal.features for goal in goals]).permute(0, 3, 1, 2)
    draw = torch.Generator().manual_seed(0)
    agree, contrast = goal_losses(said, goals, ContrastCfg(), draw)
    assert agree.item() == 0
    _, worse = goal_losses(said.flip(0), goals, ContrastCfg(), draw)
    assert worse > contrast


def test_a_student_that_says_the_mean_is_at_distance_1():
    goals = random_goals()
    rows = torch.cat([goal.features[goal.seen] for goal in goals])
    said = rows.mean(dim=0)[None, :, None, None].expand(2, 16, 5, 7)
    agree, _ = goal_losses(said, goals, ContrastCfg(), torch.Generator())
    assert agree.item() == pytest.approx(1, rel=1e-5)
    scaled = [replace(goal, features=100 * goal.features) for goal in goals]
    agree, _ = goal_losses(100 * said, scaled, ContrastCfg(), torch.Generator())
    assert agree.item() == pytest.approx(1, rel=1e-5)


def test_nothing_seen_gives_zero_and_no_nan():
    goals = [replace(goal, seen=torch.zeros_like(goal.seen)) for goal in random_goals()]
    said = torch.randn(2, 16, 5, 7, requires_grad=True)
    agree, contrast = goal_losses(said, goals, ContrastCfg(), torch.Generator())
    (agree + contrast).backward()
    assert (agree + contrast).item() == 0
    assert torch.isfinite(said.grad).all()
