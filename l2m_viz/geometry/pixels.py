"""Where a pixel is. The only owner of pixel centres, normalised coordinates and their grids.

Symbols and conventions (everything else in the package calls these functions):

* pixel coordinates are continuous, (x, y) in the last axis; the centre of the top-left pixel is (0.5, 0.5)
  and an image spans [0, W] x [0, H];
* normalised coordinates are x_n = 2 x / W - 1, y_n = 2 y / H - 1, so that an image spans [-1, 1] x [-1, 1]
  (``align_corners=False`` in PyTorch's words);
* OpenCV, kornia and COLMAP's old files count the first pixel's centre at (0, 0): shift with
  `to_integer_centers` / `from_integer_centers` at that border and nowhere else.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.constants import constant

HW = tuple[int, int]


def pixel_grid(
    hw: HW, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Float[Tensor, "h w 2"]:
    """Return the pixel coordinates (x, y) of every pixel's centre.

    >>> pixel_grid((1, 2)).tolist()
    [[[0.5, 0.5], [1.5, 0.5]]]
    """
    height, width = hw
    y = torch.arange(height, device=device, dtype=dtype) + 0.5
    x = torch.arange(width, device=device, dtype=dtype) + 0.5
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # [h w 2]


def normalized_grid(
    hw: HW, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Float[Tensor, "h w 2"]:
    """Return the normalised coordinates of every pixel's centre: the warp of an image to itself.

    >>> normalized_grid((1, 2)).tolist()
    [[[-0.5, 0.0], [0.5, 0.0]]]
    """
    return to_normalized(pixel_grid(hw, device=device, dtype=dtype), hw)


def to_normalized(points_px: Float[Tensor, "*batch 2"], hw: HW) -> Float[Tensor, "*batch 2"]:
    """Map pixel coordinates of an image of size ``hw`` to normalised ones.

    >>> to_normalized(torch.tensor([0.0, 6.0]), (6, 8)).tolist()
    [-1.0, 1.0]
    """
    return 2 * points_px / _wh(points_px, hw) - 1


def to_pixel(points_n: Float[Tensor, "*batch 2"], hw: HW) -> Float[Tensor, "*batch 2"]:
    """Map normalised coordinates to pixel coordinates of an image of size ``hw``; inverse of `to_normalized`."""
    return (points_n + 1) / 2 * _wh(points_n, hw)


def to_integer_centers(points_px: Tensor) -> Tensor:
    """Shift our pixel coordinates to a library's that counts the first pixel's centre at (0, 0)."""
    return points_px - 0.5


def from_integer_centers(points: Tensor) -> Tensor:
    """Shift pixel coordinates of OpenCV, kornia or an old calibration file to ours; inverse of `to_integer_centers`."""
    return points + 0.5


def flow_from_warp(warp: Float[Tensor, "*batch h w 2"], hw_to: HW) -> Float[Tensor, "*batch h w 2"]:
    """Turn an absolute normalised warp into the displacement in pixels, flow = to_pixel(warp) - pixel_grid."""
    height, width = warp.shape[-3:-1]
    return to_pixel(warp, hw_to) - pixel_grid((height, width), device=warp.device, dtype=warp.dtype)


def warp_from_flow(flow: Float[Tensor, "*batch h w 2"], hw_to: HW) -> Float[Tensor, "*batch h w 2"]:
    """Turn a displacement in pixels into the absolute normalised warp; inverse of `flow_from_warp`."""
    height, width = flow.shape[-3:-1]
    return to_normalized(flow + pixel_grid((height, width), device=flow.device, dtype=flow.dtype), hw_to)


def inside_image(points_n: Float[Tensor, "*batch 2"]) -> Bool[Tensor, "*batch"]:
    """Say which normalised points lie on the image, borders included; NaN does not.

    >>> inside_image(torch.tensor([[0.0, 1.0], [0.0, 1.01]])).tolist()
    [True, False]
    """
    return (points_n.abs() <= 1).all(dim=-1)


def sample_image(
    values: Float[Tensor, "h w *channels"],
    points_n: Float[Tensor, "*points 2"],
    *,
    mode: Literal["bilinear", "nearest"] = "bilinear",
    padding: Literal["border", "zeros"] = "border",
) -> Float[Tensor, "..."]:
    """Read a map (H, W) or (H, W, C) at normalised points; the result has the points' shape plus the channels.

    >>> sample_image(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.0]])).tolist()
    [0.5]
    """
    points_shape = points_n.shape[:-1]
    scalar = values.ndim == 2
    channels_first = (values[..., None] if scalar else values).permute(2, 0, 1)[None]  # [1 c h w]
    grid = points_n.reshape(1, 1, -1, 2).to(values.dtype)
    out = F.grid_sample(channels_first, grid, mode=mode, padding_mode=padding, align_corners=False)
    out = out[0, :, 0].T  # [points c]
    return out[:, 0].reshape(points_shape) if scalar else out.reshape(*points_shape, values.shape[-1])


def sample_warp(
    warp: Float[Tensor, "h w 2"], points_n: Float[Tensor, "*points 2"]
) -> Float[Tensor, "*points 2"]:
    """Read an absolute warp at normalised points: interpolate the displacement, then add it to the point.

    Interpolating the positions themselves would stop them at the centres of the border pixels: half a pixel short for
    a dense warp, many pixels for a coarse one.

    >>> sample_warp(normalized_grid((2, 3)), torch.tensor([1.0, -1.0])).tolist()
    [1.0, -1.0]
    """
    grid = normalized_grid((warp.shape[0], warp.shape[1]), device=warp.device, dtype=warp.dtype)
    return points_n + sample_image(warp - grid, points_n)


def _wh(like: Tensor, hw: HW) -> Tensor:
    return constant((hw[1], hw[0]), like.device, like.dtype)
