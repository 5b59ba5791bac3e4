"""Splat Gaussians into cameras: colour, features, depth and alpha, by the backend that fits the machine."""

import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from l2m_viz.errors import L2MError, MissingError, ShapeError
from l2m_viz.gaussians import cpu, gsplat, reference
from l2m_viz.gaussians.container import Gaussians
from l2m_viz.gaussians.spherical_harmonics import evaluate_colors
from l2m_viz.geometry import Camera

HOLE_ALPHA = 0.5  # a pixel with less accumulated opacity than this counts as a hole
_EMPTY = 1e-10  # alpha of a pixel where nothing was drawn, that one may divide by
Backend = Literal["auto", "reference", "cpu", "gsplat"]
# Each draws on one kind of device.
_BACKENDS = {
    "reference": (reference.render, "cpu"),
    "cpu": (cpu.render, "cpu"),
    "gsplat": (gsplat.render, "cuda"),
}


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

    @property
    def mean_features(self) -> Float[Tensor, "*cameras h w d"]:
        """Mean feature of what each pixel shows, sum(w f) / alpha; half a feature is another feature.

        Raises:
            ShapeError: the Gaussians carry no features.
        """
        if self.features is None:
            raise ShapeError("mean_features", expected="Gaussians with features", got="none")
        return self.features / self.alpha[..., None].clamp(min=_EMPTY)


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

    View-dependent colour (``sh_rest``) is evaluated for each camera. Whatever device a backend draws on, the result is
    on the Gaussians' own, and gradients flow through.

    Args:
        gaussians: What to draw.
        camera: One camera, or a list of cameras of one image size, which adds a leading axis to the result.
        backend: "reference" is dense torch, to be read; "cpu" is numba on all cores; "gsplat" is CUDA and compiles
            itself at its first use; "auto" is "gsplat" for Gaussians on a GPU if that works there, else "cpu". All have
            gradients by the Gaussians, "gsplat" by the camera's pose, too, and "reference" by all of the camera.
        background: RGB behind everything, black if None; it affects colour only.
        near: Nearest drawn depth, in world units.
        far: Farthest drawn depth.
        eps2d: Variance in px^2 that is added on the screen, a low-pass filter.

    Raises:
        ShapeError: no cameras, or cameras of several sizes.
        MissingError: "gsplat" is asked for and cannot draw on this machine.
        L2MError: an unknown backend, or impossible near, far or eps2d.
    """
    check_limits("rasterize", near, far, eps2d)
    if background is not None and (tuple(background.shape) != (3,) or not torch.isfinite(background).all()):
        raise ShapeError("rasterize background", expected="three finite values", got=str(background.tolist()))
    cameras = camera if isinstance(camera, list) else [camera]
    if len({view.hw for view in cameras}) != 1:
        sizes = sorted({view.hw for view in cameras}) or "no cameras"
        raise ShapeError("rasterize", expected="cameras of one size (H, W)", got=str(sizes))
    home = gaussians.means.device
    name = _choose(home) if backend == "auto" else backend
    if name not in _BACKENDS:
        raise L2MError("rasterize", expected=f"backend 'auto' or one of {list(_BACKENDS)}", got=repr(backend))
    if name == "gsplat":
        gsplat.require()  # before anything is moved
    render_one, device = _BACKENDS[name]
    moved = gaussians if home.type == device else gaussians.to(device)
    renders = []
    for view in cameras:
        color, features, depth, alpha = render_one(_seen_from(view, moved), view, near, far, eps2d)
        if background is not None:
            color = color + (1 - alpha)[..., None] * background.to(color)
        features = None if features is None else features.to(home)
        depth = depth / alpha.clamp(min=_EMPTY)
        renders.append(Render(color.to(home), features, depth.to(home), alpha.to(home)))
    return _stack(renders) if isinstance(camera, list) else renders[0]


def check_limits(what: str, near: float, far: float, eps2d: float) -> None:
    """Refuse depths and a blur with which nothing can be drawn.

    Raises:
        L2MError: not 0 < near < far, or eps2d is negative or not finite.
    """
    if not 0 < near < far:
        raise L2MError(what, expected="0 < near < far", got=f"near {near:g}, far {far:g}")
    if not 0 <= eps2d < float("inf"):
        raise L2MError(what, expected="eps2d >= 0 px^2", got=f"{eps2d:g}")


def _choose(device: torch.device) -> Backend:
    """The fastest backend that can draw Gaussians of this device."""
    if device.type != "cuda":
        return "cpu"
    try:
        gsplat.require()
    except MissingError as error:
        warnings.warn(f"Gaussians on a GPU are drawn on the CPU: {error}", stacklevel=3)
        return "cpu"
    return "gsplat"


def _seen_from(camera: Camera, gaussians: Gaussians) -> Gaussians:
    """The Gaussians with the colours that they show to this camera."""
    if gaussians.sh_rest is None:
        return gaussians
    return replace(gaussians, colors=evaluate_colors(gaussians, camera), sh_rest=None)


def _stack(renders: list[Render]) -> Render:
    features = [render.features for render in renders if render.features is not None]
    return Render(
        color=torch.stack([render.color for render in renders]),
        features=torch.stack(features) if features else None,
        depth=torch.stack([render.depth for render in renders]),
        alpha=torch.stack([render.alpha for render in renders]),
    )
