"""A random depth for training pairs: planes that follow the photo's own segments, bent by something smooth.

A correspondence is exact whatever the geometry is, as long as both views show the same one; so pairs for training need
no true depth, they need *many* depths, with occlusion where colours change. The photo is cut into segments by a
watershed from random seeds. Some stay on one smooth surface, the others are tilted planes before it.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from l2m_viz.data.images import require_image
from l2m_viz.geometry import HW
from l2m_viz.lifting import _planes
from l2m_viz.parallel import run_kernel

Range = tuple[float, float]
_FAR_BELOW = np.float32(10)  # disparities of planes and surface are between -1 and 2


@dataclass(frozen=True)
class RandomPlanesCfg:
    """Ranges of the random geometry; disparity is 1 at the nearest point."""

    # Long side at which the photo is segmented, in pixels.
    working_side: int = 128
    # Seeds of the watershed.
    num_segments: tuple[int, int] = (6, 40)
    # Smallest disparity: the farthest thing is 1 / this as far as the nearest one.
    farthest: Range = (0.08, 0.4)
    # Share of the segments that leave the smooth surface.
    lifted_share: Range = (0.2, 0.8)
    # Change of a lifted plane's disparity across the whole photo.
    tilt: float = 0.6


def random_planes_disparity(
    image: Float[Tensor, "h w 3"],
    generator: torch.Generator | None = None,
    cfg: RandomPlanesCfg | None = None,
) -> Float[Tensor, "h w"]:
    """Draw a disparity in (0, 1] for a photo; the same generator state gives the same one.

    Raises:
        ImageError: the image is not float with values in [0, 1].
    """
    require_image("random_planes", image)
    cfg = cfg or RandomPlanesCfg()
    hw: HW = (image.shape[0], image.shape[1])
    rng = np.random.default_rng(int(torch.randint(0, 2**62, (), generator=generator)))
    labels, num = _segments(
        image.detach().cpu().numpy(),
        int(rng.integers(*cfg.num_segments, endpoint=True)),
        cfg.working_side,
        rng,
    )
    smooth = _smooth(hw, rng)
    lifted = rng.random(num) < rng.uniform(*cfg.lifted_share)
    # Plane a + b x + c y of each segment, x and y from -1/2 to 1/2 over the photo; never above the surface if it stays.
    slopes = rng.uniform(-cfg.tilt, cfg.tilt, (2, num)).astype(np.float32)
    heights = np.where(lifted, rng.random(num, dtype=np.float32), -_FAR_BELOW)
    y, x = ((np.arange(side, dtype=np.float32) + 0.5) / side - 0.5 for side in hw)
    disparity = np.empty(hw, np.float32)
    run_kernel(_planes.raise_planes, labels, heights, slopes, x, y, smooth, disparity)
    low, high = disparity.min(), disparity.max()
    farthest = rng.uniform(*cfg.farthest)
    disparity -= low
    disparity *= (1 - farthest) / max(high - low, 1e-6)
    disparity += farthest
    return torch.from_numpy(disparity)


def _segments(photo: np.ndarray, num: int, side: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Label each pixel 0 to num - 1; borders follow the photo's edges (Meyer's watershed on the colour image)."""
    height, width = photo.shape[:2]
    scale = min(1.0, side / max(height, width))
    small_wh = max(2, round(width * scale)), max(2, round(height * scale))
    small = cv2.GaussianBlur(cv2.resize(photo, small_wh, interpolation=cv2.INTER_AREA), (0, 0), 1.0)
    small = cv2.convertScaleAbs(small, alpha=255)  # the watershed wants bytes
    seeds = np.zeros(small.shape[:2], np.int32)
    places = rng.choice(seeds.size, min(num, seeds.size), replace=False)
    seeds.flat[places] = np.arange(1, len(places) + 1)
    labels = cv2.watershed(small, seeds)
    border = labels <= 0  # the watershed draws a line between segments, and round the picture
    kernel = np.ones((3, 3), np.uint8)
    while border.any():
        grown = cv2.dilate(labels.astype(np.float32), kernel).astype(np.int32)
        labels = np.where(border, np.maximum(grown, labels), labels)
        border = labels <= 0
    full = cv2.resize(labels - 1, (width, height), interpolation=cv2.INTER_NEAREST)
    return full, len(places)


def _smooth(hw: HW, rng: np.random.Generator) -> np.ndarray:
    """A few soft hills, and most often a ground that comes nearer downwards; 0 to 1."""
    # Bicubic enlargement is linear and separable: each side's share of it, as a matrix, is that of the unit vectors.
    down, across = (
        cv2.resize(np.eye(4, dtype=np.float32), (4, side), interpolation=cv2.INTER_CUBIC) for side in hw
    )
    surface = down @ (rng.random((4, 4), dtype=np.float32) * rng.uniform(0.1, 0.8)) @ across.T
    surface += np.linspace(0, 1, hw[0], dtype=np.float32)[:, None] * rng.uniform(-0.3, 1.5)
    low, high = surface.min(), surface.max()
    surface -= low
    surface /= max(high - low, 1e-6)
    return surface
