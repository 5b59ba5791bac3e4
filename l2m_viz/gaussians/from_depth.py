"""One Gaussian for each pixel of a photo with depth."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.data.images import require_image
from l2m_viz.errors import ShapeError, require_tensor
from l2m_viz.gaussians.container import Gaussians
from l2m_viz.geometry import Camera, quat_from_rotation, unproject_depth
from l2m_viz.lifting.depth import Depth, as_depth


@dataclass(frozen=True)
class PixelGaussiansCfg:
    """Shape of pixel-aligned Gaussians."""

    # Standard deviation over the pixel's footprint on the surface. With the rasterizer's own 0.3 px^2 blur, 0.25 to 0.4
    # is as sharp as the photo and still leaves no gaps at small camera moves; 0.6 blurs visibly.
    footprint: float = 0.3
    # Depth gained per pixel, over the pixel's width at that depth, beyond which a surface counts as seen edge-on.
    # Without a limit, one noisy depth makes a needle across the scene.
    max_slope: float = 4.0
    # Thickness along the normal, over the footprint's smaller side.
    thickness: float = 0.1
    opacity: float = 0.98
    # Opacity where a neighbour's depth jumps: such pixels mix the colours of two surfaces, or float between them. From
    # 0.98 to 0.8, opaque specks in what the mesh leaves empty fall from 3.7 to 3.4 % of it in motorcycle's real second
    # view, from 2.9 to 2.4 % in an orbit's, and 99.9 % of the source view keeps alpha > 0.9. It buys no PSNR (27.17 to
    # 27.15 dB; cones of Middlebury 26.14 to 26.05 dB): nothing lies behind these pixels, so they darken. 0.5 hides more
    # (2.0 %), but thin bars fade, and PSNR loses 0.15 dB (0.9 dB). Near or far side alone is no better a bargain.
    edge_opacity: float = 0.8
    # A valid neighbour (left, right, up or down) over this many times as far, or as near, is a jump, as in `MeshCfg`.
    max_depth_ratio: float = 1.05


def gaussians_from_depth(
    image: Float[Tensor, "h w 3"],
    depth: Depth | Float[Tensor, "h w"],
    K: Float[Tensor, "3 3"],
    features: Float[Tensor, "h w d"] | None = None,
    cfg: PixelGaussiansCfg | None = None,
) -> Gaussians:
    """Make one Gaussian a valid pixel: a flat disc on the surface that covers the pixel's footprint.

    The disc's two axes are the steps that the surface point takes from one pixel to the next, so that it projects back
    to the same small circle from the photo's camera however the surface is slanted. Where neighbours lie on another
    surface, the step is taken on the side that changes depth least, and the disc is less opaque.

    Args:
        image: RGB in [0, 1].
        depth: z-depth in any unit; the Gaussians are in that unit, in the frame of the photo's camera. Their
            ``length_unit`` is "m" for metric depth and "relative" for other, a bare map included (`as_depth`).
        K: Intrinsics in pixels.
        features: A descriptor a pixel, or None.
        cfg: Shape of the Gaussians.

    Raises:
        ShapeError: image, depth and features differ in size.
        ImageError: the image is not float with values in [0, 1].
        L2MError: ``K`` is not a calibration matrix.
    """
    cfg = cfg or PixelGaussiansCfg()
    depth = as_depth(depth)
    for name, value in (("image", image), ("features", features)):
        if value is not None and value.shape[:2] != depth.depth.shape:
            got = f"{name} {tuple(value.shape)}, depth {tuple(depth.depth.shape)}"
            raise ShapeError("gaussians_from_depth", expected="one size (H, W)", got=got)
    require_image("gaussians_from_depth", image)
    require_tensor("gaussians_from_depth: K", K)
    K = K.to(torch.float32)
    Camera(K, torch.eye(4), width=image.shape[1], height=image.shape[0])  # refuses a K that is none
    valid, z = depth.valid_mask, depth.depth
    points = unproject_depth(z, K)
    # P(u, v) = z(u, v) K^-1 (u, v, 1): the product rule gives the surface's step for one pixel to the right and down.
    rays = points / z[..., None]
    step_u = _surface_step(z, valid, rays, axis=1, pixel_width=1 / K[0, 0], max_slope=cfg.max_slope)[valid]
    step_v = _surface_step(z, valid, rays, axis=0, pixel_width=1 / K[1, 1], max_slope=cfg.max_slope)[valid]
    beside_jump = _beside_jump(z, valid, cfg.max_depth_ratio)[valid]
    quats, scales = _disc(cfg.footprint * step_u, cfg.footprint * step_v, cfg.thickness)
    gaussians = Gaussians.from_activated(
        means=points[valid],
        quats=quats,
        scales=scales,
        opacities=torch.where(beside_jump, cfg.edge_opacity, cfg.opacity),
        colors=image[valid],
        features=None if features is None else features[valid].contiguous(),
    )
    return replace(gaussians, length_unit=depth.length_unit)


def _beside_jump(z: Float[Tensor, "h w"], valid: Bool[Tensor, "h w"], ratio: float) -> Bool[Tensor, "h w"]:
    """Pixels on either side of a depth discontinuity between two valid neighbours."""
    beside = torch.zeros_like(valid)
    for axis in (0, 1):
        (z_0, z_1), (valid_0, valid_1), (beside_0, beside_1) = (
            (each.narrow(axis, 0, z.shape[axis] - 1), each.narrow(axis, 1, z.shape[axis] - 1))
            for each in (z, valid, beside)
        )
        jump = valid_0 & valid_1 & (torch.maximum(z_0, z_1) > ratio * torch.minimum(z_0, z_1))
        beside_0 |= jump  # views of `beside`
        beside_1 |= jump
    return beside


def _surface_step(
    z: Float[Tensor, "h w"],
    valid: Bool[Tensor, "h w"],
    rays: Float[Tensor, "h w 3"],
    *,
    axis: int,
    pixel_width: Tensor,
    max_slope: float,
) -> Float[Tensor, "h w 3"]:
    """Step dP of one pixel along ``axis`` (0 down, 1 right): dz from the smaller one-sided difference, clamped."""
    known = valid.narrow(axis, 1, z.shape[axis] - 1) & valid.narrow(axis, 0, z.shape[axis] - 1)
    difference = torch.where(known, z.diff(dim=axis), torch.inf)
    border = torch.full_like(z.narrow(axis, 0, 1), torch.inf)
    forward = torch.cat([difference, border], dim=axis)
    backward = torch.cat([border, difference], dim=axis)
    dz = torch.where(forward.abs() < backward.abs(), forward, backward)
    dz = torch.where(torch.isfinite(dz), dz, 0.0)  # no neighbour at all: face the camera
    limit = max_slope * z * pixel_width
    dz = torch.maximum(torch.minimum(dz, limit), -limit)
    step = dz[..., None] * rays
    step[..., 1 - axis] += z * pixel_width
    return step


def _disc(
    u: Float[Tensor, "n 3"], v: Float[Tensor, "n 3"], thickness: float
) -> tuple[Float[Tensor, "n 4"], Float[Tensor, "n 3"]]:
    """Rotation and standard deviations of the Gaussian with covariance u u^T + v v^T, made ``thickness`` thick."""
    # Turn (u, v) inside their plane until they are orthogonal: one Jacobi rotation of the 2x2 Gram matrix.
    uu, vv, uv = (u * u).sum(-1), (v * v).sum(-1), (u * v).sum(-1)
    angle = 0.5 * torch.atan2(2 * uv, uu - vv)[:, None]
    major = torch.cos(angle) * u + torch.sin(angle) * v
    minor = torch.cos(angle) * v - torch.sin(angle) * u
    lengths = torch.stack([major.norm(dim=-1), minor.norm(dim=-1)], dim=-1)
    axes = torch.stack([major, minor], dim=-1) / lengths[:, None, :]  # [n 3 2]
    normal = torch.linalg.cross(axes[..., 0], axes[..., 1])
    rotation = torch.cat([axes, normal[..., None]], dim=-1)
    return quat_from_rotation(rotation), torch.cat(
        [lengths, thickness * lengths.amin(-1, keepdim=True)], dim=-1
    )
