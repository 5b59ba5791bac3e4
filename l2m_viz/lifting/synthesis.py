"""From one photo to several views of it: the paper's multi-view synthesis.

Estimate a depth, leave the sky out, lift, look from elsewhere, fill what the photo never saw. Training pairs take the
first half from here and choose their cameras themselves.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from l2m_viz.errors import L2MError
from l2m_viz.lifting.depth import estimate_depth
from l2m_viz.lifting.inpainting import fill_holes
from l2m_viz.lifting.scene import LiftedScene, View, lift
from l2m_viz.lifting.sky import mask_sky, sky_mask
from l2m_viz.lifting.views import ViewSamplerCfg, sample_cameras, sample_intrinsics


class NothingButSkyError(L2MError):
    """The photo has nothing that could be lifted."""


@dataclass(frozen=True)
class SynthesisCfg:
    """How a photo becomes several views."""

    # Depth estimator, see `estimate_depth`.
    depth: str = "prior"
    # Focal length, where it is unknown, and camera ranges: the paper's.
    views: ViewSamplerCfg = field(default_factory=ViewSamplerCfg)
    # How holes are filled, see `fill_holes`; "background" needs another photo.
    holes: str = "telea"
    # How the sky is found, see `sky_mask`; None leaves it where the depth says it is.
    sky: str | None = None


def synthesise_views(
    image: Float[Tensor, "h w 3"],
    n: int,
    cfg: SynthesisCfg | None = None,
    generator: torch.Generator | None = None,
    *,
    K: Float[Tensor, "3 3"] | None = None,
    background: Float[Tensor, "h2 w2 3"] | None = None,
) -> list[View]:
    """Look at one photo from n cameras, the first of which is its own.

    Args:
        image: RGB in [0, 1].
        n: Number of views, with the photo itself, which comes first and as it is.
        cfg: Settings.
        generator: Draws focal length, cameras, and what the depth estimator and the filling draw.
        K: Intrinsics of the photo in pixels, where they are known.
        background: The other photo behind the holes, for ``holes="background"``.

    Raises:
        ImageError: the photo is not float with values in [0, 1].
        L2MError: n is below 1.
        NothingButSkyError: no pixel is left to lift.
    """
    if n < 1:
        raise L2MError("synthesise_views", expected="n >= 1 views, the photo among them", got=str(n))
    cfg = cfg or SynthesisCfg()
    K = sample_intrinsics((image.shape[0], image.shape[1]), cfg.views, generator) if K is None else K
    scene = lift_photo(image, K, cfg.depth, cfg.sky, generator)
    renders = (scene.render(camera) for camera in sample_cameras(scene, n - 1, cfg.views, generator))
    filled = [fill_holes(view, cfg.holes, background=background, generator=generator) for view in renders]
    return [scene.own_view, *filled]


def lift_photo(
    image: Float[Tensor, "h w 3"],
    K: Float[Tensor, "3 3"],
    depth: str,
    sky: str | None = None,
    generator: torch.Generator | None = None,
) -> LiftedScene:
    """Estimate the depth of a photo and lift it, without its sky.

    Raises:
        NothingButSkyError: no pixel is left.
    """
    estimated = estimate_depth(image, depth, K=K, generator=generator)
    if sky is not None:
        # invented depth knows nothing of what is far
        mask = sky_mask(image, None if depth == "random-planes" else estimated, sky)
        if not (estimated.valid_mask & ~mask).any():
            raise NothingButSkyError("lift_photo", expected="a pixel that is not sky", got="none")
        estimated = mask_sky(estimated, mask)
    return lift(image, estimated, K)
