"""Correspondence of a batch of depth maps: what it is for one pair at a time."""

import pytest
import torch

from l2m_viz.errors import ShapeError
from l2m_viz.geometry import (
    Camera,
    intrinsics,
    look_at,
    pose_from_rotation,
    relative_pose,
    rotation_from_axis_angle,
)
from l2m_viz.geometry.scenes import fronto_parallel_plane, slanted_plane, sphere_on_plane, two_planes
from l2m_viz.lifting import warp_from_depth
from l2m_viz.lifting.torch_truth import warp_from_depth_batch

HW_A, HW_B = (60, 80), (72, 66)
NUM_PAIRS = 6
SCENES = (fronto_parallel_plane, slanted_plane, two_planes, sphere_on_plane)


def _cut_up(hw, seed: int):
    """Depth with steps, slopes and unknown pixels, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.nn.functional.interpolate(torch.rand(1, 1, 5, 7, generator=generator), hw)[0, 0]
    valid = torch.rand(hw, generator=generator) > 0.05
    return torch.where(valid, 2 + steps + 0.3 * torch.linspace(0, 1, hw[1]), float("nan")), valid


def _pairs():
    """Arguments of six pairs; the last camera looks the other way."""
    (depth_A, valid_A), (depth_B, valid_B) = (
        [torch.stack(each) for each in zip(*(_cut_up(hw, seed) for seed in range(NUM_PAIRS)), strict=True)]
        for hw in (HW_A, HW_B)
    )
    axes = torch.tensor([[0.05, -0.08, 0.3 * k] for k in range(NUM_PAIRS - 1)] + [[0.0, torch.pi, 0.0]])
    moves = [torch.tensor([0.2, -0.1, 0.1 * k - 0.2]) for k in range(NUM_PAIRS)]
    poses = [pose_from_rotation(*each) for each in zip(rotation_from_axis_angle(axes), moves, strict=True)]
    K_A, K_B = intrinsics(70.0, HW_A), intrinsics(55.0, HW_B)
    K_A, K_B = (K.expand(NUM_PAIRS, 3, 3) for K in (K_A, K_B))
    return depth_A, K_A, depth_B, K_B, torch.stack(poses), valid_A, valid_B


@pytest.mark.parametrize("tol", [0.05, 0.3])
def test_every_pair_is_what_it_is_alone(tol):
    args = _pairs()
    warps, seen = warp_from_depth_batch(*args, rel_depth_tol=tol)
    assert torch.isfinite(warps).all() and not seen[-1].any() and seen[:-1].any(dim=(1, 2)).all()
    for k in range(NUM_PAIRS):
        warp, covisible = warp_from_depth(*(value[k] for value in args), rel_depth_tol=tol)
        torch.testing.assert_close(warps[k], warp, atol=2e-6, rtol=2e-5)
        assert (seen[k] != covisible).float().mean() <= 1e-3  # on the tolerance itself, either way


def test_agrees_with_the_analytic_truth():
    def camera(hw, x: float, y: float) -> Camera:
        w2c = look_at(torch.tensor([x, y, 0.0]), torch.tensor([0.0, 0.0, 3.0]))
        return Camera(intrinsics(70.0, hw), w2c, width=hw[1], height=hw[0])

    A, B = camera(HW_A, 0.0, 0.0), camera(HW_B, 0.4, -0.1)
    (depth_A, valid_A), (depth_B, valid_B) = (
        [torch.stack(each) for each in zip(*(make().depth(view) for make in SCENES), strict=True)]
        for view in (A, B)
    )
    K_A, K_B, T_A_to_B = (
        value.expand(len(SCENES), *value.shape) for value in (A.K, B.K, relative_pose(A.w2c, B.w2c))
    )
    with torch.autocast("cpu", torch.bfloat16):  # a training's; it must not blur the truth
        warps, seen = warp_from_depth_batch(depth_A, K_A, depth_B, K_B, T_A_to_B, valid_A, valid_B)
    for k, make in enumerate(SCENES):
        exact, covisible = make().warp(A, B)
        torch.testing.assert_close(warps[k][covisible], exact[covisible], atol=1e-5, rtol=0)
        assert (seen[k] == covisible).float().mean() > 0.99


def test_errors(unchecked):
    depth_A, K_A, depth_B, K_B, T_A_to_B, valid_A, valid_B = _pairs()
    with pytest.raises(ShapeError, match="mask"):
        warp_from_depth_batch(depth_A, K_A, depth_B, K_B, T_A_to_B, valid_A, valid_A)
    with pytest.raises(ShapeError, match="one item"):
        warp_from_depth_batch(depth_A, K_A[:2], depth_B, K_B, T_A_to_B, valid_A, valid_B)
