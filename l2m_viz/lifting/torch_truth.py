"""Exact correspondence between two posed depth maps for a batch of pairs in plain torch, wherever they are.

`l2m_viz.lifting.ground_truth` says what the answers mean; here nothing is done pair by pair, and nothing is picked out
whose number a GPU would have to tell first. Projections are written out: a matrix product may round to ten bits, for
TensorFloat-32 and autocast belong to a training.
"""

from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.errors import ShapeError
from l2m_viz.geometry import inside_image, normalized_grid, pixel_grid, sample_image, to_normalized

_SMALLEST = 1e-12  # as in `geometry.project`


@torch.no_grad()
def warp_from_depth_batch(
    depth_A: Float[Tensor, "b h_a w_a"],
    K_A: Float[Tensor, "b 3 3"],
    depth_B: Float[Tensor, "b h_b w_b"],
    K_B: Float[Tensor, "b 3 3"],
    T_A_to_B: Float[Tensor, "b 4 4"],
    valid_A: Bool[Tensor, "b h_a w_a"],
    valid_B: Bool[Tensor, "b h_b w_b"],
    rel_depth_tol: float = 0.05,
) -> tuple[Float[Tensor, "b h_a w_a 2"], Bool[Tensor, "b h_a w_a"]]:
    """Do what `warp_from_depth` does for several pairs at once: return ``warp_A_to_B`` and ``covisibility_A_to_B``.

    Raises:
        ShapeError: the arguments differ in number, or a mask and its depth map in size.
    """
    masks = [(depth_A.shape, valid_A.shape), (depth_B.shape, valid_B.shape)]
    counts = {len(value) for value in (depth_A, K_A, depth_B, K_B, T_A_to_B)}
    if any(depth != mask for depth, mask in masks) or len(counts) > 1:
        got = f"{[tuple(map(tuple, each)) for each in masks]}, {sorted(counts)} items"
        expected = "a mask of each depth map's size, one item for each pair"
        raise ShapeError("warp_from_depth_batch", expected=expected, got=got)
    hw_A, hw_B = ((depth.shape[1], depth.shape[2]) for depth in (depth_A, depth_B))
    points_px, depth_in_B = _project(torch.where(valid_A, depth_A, 1.0), K_A, K_B, T_A_to_B)
    in_front = valid_A & (depth_in_B > 0)
    identity = normalized_grid(hw_A, device=depth_A.device, dtype=depth_A.dtype)
    warp = torch.where(in_front[..., None], to_normalized(points_px, hw_B), identity)
    agrees = torch.zeros_like(in_front)
    inverse_B, known_B = torch.where(valid_B, 1 / depth_B, 0.0), valid_B.to(depth_B.dtype)
    for mode in ("nearest", "bilinear"):
        sample = torch.vmap(partial(sample_image, mode=mode))
        inverse, known = sample(inverse_B, warp), sample(known_B, warp)
        agrees |= (known > 1 - 1e-4) & ((depth_in_B * inverse - 1).abs() < rel_depth_tol)
    return warp, in_front & inside_image(warp) & agrees


def _project(depth: Tensor, K_A: Tensor, K_B: Tensor, T_A_to_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where the point of every pixel is in B, [b h w 2] px, and at which depth [b h w]."""
    K_A, K_B, pose = (value.to(depth)[..., None, None] for value in (K_A, K_B, T_A_to_B))  # [b 3 3 1 1]
    u, v = pixel_grid((depth.shape[1], depth.shape[2]), device=depth.device, dtype=depth.dtype).unbind(-1)
    x, y = (u - K_A[:, 0, 2]) / K_A[:, 0, 0] * depth, (v - K_A[:, 1, 2]) / K_A[:, 1, 1] * depth
    x, y, z = (
        pose[:, k, 0] * x + pose[:, k, 1] * y + pose[:, k, 2] * depth + pose[:, k, 3] for k in range(3)
    )
    safe = torch.where(z.abs() < _SMALLEST, _SMALLEST, z)
    px, py = K_B[:, 0, 0] * (x / safe) + K_B[:, 0, 2], K_B[:, 1, 1] * (y / safe) + K_B[:, 1, 2]
    return torch.stack([px, py], dim=-1), z
