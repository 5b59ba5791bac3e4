"""Warps from depth maps against analytic scenes, whose covisibility never looks at a depth map."""

import pytest
import torch

from l2m_viz.data import load_sample
from l2m_viz.errors import ShapeError
from l2m_viz.geometry import (
    Camera,
    intrinsics,
    look_at,
    normalized_grid,
    pose_from_rotation,
    relative_pose,
    rotation_from_axis_angle,
    sample_image,
)
from l2m_viz.geometry.scenes import fronto_parallel_plane, slanted_plane, sphere_on_plane, two_planes
from l2m_viz.lifting import warp_from_depth

HW_A, HW_B = (60, 80), (72, 66)


def _camera(hw, x: float = 0.0, y: float = 0.0) -> Camera:
    w2c = look_at(torch.tensor([x, y, 0.0]), torch.tensor([0.0, 0.0, 3.0]))
    return Camera(intrinsics(70.0, hw), w2c, width=hw[1], height=hw[0])


def _warp(scene, A: Camera, B: Camera):
    (depth_A, valid_A), (depth_B, valid_B) = scene.depth(A), scene.depth(B)
    return warp_from_depth(depth_A, A.K, depth_B, B.K, relative_pose(A.w2c, B.w2c), valid_A, valid_B)


@pytest.mark.parametrize("make", [fronto_parallel_plane, slanted_plane, two_planes, sphere_on_plane])
def test_agrees_with_the_analytic_truth(make):
    A, B = _camera(HW_A), _camera(HW_B, 0.4, -0.1)
    warp, covisible = _warp(make(), A, B)
    exact, exact_covisible = make().warp(A, B)
    torch.testing.assert_close(warp[exact_covisible], exact[exact_covisible], atol=1e-5, rtol=0)
    assert (covisible == exact_covisible).float().mean() > 0.99


def test_identity_pose_gives_the_identity_warp():
    A = _camera(HW_A)
    warp, covisible = _warp(two_planes(), A, A)
    torch.testing.assert_close(warp, normalized_grid(HW_A), atol=1e-5, rtol=0)
    assert covisible.all()


def test_there_and_back():
    A, B = _camera(HW_A), _camera(HW_B, 0.3)
    there, covisible = _warp(slanted_plane(), A, B)
    back, _ = _warp(slanted_plane(), B, A)
    error = (sample_image(back, there) - normalized_grid(HW_A)).norm(dim=-1)
    assert error[covisible].quantile(0.95) < 2e-3


def test_holes_of_B_are_never_covisible():
    A, B = _camera(HW_A), _camera(HW_B, 0.2)
    scene = fronto_parallel_plane()
    depth_A, _ = scene.depth(A)
    depth_B, valid_B = scene.depth(B)
    valid_B[:, :33] = False
    warp, covisible = warp_from_depth(depth_A, A.K, depth_B, B.K, relative_pose(A.w2c, B.w2c), None, valid_B)
    assert covisible.any()
    assert (warp[..., 0][covisible] >= -1e-6).all()


def test_behind_the_camera_and_invalid_pixels_stay_finite_and_unseen():
    A = _camera(HW_A)
    turned = Camera(A.K, torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0])), A.width, A.height)
    depth = torch.full(HW_A, 2.0)
    depth[3, 4] = float("nan")
    valid = torch.isfinite(depth)
    warp, covisible = warp_from_depth(depth, A.K, depth, A.K, relative_pose(A.w2c, turned.w2c), valid, valid)
    assert torch.isfinite(warp).all()
    assert not covisible.any()


def test_agrees_with_the_measured_stereo_disparity():
    sample = load_sample("motorcycle")
    assert sample.warp_A_to_B is not None
    # B's own depth is not measured: take A's as B's where A's point lands, which checks the projection only
    warp, _ = warp_from_depth(
        sample.depth_A,
        sample.K_A,
        torch.ones_like(sample.depth_A),
        sample.K_B,
        sample.T_A_to_B,
        sample.valid_A,
    )
    error_px = (warp - sample.warp_A_to_B)[sample.valid_A] * torch.tensor([741.0, 500.0]) / 2
    assert error_px.abs().max() < 2e-3


def _cut_up(hw, seed: int):
    """Depth with steps, holes and slopes, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.nn.functional.interpolate(torch.rand(1, 1, 5, 7, generator=generator), hw)[0, 0]
    depth = 2.0 + steps + 0.3 * torch.linspace(0, 1, hw[1])
    valid = torch.rand(hw, generator=generator) > 0.05
    return torch.where(valid, depth, float("nan")), valid


@pytest.mark.parametrize("seed", range(6))
def test_the_compiled_form_does_what_the_plain_one_does(seed):
    (depth_A, valid_A), (depth_B, valid_B) = _cut_up(HW_A, seed), _cut_up(HW_B, seed)
    axis = torch.tensor([0.05, -0.08, 0.3 * seed])
    T_A_to_B = pose_from_rotation(rotation_from_axis_angle(axis), torch.tensor([0.2, -0.1, 0.1 * seed - 0.2]))
    args = depth_A, intrinsics(70.0, HW_A), depth_B, intrinsics(55.0, HW_B), T_A_to_B, valid_A, valid_B
    warp, seen = warp_from_depth(*args, rel_depth_tol=0.3)
    assert 0.02 < seen.float().mean() < 0.98
    leaf = depth_A.clone().requires_grad_()  # gradients are the plain form's business
    plain_warp, plain_seen = warp_from_depth(leaf, *args[1:], rel_depth_tol=0.3)
    assert plain_warp.requires_grad and not warp.requires_grad
    torch.testing.assert_close(warp, plain_warp.detach(), atol=2e-6, rtol=2e-5)
    assert (seen != plain_seen).float().mean() <= 1e-3  # points on the tolerance itself may fall either way


def test_moves_along_the_axis_agree_with_the_formula():
    """A wall at depth z, approached by t: x px from the middle is seen x z / (z - t) from it."""
    hw, focal, z, step = (48, 64), 50.0, 4.0, 1.0
    K, depth = intrinsics(focal, hw), torch.full((48, 64), z)
    T_A_to_B = torch.eye(4)
    T_A_to_B[2, 3] = -step
    warp, seen = warp_from_depth(depth, K, depth - step, K, T_A_to_B)
    torch.testing.assert_close(warp, normalized_grid(hw) * z / (z - step), atol=1e-6, rtol=0)
    assert torch.equal(seen, (warp.abs() <= 1).all(dim=-1))


def test_mask_of_another_size_is_refused(unchecked):
    with pytest.raises(ShapeError, match="valid_B"):
        depth, K = torch.ones(4, 5), intrinsics(5.0, (4, 5))
        warp_from_depth(depth, K, depth, K, torch.eye(4), None, torch.ones(5, 4, dtype=torch.bool))
