"""Exact correspondence between two posed depth maps: where each pixel went, and whether the other camera sees it."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.errors import ShapeError
from l2m_viz.geometry import (
    inside_image,
    normalized_grid,
    project,
    sample_image,
    to_normalized,
    transform_points,
    unproject_depth,
)
from l2m_viz.lifting import _truth
from l2m_viz.parallel import run_kernel


def warp_from_depth(
    depth_A: Float[Tensor, "h_a w_a"],
    K_A: Float[Tensor, "3 3"],
    depth_B: Float[Tensor, "h_b w_b"],
    K_B: Float[Tensor, "3 3"],
    T_A_to_B: Float[Tensor, "4 4"],
    valid_A: Bool[Tensor, "h_a w_a"] | None = None,
    valid_B: Bool[Tensor, "h_b w_b"] | None = None,
    rel_depth_tol: float = 0.05,
) -> tuple[Float[Tensor, "h_a w_a 2"], Bool[Tensor, "h_a w_a"]]:
    """Return ``warp_A_to_B`` (absolute, normalised) and ``covisibility_A_to_B``.

    A pixel of A is covisible when its point lies in front of B, inside B's frame, and agrees with B's depth there
    within ``rel_depth_tol``. B's depth is read twice, as the nearest sample and bilinearly in inverse depth (exact on a
    plane); either may vouch for the point, and only from valid pixels. A missing mask counts as all valid. Outside
    the covisible part the warp is still the projection of A's point where that is in front of B, else the identity.

    Raises:
        ShapeError: a mask and its depth map differ in size.
    """
    valid_A = torch.ones_like(depth_A, dtype=torch.bool) if valid_A is None else valid_A
    valid_B = torch.ones_like(depth_B, dtype=torch.bool) if valid_B is None else valid_B
    for name, depth, valid in (("A", depth_A, valid_A), ("B", depth_B, valid_B)):
        if depth.shape != valid.shape:
            got = f"{tuple(depth.shape)} and {tuple(valid.shape)}"
            raise ShapeError(f"depth_{name} and valid_{name}", expected="one size", got=got)
    K_A, K_B, T_A_to_B = (
        value.to(depth_A.dtype) for value in (K_A, K_B, T_A_to_B)
    )  # calibrations come as float64
    inputs = depth_A, K_A, depth_B, K_B, T_A_to_B, valid_A, valid_B
    plain = depth_A.dtype == depth_B.dtype == torch.float32
    plain &= not any(value.requires_grad or value.device.type != "cpu" for value in inputs)
    return (_warp_numba if plain else _warp_torch)(*inputs, rel_depth_tol)


def _warp_numba(
    depth_A: Float[Tensor, "h_a w_a"],
    K_A: Float[Tensor, "3 3"],
    depth_B: Float[Tensor, "h_b w_b"],
    K_B: Float[Tensor, "3 3"],
    T_A_to_B: Float[Tensor, "4 4"],
    valid_A: Bool[Tensor, "h_a w_a"],
    valid_B: Bool[Tensor, "h_b w_b"],
    rel_depth_tol: float,
) -> tuple[Float[Tensor, "h_a w_a 2"], Bool[Tensor, "h_a w_a"]]:
    """One pass in compiled code; ten times as fast as `_warp_torch` on one core."""
    to_image, from_image, pose = (value.numpy().astype(np.float64) for value in (K_B, K_A, T_A_to_B))
    to_image[2] = 0, 0, 1  # the third number is depth, whatever K's last row
    ray = to_image @ pose[:3, :3] @ np.linalg.inv(from_image)
    offset = to_image @ pose[:3, 3]
    warp = np.empty((*depth_A.shape, 2), np.float32)
    seen = np.empty(depth_A.shape, np.bool_)
    inverse_B = np.empty(depth_B.shape, np.float32)
    run_kernel(
        _truth.warp_rows, _array(depth_A), _array(valid_A), ray.astype(np.float32), offset.astype(np.float32),
        _array(depth_B), _array(valid_B), np.float32(rel_depth_tol), inverse_B, warp, seen,
    )  # fmt: skip
    return torch.from_numpy(warp), torch.from_numpy(seen)


def _array(value: Tensor) -> np.ndarray:
    return np.ascontiguousarray(value.numpy())


def _warp_torch(
    depth_A: Float[Tensor, "h_a w_a"],
    K_A: Float[Tensor, "3 3"],
    depth_B: Float[Tensor, "h_b w_b"],
    K_B: Float[Tensor, "3 3"],
    T_A_to_B: Float[Tensor, "4 4"],
    valid_A: Bool[Tensor, "h_a w_a"],
    valid_B: Bool[Tensor, "h_b w_b"],
    rel_depth_tol: float,
) -> tuple[Float[Tensor, "h_a w_a 2"], Bool[Tensor, "h_a w_a"]]:
    """The same in plain torch: readable, and for GPUs, double precision and gradients."""
    hw_B = (depth_B.shape[0], depth_B.shape[1])
    points_in_B = transform_points(T_A_to_B, unproject_depth(torch.where(valid_A, depth_A, 1.0), K_A))
    points_px, depth_in_B = project(points_in_B, K_B)
    in_front = valid_A & (depth_in_B > 0)
    identity = normalized_grid(
        (depth_A.shape[0], depth_A.shape[1]), device=depth_A.device, dtype=depth_A.dtype
    )
    warp = torch.where(in_front[..., None], to_normalized(points_px, hw_B), identity)
    seen = torch.zeros_like(in_front)
    candidates = in_front & inside_image(warp)
    seen[candidates] = _agrees(depth_in_B[candidates], warp[candidates], depth_B, valid_B, rel_depth_tol)
    return warp, seen


def _agrees(
    depth: Float[Tensor, " n"],
    warp: Float[Tensor, "n 2"],
    depth_B: Float[Tensor, "h w"],
    valid_B: Bool[Tensor, "h w"],
    tol: float,
) -> Bool[Tensor, " n"]:
    inverse_B = torch.where(valid_B, 1 / torch.where(valid_B, depth_B, 1.0), 0.0)
    known = valid_B.to(depth.dtype)
    agrees = torch.zeros_like(depth, dtype=torch.bool)
    for mode in ("nearest", "bilinear"):
        ratio = depth * sample_image(inverse_B, warp, mode=mode)  # z of A's point over z that B measured
        all_known = sample_image(known, warp, mode=mode) > 1 - 1e-4
        agrees |= all_known & ((ratio - 1).abs() < tol)
    return agrees
