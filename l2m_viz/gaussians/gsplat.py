"""The GPU backend: gsplat's CUDA kernels behind the contract of the other two (`l2m_viz.gaussians.reference`).

Ye et al., "gsplat: An Open-Source Library for Gaussian Splatting" (2024), version 1.5.3. It is imported at the first
draw only, and then compiles its CUDA extension if nobody has before: some minutes, once a machine.
"""

from functools import cache

import torch

from l2m_viz.errors import L2MError, MissingError
from l2m_viz.gaussians.container import Gaussians
from l2m_viz.gaussians.reference import Layers
from l2m_viz.geometry import Camera

_INSTEAD = "use backend='cpu', which draws the same"
_MAX_LINES, _MAX_COLUMNS = 6, 200  # of a compiler's complaint, in our message


def render(gaussians: Gaussians, camera: Camera, near: float, far: float, eps2d: float) -> Layers:
    """Draw one camera: colour, features, sum of weight times z, alpha; differentiable by Gaussians and pose.

    gsplat draws any number of channels in chunks of 32, and pads the last chunk where it has no kernel of that width.

    Raises:
        MissingError: there is no GPU, no gsplat, or no way to compile it.
        L2MError: gradients by ``camera.K`` are asked for; gsplat has none.
    """
    require()
    from gsplat import rasterization

    if torch.is_grad_enabled() and camera.K.requires_grad:
        todo = "use backend='reference' for gradients by K"
        raise L2MError("rasterize: the gsplat backend has no gradients by the camera's K", todo=todo)
    values = [gaussians.colors] if gaussians.features is None else [gaussians.colors, gaussians.features]
    like = {"device": gaussians.means.device, "dtype": torch.float32}
    blended, alpha, _ = rasterization(
        gaussians.means.float(),
        gaussians.quats.float(),
        gaussians.scales.float(),
        gaussians.opacities.float(),
        torch.cat(values, dim=-1).float(),
        camera.w2c.to(**like)[None],
        camera.K.to(**like)[None],
        camera.width,
        camera.height,
        near_plane=near,
        far_plane=far,
        radius_clip=0.0,  # no Gaussian is too small to be drawn
        eps2d=eps2d,
        packed=False,  # packing pays with many cameras in one call
        render_mode="RGB+D",  # appends the sum of weight times z
        rasterize_mode="classic",
    )
    color, features, depth = blended[0].split([3, blended.shape[-1] - 4, 1], dim=-1)  # of [1 h w 3+d+1]
    return color, None if gaussians.features is None else features, depth[..., 0], alpha[0, ..., 0]


def require() -> None:
    """Check that gsplat can draw on this machine; the first call may compile it.

    Raises:
        MissingError: no GPU, no gsplat, no compiler for it, or a failed compilation, each with what to do.
    """
    if not torch.cuda.is_available():
        raise MissingError("backend 'gsplat' needs a CUDA GPU, and PyTorch finds none", todo=_INSTEAD)
    try:
        import gsplat  # noqa: F401 (is it there?)
    except ImportError as error:
        what = "gsplat is not installed" if error.name == "gsplat" else f"gsplat cannot be imported: {error}"
        raise MissingError(what, todo=f"run `pip install 'l2m-viz[gpu]'`, or {_INSTEAD}") from error
    if problem := _extension_problem():
        raise MissingError(problem, todo=_INSTEAD)


@cache  # a build that failed once is not tried again for every picture
def _extension_problem() -> str:
    """Load gsplat's CUDA extension, compiling it if need be; return what went wrong, or nothing."""
    try:
        from gsplat.cuda._backend import _C  # pyright: ignore[reportAttributeAccessIssue] (made at import)
    except Exception as error:  # torch raises what compiler, linker and loader left behind
        # gsplat answers an OSError by loading a library that is not there: the first error tells more than the second.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        lines = [line.strip()[:_MAX_COLUMNS] for line in str(cause).splitlines() if line.strip()]
        told = [line for line in lines if "error:" in line.lower()] or lines
        return "\n".join(["gsplat's CUDA extension failed to build:", *told[-_MAX_LINES:]]).rstrip(".")
    if _C is None:
        return "gsplat compiles its CUDA code at the first use, and there is no nvcc (CUDA toolkit) to do it"
    return ""
