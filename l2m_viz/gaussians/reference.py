"""The splatter, written to be read: EWA projection, then front-to-back compositing, dense and in plain torch.

Symbols: N Gaussians, H x W pixels; mu' and Sigma' are a Gaussian's centre and covariance on the screen; the conic is
Sigma'^-1; T is the transmittance, the share of light that nothing in front has taken. Zwicker et al., "EWA Splatting"
(2002), equations in brackets; Kerbl et al., "3D Gaussian Splatting" (2023); rules and constants of gsplat 1.5.3.

Memory is N x H x W: for teaching and for testing the fast backends, which share its constants.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.gaussians.container import Gaussians
from l2m_viz.geometry import Camera, pixel_grid, project, transform_points

MAX_ALPHA = 0.999  # a Gaussian never hides everything behind it
MIN_ALPHA = 1 / 255  # fainter than one step of an 8-bit picture: skipped
MIN_TRANSMITTANCE = 1e-4  # the Gaussian that would bring T to this or less is not drawn and ends the pixel
FRUSTUM_MARGIN = 0.3  # of the half field of view: how far outside the image the Jacobian is still evaluated


Layers = tuple[Tensor, Tensor | None, Tensor, Tensor]
"""One camera's colour (H, W, 3), features (H, W, D) or None, sum of weight times z (H, W), alpha (H, W)."""


@dataclass(frozen=True)
class ScreenGaussians:
    """Gaussians on the screen: centres (px), conics (px^-2, entries xx, xy, yy), depths, and which can be drawn."""

    means2d: Float[Tensor, "n 2"]
    conics: Float[Tensor, "n 3"]
    depths: Float[Tensor, " n"]
    visible: Bool[Tensor, " n"]


def project_gaussians(
    gaussians: Gaussians, camera: Camera, near: float, far: float, eps2d: float
) -> ScreenGaussians:
    """Project centres and covariances: Sigma' = J W Sigma W^T J^T + eps2d I  [EWA eq. 31, and the low-pass filter]."""
    points = transform_points(camera.w2c, gaussians.means)  # [n 3]
    means2d, depths = project(points, camera.K)
    visible = (depths >= near) & (depths <= far)
    depths = torch.where(visible, depths, 1.0)
    J = _projection_jacobian(points, depths, camera)  # [n 2 3]
    JW = J @ camera.w2c[:3, :3]
    covars2d = JW @ gaussians.covars @ JW.transpose(-1, -2) + eps2d * torch.eye(2, dtype=J.dtype)
    (xx, xy), (_, yy) = (row.unbind(-1) for row in covars2d.unbind(-2))
    determinant = xx * yy - xy * xy
    visible = visible & (determinant > 0)
    determinant = torch.where(visible, determinant, 1.0)
    conics = torch.stack([yy, -xy, xx], dim=-1) / determinant[:, None]
    return ScreenGaussians(means2d, conics, depths, visible)


def _projection_jacobian(
    points: Float[Tensor, "n 3"], depths: Float[Tensor, " n"], camera: Camera
) -> Float[Tensor, "n 2 3"]:
    """Derivative of (fx x/z, fy y/z) by (x, y, z), with x/z and y/z held near the image  [EWA eq. 29]."""
    fx, fy, cx, cy = camera.K[0, 0], camera.K[1, 1], camera.K[0, 2], camera.K[1, 2]
    margin_x = FRUSTUM_MARGIN * camera.width / (2 * fx)
    margin_y = FRUSTUM_MARGIN * camera.height / (2 * fy)
    x = _clamp(points[:, 0] / depths, -cx / fx - margin_x, (camera.width - cx) / fx + margin_x)
    y = _clamp(points[:, 1] / depths, -cy / fy - margin_y, (camera.height - cy) / fy + margin_y)
    zero = torch.zeros_like(depths)
    rows = [fx / depths, zero, -fx * x / depths, zero, fy / depths, -fy * y / depths]
    return torch.stack(rows, dim=-1).unflatten(-1, (2, 3))


def _clamp(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(values, low), high)


def composite(
    screen: ScreenGaussians,
    opacities: Float[Tensor, " n"],
    values: Float[Tensor, "n c"],
    camera: Camera,
) -> tuple[Float[Tensor, "h w c"], Float[Tensor, "h w"]]:
    """Blend front to back: return sum of alpha_i T_i values_i with T_i = prod_{j<i} (1 - alpha_j), and the last T."""
    order = torch.sort(torch.where(screen.visible, screen.depths, torch.inf), stable=True).indices
    order = order[: int(screen.visible.sum())]
    offset = pixel_grid(camera.hw, dtype=values.dtype)[..., None, :] - screen.means2d[order]  # [h w n 2]
    dx, dy = offset.unbind(-1)
    xx, xy, yy = screen.conics[order].unbind(-1)
    power = 0.5 * (xx * dx * dx + yy * dy * dy) + xy * dx * dy  # [h w n]
    alpha = (opacities[order] * torch.exp(-power)).clamp(max=MAX_ALPHA)
    alpha = torch.where((alpha >= MIN_ALPHA) & (power >= 0), alpha, 0.0)
    after = torch.cumprod(
        1 - alpha, dim=-1
    )  # T behind each Gaussian; it only falls, so the end of a pixel is a mask
    alpha = torch.where(after > MIN_TRANSMITTANCE, alpha, 0.0)
    after = torch.cumprod(1 - alpha, dim=-1)
    before = torch.cat([torch.ones_like(after[..., :1]), after[..., :-1]], dim=-1)
    final = after[..., -1] if len(order) else torch.ones(camera.hw, dtype=values.dtype)
    return (alpha * before) @ values[order], final


def render(gaussians: Gaussians, camera: Camera, near: float, far: float, eps2d: float) -> Layers:
    """Draw one camera: colour, features, sum of weight times z, alpha."""
    camera = replace(camera, K=camera.K.to(gaussians.means), w2c=camera.w2c.to(gaussians.means))
    screen = project_gaussians(gaussians, camera, near, far, eps2d)
    values = [gaussians.colors, screen.depths[:, None]]
    if gaussians.features is not None:
        values.append(gaussians.features)
    blended, transmittance = composite(screen, gaussians.opacities, torch.cat(values, dim=-1), camera)
    features = None if gaussians.features is None else blended[..., 4:]
    return blended[..., :3], features, blended[..., 3], 1 - transmittance
