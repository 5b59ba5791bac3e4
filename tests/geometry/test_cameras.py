"""Poses obey the group laws, projection inverts unprojection, a plane induces its homography."""

import math

import pytest
import torch

from l2m_viz.errors import L2MError, ShapeError
from l2m_viz.geometry import (
    Camera,
    intrinsics,
    invert_pose,
    look_at,
    plane_homography,
    pose_from_rotation,
    project,
    quat_from_rotation,
    relative_pose,
    resize_K,
    rotation_from_axis_angle,
    rotation_from_quat,
    transform_points,
    unproject,
    unproject_depth,
)


def _pose(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rotation = rotation_from_axis_angle(torch.randn(3, generator=generator, dtype=torch.float64))
    return pose_from_rotation(rotation, torch.randn(3, generator=generator, dtype=torch.float64))


def test_poses_form_a_group():
    a, b, c = _pose(0), _pose(1), _pose(2)
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(a @ invert_pose(a), identity)
    torch.testing.assert_close(invert_pose(a @ b), invert_pose(b) @ invert_pose(a))
    torch.testing.assert_close(relative_pose(b, c) @ relative_pose(a, b), relative_pose(a, c))
    torch.testing.assert_close(relative_pose(a, a), identity)
    points = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        transform_points(a @ b, points), transform_points(a, transform_points(b, points))
    )


def test_axis_angle_quarter_turn_about_y():
    rotation = rotation_from_axis_angle(torch.tensor([0.0, math.pi / 2, 0.0]))
    torch.testing.assert_close(rotation @ torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0]))


def test_quaternion_matches_axis_angle_and_round_trips():
    axis_angle = torch.randn(50, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2
    angle = axis_angle.norm(dim=-1, keepdim=True)
    quats = torch.cat([torch.cos(angle / 2), torch.sin(angle / 2) * axis_angle / angle], dim=-1)
    rotation = rotation_from_axis_angle(axis_angle)
    torch.testing.assert_close(rotation_from_quat(3 * quats), rotation)
    torch.testing.assert_close(rotation_from_quat(quat_from_rotation(rotation)), rotation)


@pytest.mark.parametrize("turn", [[math.pi, 0, 0], [0, math.pi, 0], [0, 0, math.pi], [0, 0, 0]])
def test_half_turns_have_quaternions_too(turn):
    rotation = rotation_from_axis_angle(torch.tensor(turn, dtype=torch.float64))
    torch.testing.assert_close(rotation_from_quat(quat_from_rotation(rotation)), rotation, atol=1e-7, rtol=0)


def test_projection_by_hand():
    K = intrinsics(100.0, (60, 80))
    pixels, depth = project(torch.tensor([0.5, -0.2, 2.0]), K)
    torch.testing.assert_close(pixels, torch.tensor([40 + 100 * 0.25, 30 - 100 * 0.1]))
    assert depth == 2.0


def test_unprojection_inverts_projection():
    K = torch.tensor([[90.0, 0.0, 31.0], [0.0, 110.0, 17.0], [0.0, 0.0, 1.0]])
    points = torch.rand(6, 3, generator=torch.Generator().manual_seed(5)) + torch.tensor([-0.5, -0.5, 1.0])
    pixels, depth = project(points, K)
    torch.testing.assert_close(unproject(pixels, depth, K), points)
    depth_map = torch.full((4, 6), 3.0)
    pixels, depth = project(unproject_depth(depth_map, K), K)
    assert pixels[1, 2].tolist() == pytest.approx([2.5, 1.5], abs=1e-4)
    torch.testing.assert_close(depth, depth_map)


def test_plane_homography_agrees_with_unprojecting_the_plane():
    K_A, K_B, pose = intrinsics(80.0, (48, 64)).double(), intrinsics(70.0, (50, 60)).double(), _pose(7)
    normal = torch.nn.functional.normalize(torch.tensor([0.2, -0.1, 1.0], dtype=torch.float64), dim=0)
    H = plane_homography(K_A, K_B, pose, normal, 3.0)
    pixels = torch.rand(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(8)) * 48
    rays = unproject(pixels, torch.ones(9, dtype=torch.float64), K_A)
    points = rays * (3.0 / (rays @ normal))[:, None]
    expected, _ = project(transform_points(pose, points), K_B)
    mapped = torch.cat([pixels, torch.ones(9, 1, dtype=torch.float64)], dim=-1) @ H.T
    torch.testing.assert_close(mapped[:, :2] / mapped[:, 2:], expected)


def test_resizing_intrinsics_keeps_rays():
    K = torch.tensor([[90.0, 0.0, 31.0], [0.0, 110.0, 17.0], [0.0, 0.0, 1.0]])
    camera = Camera(K, torch.eye(4), width=64, height=40)
    small = camera.resized((20, 16))
    ray = unproject(torch.tensor([10.0, 8.0]), torch.tensor(1.0), K)
    torch.testing.assert_close(unproject(torch.tensor([10.0 / 4, 4.0]), torch.tensor(1.0), small.K), ray)
    torch.testing.assert_close(resize_K(small.K, (20, 16), (40, 64)), K)


def test_look_at_puts_the_target_on_the_axis_with_down_pointing_down():
    eye, target = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 0.0, 4.0])
    w2c = look_at(eye, target)
    seen = transform_points(w2c, target)
    torch.testing.assert_close(seen[:2], torch.zeros(2), atol=1e-6, rtol=0)
    assert seen[2] > 0
    assert (
        transform_points(w2c, target + torch.tensor([0.0, 0.1, 0.0]))[1] > 0
    )  # world +y is the image's down
    torch.testing.assert_close(transform_points(w2c, eye), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(w2c), torch.tensor(1.0))


def test_field_of_view_and_centre():
    camera = Camera(intrinsics(30.0, (60, 80)), _pose(9).float(), width=80, height=60)
    assert camera.fov_y == pytest.approx(math.pi / 2)
    torch.testing.assert_close(transform_points(camera.w2c, camera.center), torch.zeros(3), atol=1e-6, rtol=0)


def test_errors_name_what_is_wrong():
    K, eye = intrinsics(10.0, (4, 6)), torch.eye(4)
    with pytest.raises(ShapeError, match="at least 1x1"):
        Camera(K, eye, width=0, height=4)
    with pytest.raises(L2MError, match="finite"):
        Camera(K * float("nan"), eye, width=6, height=4)
    with pytest.raises(L2MError, match="focal"):
        Camera(K * torch.tensor([-1.0, 1.0, 1.0]), eye, width=6, height=4)
    skewed = K.clone()
    skewed[0, 1] = 3
    for wrong in (skewed, K * 2):
        with pytest.raises(L2MError, match="skew"):
            Camera(wrong, eye, width=6, height=4)
    for wrong in (2 * eye, torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0]))):
        with pytest.raises(L2MError, match="rigid"):
            Camera(K, wrong, width=6, height=4)
    with pytest.raises(L2MError, match="parallel"):
        look_at(torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))
    with pytest.raises(L2MError, match="parallel"):
        look_at(torch.zeros(3), torch.zeros(3))
