"""The mesh renderer against analytic scenes, brute force, and a real second photo."""

import math

import numpy as np
import pytest
import torch

from l2m_viz.data import load_sample
from l2m_viz.errors import L2MError, ShapeError
from l2m_viz.evaluation import psnr
from l2m_viz.geometry import (
    Camera,
    intrinsics,
    look_at,
    pose_from_rotation,
    rotation_from_axis_angle,
    unproject_depth,
)
from l2m_viz.geometry.scenes import AnalyticScene, Plane, fronto_parallel_plane, slanted_plane, two_planes
from l2m_viz.lifting import Depth, LiftedScene, MeshCfg, lift

HW = (60, 80)


def _camera(x: float = 0.0, y: float = 0.0, hw=HW) -> Camera:
    w2c = look_at(torch.tensor([x, y, 0.0]), torch.tensor([0.0, 0.0, 3.0]))
    return Camera(intrinsics(70.0, hw), w2c, width=hw[1], height=hw[0])


def _lifted(scene: AnalyticScene) -> LiftedScene:
    camera = Camera(intrinsics(70.0, HW), torch.eye(4), width=HW[1], height=HW[0])
    depth, valid = scene.depth(camera)
    return lift(scene.image(camera, period=3.0), Depth(depth, valid, "metric", "exact"), camera.K)


def test_from_its_own_camera_the_scene_is_the_photo():
    scene = _lifted(two_planes())
    view = scene.render(scene.camera)
    drawn = ~view.hole_mask
    torch.testing.assert_close(view.image[drawn], scene.image[drawn], atol=1e-4, rtol=0)
    torch.testing.assert_close(view.depth[drawn], scene.depth[drawn], atol=1e-4, rtol=0)
    assert drawn[~scene.cut_mask].all()


def test_a_window_is_the_same_world_seen_through_a_smaller_frame():
    scene = _lifted(two_planes())
    window = scene.crop(10, 25, (30, 40))
    points = unproject_depth(window.depth, window.K)
    torch.testing.assert_close(points, unproject_depth(scene.depth, scene.K)[10:40, 25:65])
    whole, part = scene.render(_camera(0.3, -0.15)), window.render(_camera(0.3, -0.15))
    inside = ~part.hole_mask & ~whole.hole_mask
    assert 0.1 < inside.float().mean() < 0.4
    # what hides a surface may lie outside the window; nothing else differs
    same = (whole.depth - part.depth).abs() < 1e-4
    assert (whole.depth <= part.depth + 1e-4)[inside].all() and same[inside].float().mean() > 0.9
    torch.testing.assert_close(whole.image[inside & same], part.image[inside & same], atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [(-1, 0, (9, 9)), (0, 0, (1, 9)), (52, 0, (9, 9)), (0, 72, (9, 9))])
def test_a_window_that_leaves_the_photo_is_refused(window):
    with pytest.raises(ShapeError, match=r"LiftedScene\.crop: expected at least 2x2 px inside 60x80"):
        _lifted(two_planes()).crop(*window)


@pytest.mark.parametrize("make", [fronto_parallel_plane, slanted_plane])
def test_rendered_plane_has_the_exact_depth_of_the_new_camera(make):
    camera = _camera(0.3, -0.15)
    view = _lifted(make()).render(camera)
    exact, _ = make().depth(camera)
    drawn = ~view.hole_mask
    assert 0.6 < drawn.float().mean() < 1
    torch.testing.assert_close(view.depth[drawn], exact[drawn], atol=0, rtol=2e-5)
    picture = make().image(camera, period=3.0)
    assert (view.image - picture)[drawn].abs().mean() < 0.002  # linear interpolation of a smooth texture


def test_every_pixel_agrees_with_brute_force_over_all_triangles():
    generator = torch.Generator().manual_seed(0)
    hw = (7, 9)
    depth = 2 + torch.rand(hw, generator=generator)
    image = torch.rand(*hw, 3, generator=generator)
    scene = lift(
        image, Depth(depth, torch.ones(hw, dtype=torch.bool), "relative", "random"), intrinsics(10.0, hw)
    )
    scene = LiftedScene(
        image, depth, scene.valid_mask, scene.K, torch.ones(6, 8, 2, dtype=torch.bool), scene.cut_mask
    )
    rotation = rotation_from_axis_angle(torch.tensor([0.1, -0.2, 0.15]))
    camera = Camera(
        intrinsics(13.0, (11, 12)), pose_from_rotation(rotation, torch.tensor([0.2, 0.1, 0.3])), 12, 11
    )
    view = scene.render(camera)
    color, z, covered = _brute_force(scene, camera)
    same = covered == ~view.hole_mask.numpy()
    assert same.mean() > 0.98  # a pixel centre within rounding of an outline may fall either way
    both = covered & ~view.hole_mask.numpy()
    np.testing.assert_allclose(view.depth.numpy()[both], z[both], rtol=1e-4)
    np.testing.assert_allclose(view.image.numpy()[both], color[both], atol=2e-3)


def _brute_force(scene: LiftedScene, camera: Camera):
    """Ray against every triangle in 3D, in float64 (Moeller, Trumbore 1997); a nearest back face makes a hole."""
    height, width = scene.hw
    y, x = np.mgrid[0:height, 0:width]
    K = scene.K.double().numpy()
    rays = np.stack([(x + 0.5 - K[0, 2]) / K[0, 0], (y + 0.5 - K[1, 2]) / K[1, 1], np.ones_like(x)], -1)
    points = rays * scene.depth.double().numpy()[..., None]
    w2c = camera.w2c.double().numpy()
    points = points @ w2c[:3, :3].T + w2c[:3, 3]
    color, z, front = np.zeros((*camera.hw, 3)), np.full(camera.hw, np.inf), np.zeros(camera.hw, bool)
    K = camera.K.double().numpy()
    for row, column in np.ndindex(camera.hw):
        direction = np.array([(column + 0.5 - K[0, 2]) / K[0, 0], (row + 0.5 - K[1, 2]) / K[1, 1], 1.0])
        for qy, qx in np.ndindex(height - 1, width - 1):
            a, b, c, d = (qy, qx), (qy, qx + 1), (qy + 1, qx), (qy + 1, qx + 1)
            for corners in ((a, b, c), (b, d, c)):
                p = np.array([points[k] for k in corners])
                matrix = np.stack([direction, p[0] - p[1], p[0] - p[2]], axis=1)
                if abs(np.linalg.det(matrix)) < 1e-12:
                    continue
                t, u, v = np.linalg.solve(matrix, p[0])
                if u >= 0 and v >= 0 and u + v <= 1 and 0 < t < z[row, column]:
                    z[row, column] = t
                    front[row, column] = np.linalg.det(matrix) > 0
                    weights = np.array([1 - u - v, u, v])
                    color[row, column] = weights @ np.array(
                        [scene.image[k].double().numpy() for k in corners]
                    )
    return color, z, front & np.isfinite(z)


def test_no_triangle_across_a_discontinuity_so_the_hole_stays_open():
    scene = _lifted(two_planes())
    camera = _camera(0.5)
    view = scene.render(camera)
    exact, _ = two_planes().depth(camera)
    drawn = ~view.hole_mask
    assert (~drawn).sum() > 50
    # what is drawn lies on one of the two planes, never between them
    wrong = (view.depth - exact).abs()[drawn] > 0.01 * exact[drawn]
    assert wrong.float().mean() < 0.01


def test_the_back_of_a_surface_is_a_hole_that_hides():
    # a plane seen edge-on by A from its front; B stands behind it and looks back
    depth = torch.full(HW, 2.0)
    scene = lift(torch.ones(*HW, 3), depth, intrinsics(70.0, HW))
    behind = Camera(
        scene.K, look_at(torch.tensor([0.0, 0.0, 4.0]), torch.zeros(3)), width=HW[1], height=HW[0]
    )
    assert scene.render(behind).hole_mask.all()


def test_unknown_depth_is_a_hole():
    scene = fronto_parallel_plane()
    camera = _camera()
    depth, valid = scene.depth(camera)
    valid[20:30, 30:50] = False
    view = lift(scene.image(camera), Depth(depth, valid, "metric", "exact"), camera.K).render(camera)
    assert view.hole_mask[21:29, 31:49].all()
    assert not view.hole_mask[:18].any()


def test_millimetres_and_metres_give_the_same_picture():
    camera = _camera(0.2, 0.1)
    scene = two_planes()
    depth, valid = scene.depth(_camera())
    pictures = []
    for unit in (1.0, 1000.0):
        lifted = lift(scene.image(_camera()), Depth(depth * unit, valid, "metric", "exact"), camera.K)
        assert lifted.unit == pytest.approx(2.0 * unit)
        w2c = camera.w2c.clone()
        w2c[:3, 3] *= lifted.unit / 2.0
        pictures.append(lifted.render(Camera(camera.K, w2c, camera.width, camera.height)))
    assert torch.equal(pictures[0].hole_mask, pictures[1].hole_mask)
    torch.testing.assert_close(pictures[0].image, pictures[1].image, atol=1e-3, rtol=0)


def _psnr_of_motorcycle(shift_px: float) -> float:
    sample = load_sample("motorcycle")
    assert sample.depth_A is not None
    disparity = 994.978 * 0.193001 / sample.depth_A - 31.086
    depth = 994.978 * 0.193001 / (disparity + shift_px + 31.086)
    scene = lift(sample.image_A, Depth(depth, sample.valid_A, "metric", "measured"), sample.K_A)
    height, width = sample.image_B.shape[:2]
    view = scene.render(Camera(sample.K_B, sample.T_A_to_B, width=width, height=height))
    return psnr(view.image, sample.image_B, ~view.hole_mask)


def test_the_real_right_photo_is_reproduced_and_half_a_pixel_is_seen():
    exact = _psnr_of_motorcycle(0.0)
    assert exact >= 27.0
    assert exact - _psnr_of_motorcycle(0.5) > 1.0
    assert exact - _psnr_of_motorcycle(-0.5) > 1.0


@pytest.mark.parametrize("count", [1, 2, 7, 51, 1000])
def test_the_unit_is_the_second_percentile_of_valid_depth(count):
    depth = 1 + torch.rand(40, 50, generator=torch.Generator().manual_seed(count))
    valid = torch.zeros(2000, dtype=torch.bool)
    valid[torch.randperm(2000, generator=torch.Generator().manual_seed(count))[:count]] = True
    valid = valid.view(40, 50)
    scene = lift(torch.rand(40, 50, 3), Depth(depth, valid, "relative", "test"), intrinsics(50.0, (40, 50)))
    expected = np.percentile(depth[valid].double().numpy(), 2)
    assert scene.unit == pytest.approx(expected, rel=1e-7)


def test_a_triangle_exists_if_its_corners_are_known_and_near_each_other():
    """Every triangle of a small rough scene, one by one."""
    generator = torch.Generator().manual_seed(3)
    depth = 1 + 0.05 * torch.rand(9, 13, generator=generator)
    valid = torch.rand(9, 13, generator=generator) > 0.1
    scene = lift(
        torch.rand(9, 13, 3), Depth(depth, valid, "relative", "test"), intrinsics(9.0, (9, 13)), MeshCfg(1.03)
    )
    beside_a_cut = torch.zeros(9, 13, dtype=torch.bool)
    for y in range(8):
        for x in range(12):
            a, b, c, d = (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1)
            for side, corners in enumerate(((a, b, c), (b, d, c))):
                z = [depth[corner].item() for corner in corners]
                known = all(valid[corner] for corner in corners)
                near = max(z) <= 1.03 * min(z)
                assert scene.triangle_mask[y, x, side].item() == (known and near)
                if known and not near:
                    for corner in corners:
                        beside_a_cut[corner] = True
    assert torch.equal(scene.cut_mask, beside_a_cut) and 0 < beside_a_cut.sum() < beside_a_cut.numel()


def test_the_own_view_is_the_photo_with_unknown_depth_as_holes():
    valid = torch.ones(6, 8, dtype=torch.bool)
    valid[2, 3] = False
    scene = lift(
        torch.rand(6, 8, 3), Depth(torch.ones(6, 8), valid, "relative", "test"), intrinsics(9.0, (6, 8))
    )
    view = scene.own_view
    assert torch.equal(view.image, scene.image) and torch.equal(view.depth, scene.depth)
    assert torch.equal(view.hole_mask, ~valid) and not view.inpainted_mask.any()
    assert torch.equal(view.camera.w2c, torch.eye(4)) and view.camera.hw == (6, 8)


def test_scene_saves_and_loads(tmp_path):
    scene = _lifted(two_planes())
    scene.save(tmp_path / "scene.npz")
    loaded = LiftedScene.load(tmp_path / "scene.npz")
    assert torch.equal(loaded.triangle_mask, scene.triangle_mask)
    assert torch.equal(loaded.image, scene.image)


def test_errors(unchecked):
    with pytest.raises(ShapeError, match="one size"):
        lift(torch.zeros(4, 5, 3), torch.ones(5, 4), intrinsics(5.0, (4, 5)))
    with pytest.raises(ShapeError, match="2x2"):
        lift(torch.zeros(1, 5, 3), torch.ones(1, 5), intrinsics(5.0, (1, 5)))
    with pytest.raises(L2MError, match="valid pixel"):
        lift(torch.zeros(4, 5, 3), torch.full((4, 5), math.nan), intrinsics(5.0, (4, 5)))
    scene = _lifted(fronto_parallel_plane())
    with pytest.raises(ShapeError, match="render_attributes"):
        scene.render_attributes(scene.camera, torch.zeros(3, 4, 1))


def test_a_plane_cut_to_a_square_renders_inside_its_outline_only():
    square = AnalyticScene((Plane((0.0, 0.0, 1.0), 2.0, center=(0.0, 0.0, 2.0), half_size=0.4),))
    view = _lifted(square).render(_camera(0.1))
    _, exact = square.depth(_camera(0.1))
    assert (~view.hole_mask & ~exact).sum() == 0
    assert (~view.hole_mask).sum() > 0.85 * exact.sum()
