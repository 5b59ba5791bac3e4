"""The way between viser's cameras and ours."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from l2m_viz.geometry import (
    Camera,
    intrinsics,
    pose_from_rotation,
    project,
    ray_directions,
    rotation_from_axis_angle,
    transform_points,
)
from l2m_viz.show import viewer_camera
from l2m_viz.show.viewer_camera import ViewerCamera, ViewerUnits

HW = (48, 64)
ONE = ViewerUnits(1.0)


def _random_camera(seed: int) -> Camera:
    generator = torch.Generator().manual_seed(seed)
    rotation = rotation_from_axis_angle(2 * torch.randn(3, generator=generator))
    pose = pose_from_rotation(rotation, torch.randn(3, generator=generator))
    return Camera(intrinsics(500.0, (480, 640)), pose, width=640, height=480)


def test_camera_at_the_origin_in_visers_words(camera):
    view = viewer_camera.viewer_from_camera(camera, ONE)
    assert view.wxyz == (1, 0, 0, 0)
    assert view.position == (0, 0, 0)
    assert view.fov == pytest.approx(2 * math.atan(24 / 60))
    assert view.aspect == pytest.approx(64 / 48)


def test_viser_camera_sees_its_frame_and_no_more():
    """90 degrees high and twice as wide, at (10, 0, 0) viewer units = (5, 0, 0): the frame's edges are at x = +-2 z."""
    view = ViewerCamera((1.0, 0.0, 0.0, 0.0), (10.0, 0.0, 0.0), math.pi / 2, 2.0)
    camera = viewer_camera.camera_from_viewer(view, ViewerUnits(2.0), long_side=200)
    assert camera.hw == (100, 200)
    corner, depth = project(transform_points(camera.w2c, torch.tensor([[5 + 2 * 3.0, 3.0, 3.0]])), camera.K)
    torch.testing.assert_close(corner, torch.tensor([[200.0, 100.0]]))
    torch.testing.assert_close(depth, torch.tensor([3.0]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("per_scene_unit", [1.0, 7.3, 1e-3])
def test_camera_survives_the_way_to_viser_and_back(seed, per_scene_unit):
    units = ViewerUnits(per_scene_unit)
    camera = _random_camera(seed)
    back = viewer_camera.camera_from_viewer(
        viewer_camera.viewer_from_camera(camera, units), units, long_side=640
    )
    assert back.hw == camera.hw
    torch.testing.assert_close(back.K, camera.K, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(back.w2c, camera.w2c, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_ray_through_a_pixel_comes_back_to_it(seed):
    camera = _random_camera(seed)
    point = torch.tensor([123.25, 456.5])
    direction = camera.c2w[:3, :3] @ (0.37 * ray_directions(point, camera.K))
    torch.testing.assert_close(
        viewer_camera.point_of_ray(camera, tuple(direction.tolist())), point, atol=1e-2, rtol=0
    )


@pytest.mark.parametrize(
    ("aspect", "hw"), [(1.777, (360, 640)), (0.5, (640, 320)), (1.4142, (453, 640)), (30.0, (21, 640))]
)
def test_viser_camera_survives_the_way_to_ours_and_back(aspect, hw):
    view = ViewerCamera((0.5, -0.5, 0.5, 0.5), (1.0, -2.0, 3.0), 0.9, aspect)
    camera = viewer_camera.camera_from_viewer(view, ONE, long_side=640)
    assert camera.hw == hw
    back = viewer_camera.viewer_from_camera(camera, ONE)
    assert (back.fov, back.aspect) == pytest.approx((view.fov, view.aspect), rel=1e-5)
    assert back.position == pytest.approx(view.position, abs=1e-5)
    sign = math.copysign(1, back.wxyz[0] * view.wxyz[0])
    assert tuple(sign * q for q in back.wxyz) == pytest.approx(view.wxyz, abs=1e-6)


def test_covering_view_shows_the_whole_image_and_touches_its_edge(camera):
    assert viewer_camera.fov_covering(camera, 64 / 48) == pytest.approx(camera.fov_y)
    assert viewer_camera.fov_covering(camera, 100.0) == pytest.approx(
        camera.fov_y
    )  # a wide window: the height decides
    off = replace(camera, K=torch.tensor([[60.0, 0.0, 20.0], [0.0, 60.0, 24.0], [0.0, 0.0, 1.0]]))
    # The far edge is 64 - 20 = 44 px from the axis; a square frame reaches as far up as to the side.
    assert viewer_camera.fov_covering(off, 1.0) == pytest.approx(2 * math.atan(44 / 60))


def test_standpoint_is_at_the_camera_and_turns_about_what_it_sees(camera, gaussians):
    pose = pose_from_rotation(torch.eye(3), torch.tensor([-1.0, 0.0, 0.0]))  # camera at (1, 0, 0)
    stand = viewer_camera.standpoint(replace(camera, w2c=pose), gaussians, ViewerUnits(2.0), 64 / 48)
    np.testing.assert_allclose(stand.position, [2, 0, 0], atol=1e-6)
    np.testing.assert_allclose(stand.up, [0, -1, 0], atol=1e-6)
    median = gaussians.means[:, 2].median().item()
    np.testing.assert_allclose(stand.look_at, [2, 0, 2 * median], rtol=1e-3)
