"""Splat Gaussians into cameras: colour, features, depth and alpha, by the backend that fits the machine."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from l2m_viz.errors import L2MError, ShapeError
from l2m_viz.gaussians import cpu, reference
from l2m_viz.gaussians.container import Gaussians
from l2m_viz.geometry import Camera

HOLE_ALPHA = 0.5  # a pixel with less accumulated opacity than this counts as a hole
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
        backend: "reference" is dense torch, to be read; "cpu" is numba on all cores; "auto" picks. All have
            gradients by the Gaussians, "reference" by the camera, too.
        background: RGB behind everything, black if None; it affects colour only.
        near: Nearest drawn depth, in world units.
        far: Farthest drawn depth.
        eps2d: Variance in px^2 that is added on the screen, a low-pass filter.

    Raises:
        ShapeError: no cameras, or cameras of several sizes.
        L2MError: an unknown backend, impossible near, far or eps2d, or view-dependent colour.
    """
    _check_options(background, near, far, eps2d)
    if isinstance(camera, list):
        if len({view.hw for view in camera}) != 1:
            sizes = sorted({view.hw for view in camera}) or "no cameras"
            raise ShapeError("rasterize", expected="cameras of one size (H, W)", got=str(sizes))
        options = {"background": background, "near": near, "far": far, "eps2d": eps2d}
        return _stack([rasterize(gaussians, view, backend=backend, **options) for view in camera])
    render_one = {"auto": cpu.render, "cpu": cpu.render, "reference": reference.render}.get(backend)
    if render_one is None:
        raise L2MError("rasterize", expected="backend 'auto', 'reference' or 'cpu'", got=repr(backend))
    if gaussians.sh_rest is not None:
        raise L2MError(
            "rasterize: view-dependent colour (sh_rest) is not drawn",
            todo="set sh_rest=None to draw `colors`",
        )
    color, features, depth, alpha = render_one(gaussians, camera, near, far, eps2d)
    if background is not None:
        color = color + (1 - alpha)[..., None] * background
    return Render(color, features, depth / alpha.clamp(min=1e-10), alpha)


def _check_options(background: Tensor | None, near: float, far: float, eps2d: float) -> None:
    if not 0 < near < far:
        raise L2MError("rasterize", expected="0 < near < far", got=f"near {near:g}, far {far:g}")
    if not 0 <= eps2d < float("inf"):
        raise L2MError("rasterize", expected="eps2d >= 0 px^2", got=f"{eps2d:g}")
    if background is not None and (tuple(background.shape) != (3,) or not torch.isfinite(background).all()):
        raise ShapeError("rasterize background", expected="three finite values", got=str(background.tolist()))


def _stack(renders: list[Render]) -> Render:
    features = [render.features for render in renders if render.features is not None]
    return Render(
        color=torch.stack([render.color for render in renders]),
        features=torch.stack(features) if features else None,
        depth=torch.stack([render.depth for render in renders]),
        alpha=torch.stack([render.alpha for render in renders]),
    )
