"""Splat Gaussians into cameras: colour, features, depth and alpha, by the backend that fits the machine."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from l2m_viz.errors import L2MError, ShapeError
from l2m_viz.gaussians import _splat, reference
from l2m_viz.gaussians.container import Gaussians
from l2m_viz.geometry import Camera
from l2m_viz.parallel import run_kernel

Backend = Literal["auto", "reference", "cpu"]


@dataclass(frozen=True)
class Render:
    """What the Gaussians look like from one camera, or from several with a leading axis.

    Attributes:
        color: RGB over the background.
        features: Blended feature channels, zero where nothing was drawn, or None.
        depth: Expected z, sum(w z) / alpha; means something only where alpha > 0.
        alpha: Accumulated opacity in [0, 1].
    """

    color: Float[Tensor, "*cameras h w 3"]
    features: Float[Tensor, "*cameras h w d"] | None
    depth: Float[Tensor, "*cameras h w"]
    alpha: Float[Tensor, "*cameras h w"]


def rasterize(
    gaussians: Gaussians,
    camera: Camera | list[Camera],
    *,
    backend: Backend = "auto",
    background: Float[Tensor, " 3"] | None = None,
    near: float = 0.01,
    far: float = 1e10,
    eps2d: float = 0.3,
) -> Render:
    """Render Gaussians with the rules of gsplat 1.5.3 (see `l2m_viz.gaussians.reference`).

    Args:
        gaussians: What to draw.
        camera: One camera, or a list of cameras of one image size, which adds a leading axis to the result.
        backend: "reference" is dense torch with gradients; "cpu" is numba on all cores; "auto" picks.
        background: RGB behind everything, black if None; it affects colour only.
        near: Nearest drawn depth, in world units.
        far: Farthest drawn depth.
        eps2d: Variance in px^2 that is added on the screen, a low-pass filter.

    Raises:
        ShapeError: no cameras, or cameras of several sizes.
        L2MError: an unknown backend, gradients asked of a backend that has none, or view-dependent colour.
    """
    if isinstance(camera, list):
        if len({view.hw for view in camera}) != 1:
            sizes = sorted({view.hw for view in camera}) or "no cameras"
            raise ShapeError("rasterize", expected="cameras of one size (H, W)", got=str(sizes))
        options = {"background": background, "near": near, "far": far, "eps2d": eps2d}
        return _stack([rasterize(gaussians, view, backend=backend, **options) for view in camera])
    render_one = {"auto": _render_cpu, "cpu": _render_cpu, "reference": _render_reference}.get(backend)
    if render_one is None:
        raise L2MError("rasterize", expected="backend 'auto', 'reference' or 'cpu'", got=repr(backend))
    if gaussians.sh_rest is not None:
        raise L2MError("rasterize: view-dependent colour (sh_rest) is not drawn", todo="set sh_rest=None to draw `colors`")
    color, features, depth, alpha = render_one(gaussians, camera, near, far, eps2d)
    if background is not None:
        color = color + (1 - alpha)[..., None] * background
    return Render(color, features, depth / alpha.clamp(min=1e-10), alpha)


_Layers = tuple[Tensor, Tensor | None, Tensor, Tensor]


def _render_reference(gaussians: Gaussians, camera: Camera, near: float, far: float, eps2d: float) -> _Layers:
    screen = reference.project_gaussians(gaussians, camera, near, far, eps2d)
    layers = [gaussians.colors, screen.depths[:, None]]
    if gaussians.features is not None:
        layers.append(gaussians.features)
    values, transmittance = reference.composite(screen, gaussians.opacities, torch.cat(layers, dim=-1), camera)
    features = None if gaussians.features is None else values[..., 4:]
    return values[..., :3], features, values[..., 3], 1 - transmittance


def _render_cpu(gaussians: Gaussians, camera: Camera, near: float, far: float, eps2d: float) -> _Layers:
    if torch.is_grad_enabled() and any(value.requires_grad for value in vars(gaussians).values() if value is not None):
        raise L2MError("rasterize: the cpu backend has no gradients", todo="use backend='reference' or torch.no_grad()")
    hw, n = camera.hw, len(gaussians)
    screen, tiles = np.empty((n, _splat.NUM_COLUMNS), np.float32), np.empty((n, 4), np.int32)
    parameters = (gaussians.means, gaussians.quats, gaussians.log_scales, gaussians.logit_opacities, camera.w2c, camera.K)
    limits = tuple(np.float32(value) for value in (near, far, eps2d))
    run_kernel(_splat.project_gaussians, *map(_array, parameters), hw, *limits, screen, tiles)
    columns, rows = -(-hw[1] // _splat.TILE), -(-hw[0] // _splat.TILE)
    start, indices = _splat.bin_into_tiles(_splat.order_by_depth(screen, tiles), tiles, columns, rows)
    num_channels = 0 if gaussians.features is None else gaussians.features.shape[1]
    features = np.empty((n, 0), np.float32) if gaussians.features is None else _array(gaussians.features)
    color, feature = np.zeros((*hw, 3), np.float32), np.zeros((*hw, num_channels), np.float32)
    depth, transmittance = np.zeros(hw, np.float32), np.ones(hw, np.float32)
    inputs = (start, indices, screen, _array(gaussians.colors), features, columns, rows)
    run_kernel(_splat.composite_tiles, *inputs, color, feature, depth, transmittance)
    drawn = None if gaussians.features is None else torch.from_numpy(feature)
    return torch.from_numpy(color), drawn, torch.from_numpy(depth), torch.from_numpy(1 - transmittance)


def _array(value: Tensor) -> np.ndarray:
    return np.ascontiguousarray(value.detach().cpu().numpy(), np.float32)


def _stack(renders: list[Render]) -> Render:
    features = [render.features for render in renders if render.features is not None]
    return Render(
        color=torch.stack([render.color for render in renders]),
        features=torch.stack(features) if features else None,
        depth=torch.stack([render.depth for render in renders]),
        alpha=torch.stack([render.alpha for render in renders]),
    )
